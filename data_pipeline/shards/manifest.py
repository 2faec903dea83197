"""manifest.json: the one file that names the shards of a dataset, and binds every byte of them.

    manifest.json   schema version, settings, shards in order with size, sha256 of the tar and of
                    its record; its own digest
    NAME.json       one record per shard (see writer): members with offset, size and crc32

Version 1, of older packings, has no digest and just the other keys. A folder whose records have
none keeps a manifest of version 1 when it is written again: its sha256, to which labels are bound,
must not change.

Sample ids are counted through the shards in manifest order; labels.npy has one row per id. The
manifest's own sha256 names the dataset: labels and training plans are bound to it.
"""

import hashlib
import itertools
import json
import operator
import shlex
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from model_factory.files import (
    DIGEST_KEY,
    DamagedFile,
    check_fields,
    file_sha256,
    is_plain_name,
    json_bytes,
    open_seal,
    parse_json,
    write_atomically,
)

from ..errors import CorruptShard, MissingData

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 2
UNSEALED_VERSION = 1  # the same without a digest
MANIFEST_FIELDS = {
    "schema_version": int,
    "settings": dict,
    "num_samples": int,
    "num_rejected": int,
    "shards": list,
}
ENTRY_FIELDS = {
    "name": str,
    "size": int,
    "sha256": str,
    "num_samples": int,
    "num_rejected": int,
    "record_sha256": str,
}
RECORD_FIELDS = {
    "name": str,
    "size": int,
    "sha256": str,
    "settings": dict,
    "samples": list,
    "rejected": list,
}
MOST_SEARCHED = 10_000  # files of a folder, to find out whether it holds videos: for a message


@dataclass(frozen=True)
class Member:
    """Where the bytes of one member are: shard file, offset, size, crc32."""

    path: Path
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """A packed dataset as its files describe it."""

    directory: Path
    sha256: str
    settings: dict
    shards: tuple[dict, ...]  # records of writer.write_shard, in order
    absent: frozenset[int] = frozenset()  # indices of shards whose bytes are missing

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [num_shards + 1]: first sample id of each shard, then the total."""
        counts = [len(shard["samples"]) for shard in self.shards]
        return np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, sample_id: int) -> tuple[dict, dict]:
        """(shard record, sample record) of a sample id."""
        # "right": a shard's first sample is its own, and shards without samples are passed over
        index = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        shard = self.shards[index]
        return shard, shard["samples"][sample_id - int(self.starts[index])]

    def member(self, sample_id: int, extension: str) -> Member:
        """Where one member is; MissingData names sample and extension when it has none."""
        shard, sample = self.locate(sample_id)
        tar = f"{shard['name']}.tar"
        if extension not in sample["members"]:
            raise MissingData(f"sample {sample['key']} of {tar} has no member .{extension}")
        try:
            # operator.index takes integers alone: int() would take 1.5 and "7" too
            offset, size, crc32 = map(operator.index, sample["members"][extension])
        except (TypeError, ValueError):
            offset = size = crc32 = -1
        if offset < 0 or size < 0 or offset + size > shard["size"]:
            raise CorruptShard(
                f"sample {sample['key']} of {tar}: member .{extension} lies outside of the file by "
                f"its record; {how_to_repack(shard['name'])}"
            )
        return Member(self.directory / tar, offset=offset, size=size, crc32=crc32)

    def sources(self) -> list[str]:
        """Names of the inputs, one per sample id."""
        return [sample["source"] for shard in self.shards for sample in shard["samples"]]

    def rejected_by_reason(self) -> Counter[str]:
        """How many inputs were rejected, by reason code."""
        return Counter(entry["reason"] for shard in self.shards for entry in shard["rejected"])


def how_to_repack(shard: str) -> str:
    """What writes one shard anew, also when its own record says that it is as it was written."""
    return (
        f"to pack that shard again, remove {shard}.json and run the `pack` command of its folder "
        "again"
    )


def write_manifest(directory: Path, records: list[dict], settings: dict) -> None:
    """Bind the shards of a folder, in the order given."""
    data = manifest_bytes(directory, records, settings=settings)
    write_atomically(directory / MANIFEST_NAME, data)


def manifest_bytes(directory: Path, records: list[dict], settings: dict) -> bytes:
    """Content of manifest.json for these records."""
    shards = [
        {
            "name": record["name"],
            "size": record["size"],
            "sha256": record["sha256"],
            "num_samples": len(record["samples"]),
            "num_rejected": len(record["rejected"]),
            "record_sha256": file_sha256(directory / f"{record['name']}.json"),
        }
        for record in records
    ]
    content = {
        "schema_version": MANIFEST_VERSION,
        "settings": settings,
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "num_rejected": sum(shard["num_rejected"] for shard in shards),
        "shards": shards,
    }
    # all or none: see the head of this file
    if records and not any(DIGEST_KEY in record for record in records):
        content["schema_version"] = UNSEALED_VERSION
        return json.dumps(content, indent=1, sort_keys=True).encode()
    return json_bytes(content)


def parse_manifest(data: bytes, name: str) -> dict:
    """The object in manifest.json, every field of its type. DamagedFile for a changed byte, another
    version, and shards whose names lead elsewhere."""
    content = parse_json(data, name)
    version = content.get("schema_version")
    # a manifest with a digest never passes for one without, whichever byte of it changed
    if version != UNSEALED_VERSION or content.keys() != MANIFEST_FIELDS.keys():
        if version != MANIFEST_VERSION and DIGEST_KEY not in content:
            raise DamagedFile(
                f"{name} has schema version {version!r}, this code reads {UNSEALED_VERSION} and "
                f"{MANIFEST_VERSION}"
            )
        content = open_seal(content, data=data, name=name)
    check_fields(content, fields=MANIFEST_FIELDS, name=name)
    for entry in content["shards"]:
        if not isinstance(entry, dict):
            raise DamagedFile(f"{name}: a shard is {entry!r:.80}, not an object")
        check_fields(entry, fields=ENTRY_FIELDS, name=f"{name}: a shard")
        if not is_plain_name(entry["name"]):
            raise DamagedFile(
                f"{name}: the name {entry['name']!r:.80} leads out of the folder, where no shard "
                "of it lies"
            )
    names = [entry["name"] for entry in content["shards"]]
    if len(set(names)) < len(names):
        raise DamagedFile(f"{name} names a shard twice")
    return content


def load_manifest(directory: str | Path, allow_missing: bool = False) -> Manifest:
    """Read a packed folder; every shard must be there with its size, every record with its hash.
    With `allow_missing` shards that are gone are left out; their sample ids stay taken.

    Raises MissingData or CorruptShard listing all that is wrong.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise MissingData(_how_to_pack(directory))
    data = path.read_bytes()
    try:
        content = parse_manifest(data, str(path))
    except DamagedFile as error:
        raise CorruptShard(f"{error}: the same `pack` command writes it anew") from error
    settings = content["settings"]
    if type(settings.get("patch_size")) is not int or settings["patch_size"] < 1:
        raise CorruptShard(f"{path} states no patch size: run its `pack` command with --replace")
    records = []
    absent = set()
    problems = []
    for index, shard in enumerate(content["shards"]):
        tar = directory / f"{shard['name']}.tar"
        size = tar.stat().st_size if tar.is_file() else None
        if allow_missing and not tar.exists():
            absent.add(index)
        elif size != shard["size"]:
            actual = "no file" if size is None else size
            problems.append(f"{tar}: {actual}, the manifest says {shard['size']} bytes")
        # also of a shard that is absent: its samples keep their ids
        try:
            records.append(_bound_record(tar.with_suffix(".json"), shard))
        except (DamagedFile, OSError) as error:
            problems.append(str(error))
    if problems:
        head = f"{len(problems)} files of {directory} are wrong; its `pack` command mends them:"
        raise CorruptShard("\n  ".join([head, *problems]))
    if records and len(absent) == len(records):
        raise MissingData(f"none of the {len(records)} shards that {path} names is there")
    return Manifest(
        directory=directory,
        sha256=hashlib.sha256(data).hexdigest(),
        settings=settings,
        shards=tuple(records),
        absent=frozenset(absent),
    )


