"""One task -> one shard, safe against being killed at any moment.

    video-000003.tar        the samples, GNU tar in webdataset naming
    video-000003.tar.idx    offsets for tools that want them (DALI's v1.2 text form); derived, never
                            trusted alone
    video-000003.json       written last: sizes, sha256, crc32 of every member, inputs, rejected
                            inputs, and its own digest

Each file is written under a temporary name, synced and renamed; the JSON is the commit. A shard
without its JSON does not exist. The same samples give the same bytes: fixed owner, mode and time
stamps.
"""

import contextlib
import fcntl
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from model_factory.files import file_sha256, json_bytes, naming, write_atomically

from .schema import SCHEMA_VERSION, SampleInfo

# the record first: without it a shard does not exist
SHARD_SUFFIXES = (".json", ".tar.idx", ".tar")
SHORT_DIGEST = 16  # hex digits of a source's sha256 in the record: enough to find duplicates

Sample = tuple[str, dict[str, bytes], SampleInfo]  # key, members by extension, metadata


def write_shard(directory: Path, name: str, samples: Iterable[Sample], statement: dict) -> dict:
    """Write samples and return the shard's record, also stored as NAME.json.

    `statement` is what the record states of its making (settings, inputs, rejected inputs). It may
    grow while the samples are drawn: it is read when the last one is written.
    """
    tar = directory / f"{name}.tar"
    temporary = directory / f".{name}.tar.tmp"
    try:
        entries = _write_tar(temporary, samples)
        os.replace(temporary, tar)
    except BaseException:
        # half a shard is of no use, and takes the room that others may need
        temporary.unlink(missing_ok=True)
        raise
    with tarfile.open(tar, "r:") as archive:
        # read back from the tar: the writer of webdataset does not show where it puts members
        extents = {member.name: (member.offset_data, member.size) for member in archive}
    for entry in entries:
        key = entry["key"]
        entry["members"] = {
            extension: [*extents[f"{key}.{extension}"], crc]
            for extension, crc in entry["members"].items()
        }
    record = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "size": tar.stat().st_size,
        "sha256": file_sha256(tar),
        "samples": entries,
        **statement,
    }
    data = json_bytes(record, indent=None)
    write_atomically(directory / f"{name}.tar.idx", index_text(record).encode())
    write_atomically(directory / f"{name}.json", data)
    return json.loads(data)


def _write_tar(path: Path, samples: Iterable[Sample]) -> list[dict]:
    """Write the members of samples; returns each sample's entry in the record, with the crc32 of
    its members only."""
    import webdataset

    entries = []
    with naming(path), open(path, "wb") as stream:
        # closed also when a signal ends the run: tarfile would complain at exit about a closed file
        with webdataset.TarWriter(
            stream,
            user="univit",
            group="univit",
            mode=0o644,
            encoder=False,
            mtime=0,
        ) as writer:
            for key, members, info in samples:
                writer.write({"__key__": key, **members})
                entry = {
                    "key": key,
                    "kind": info.kind,
                    "source": info.source,
                    "source_sha256": info.source_sha256[:SHORT_DIGEST],
                    "num_patches": info.num_patches,
                    "num_stored_frames": len(info.frame_times),
                    "grid": list(info.grid),
                    "is_static": info.is_static,
                    "mean_motion": info.mean_motion,
                    "mean_residual": info.mean_residual,
                    "notes": list(info.notes),
                    "members": {name: zlib.crc32(data) for name, data in members.items()},
                }
                entries.append(entry)
        stream.flush()
        os.fsync(stream.fileno())
    return entries


@contextlib.contextmanager
def only_here(lock: Path) -> Iterator[None]:
    """Hold a lock file; another process that asks for it waits. The system frees it if we die, and
    the file goes when the work is over.
    """
    while True:
        stream = open(lock, "w")
        fcntl.flock(stream, fcntl.LOCK_EX)
        # the process that held it before may have removed the file: then the lock is another file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(lock.stat(), os.fstat(stream.fileno())):
                break
        stream.close()
    with stream:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def index_text(record: dict) -> str:
    """Text of the .tar.idx file that belongs to a shard's record."""
    lines = [f"v1.2 {len(record['samples'])}"]
    for sample in record["samples"]:
        cells = [
            f"{extension} {offset} {size} {sample['key']}.{extension}"
            for extension, (offset, size, _) in sorted(sample["members"].items())
        ]
        lines.append(" ".join(cells))
    return "\n".join(lines) + "\n"
