"""One task -> one shard, safe against being killed at any moment.

    video-000003.tar        the samples, GNU tar in webdataset naming
    video-000003.tar.idx    offsets for tools that want them (DALI's v1.2 text form); derived, never
                            trusted alone
    video-000003.json       written last: sizes, sha256, crc32 of every member, inputs, rejects, and
                            its own digest

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
from pathlib import Path

from model_factory.files import file_sha256, json_bytes, naming, write_atomically

from .schema import SCHEMA_VERSION

# the record first: without it a shard does not exist
SHARD_SUFFIXES = (".json", ".tar.idx", ".tar")
SHORT_DIGEST = 16  # hex digits of a source's sha256 in the record: enough to find duplicates


def write_shard(directory: Path, name: str, samples, statement: dict) -> dict:
    """Write samples (an iterable of (key, members, info)) and return the shard's record,
    also stored as NAME.json.

    `statement` is what the record says of its making (settings, inputs, rejected inputs). It may
    grow while the samples are drawn: it is read when the last one is written.
    """
    tar_path = directory / f"{name}.tar"
    temporary = directory / f".{name}.tar.tmp"
    try:
        entries = _write_tar(temporary, samples)
        os.replace(temporary, tar_path)
    except BaseException:
        # half a shard is of no use, and takes the room that others may need
        temporary.unlink(missing_ok=True)
        raise
    places = _member_places(tar_path)
    record = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "size": tar_path.stat().st_size,
        "sha256": file_sha256(tar_path),
        "samples": [
            {
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
                "members": {ext: [*places[f"{key}.{ext}"], crc] for ext, crc in checksums.items()},
            }
            for key, checksums, info in entries
        ],
        **statement,
    }
    data = json_bytes(record, indent=None)
    write_atomically(directory / f"{name}.tar.idx", index_text(record).encode())
    write_atomically(directory / f"{name}.json", data)
    return json.loads(data)


def _write_tar(path: Path, samples) -> list[tuple]:
    """Write the members of samples; returns (key, crc32 by extension, info) of each."""
    import webdataset

    entries = []
    with naming(path), open(path, "wb") as stream:
        # closed also when a signal ends the run: tarfile would complain at exit about a closed file
        with webdataset.TarWriter(
            stream, user="univit", group="univit", mode=0o644, encoder=False, mtime=0
        ) as writer:
            for key, members, info in samples:
                writer.write({"__key__": key, **members})
                checksums = {extension: zlib.crc32(data) for extension, data in members.items()}
                entries.append((key, checksums, info))
        stream.flush()
        os.fsync(stream.fileno())
    return entries


@contextlib.contextmanager
def only_here(lock: Path):
    """Hold a lock file; another process that asks for it waits. The system frees it if we die, and
    the file goes when the work is over.
    """
    while True:
        stream = open(lock, "w")
        fcntl.flock(stream, fcntl.LOCK_EX)
        if _is_open_file(lock, stream):
            break
        stream.close()  # whoever held it has removed the file: the lock is another one by now
    with stream:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _is_open_file(path: Path, stream) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _member_places(tar_path: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(tar_path, "r:") as archive:
        return {member.name: (member.offset_data, member.size) for member in archive}


def index_text(record: dict) -> str:
    """Text of the .tar.idx file that belongs to a shard's record."""
    lines = [f"v1.2 {len(record['samples'])}"]
    for sample in record["samples"]:
        cells = (
            f"{ext} {offset} {size} {sample['key']}.{ext}"
            for ext, (offset, size, _) in sorted(sample["members"].items())
        )
        lines.append(" ".join(cells))
    return "\n".join(lines) + "\n"