def _how_to_pack(directory: Path) -> str:
    """What is wrong with a folder that has no manifest, and the commands that help."""
    from ..codec.open_video import is_image, is_video

    path = directory / MANIFEST_NAME
    if any(directory.glob("video-*.json")):
        return (
            f"{path} does not exist, {directory} holds shards of a packing that was stopped: run "
            "its `python -m data_pipeline pack` command again, it goes on"
        )
    folder = shlex.quote(str(directory))
    files = itertools.islice(directory.rglob("*"), MOST_SEARCHED)
    if not any(is_video(file) or is_image(file) for file in files):
        return (
            f"{path} does not exist: make it with `python -m data_pipeline pack INPUT --output "
            f"{folder}`"
        )
    # `.` and `..` have no name of their own to append an ending to
    named = directory.resolve() if directory.name in ("", "..") else directory
    shards = shlex.quote(f"{named}_packed")
    centroids = shlex.quote(f"{named}_packed_centroids")
    return (
        f"{directory} holds videos or images, not shards. Pack, cluster and label them (with "
        "`pack --model NAME` for the encoder that shall learn from them), then name the packed "
        "folder:\n"
        f"  python -m data_pipeline pack {folder} --output {shards}\n"
        f"  python -m data_pipeline cluster {shards} --num-centroids K --output {centroids}\n"
        f"  python -m data_pipeline label {shards} --centroids {centroids}"
    )


def _bound_record(path: Path, shard: dict) -> dict:
    """A shard's record, by the hash that the manifest has of its bytes."""
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != shard["record_sha256"]:
        raise DamagedFile(f"{path}: missing or not the record that the manifest binds")
    record = parse_json(data, str(path))
    check_fields(record, fields=RECORD_FIELDS, name=str(path))
    # a record may state another name or size than the manifest: files are found by these
    for key in ("name", "size"):
        if record[key] != shard[key]:
            raise DamagedFile(
                f"{path}: {key} is {record[key]!r:.80}, the manifest says {shard[key]!r}"
            )
    # sample ids are counted by them
    if not all(isinstance(sample, dict) for sample in record["samples"]):
        raise DamagedFile(f"{path}: a sample is not an object")
    return record
