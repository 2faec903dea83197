"""What a folder holds before a packing starts: the shards of an earlier one, finished or not.

Only files that the packer itself wrote count: manifest.json, and NAME.tar, NAME.tar.idx, NAME.json
of shards with a name of ours. Whatever else lies in the folder is neither read nor removed.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model_factory.files import (
    DIGEST_KEY,
    DamagedFile,
    check_fields,
    open_seal,
    parse_json,
)

from ..errors import DataPipelineError
from .known_inputs import known_inputs
from .manifest import MANIFEST_FIELDS, MANIFEST_NAME, RECORD_FIELDS, parse_manifest
from .schema import MAX_INFO_BYTES
from .tasks import shard_number
from .writer import SHARD_SUFFIXES

SHARD_NAME = re.compile(r"[A-Za-z0-9_]+-\d{6,}")  # no separator: a manifest names files beside it
# what a record of before held, which has no digest; those of long ago lack `inputs`
UNSEALED_KEYS = frozenset({"schema_version", "inputs_sha256", "inputs", *RECORD_FIELDS})


@dataclass(frozen=True)
class Existing:
    """Shards of a folder. `bound` holds the manifest's entries in their order, `records` what every
    readable record says of inputs and settings, by shard name, `settings` what the manifest, or
    else the first record, states. `loose` holds names of tars that have neither.

    `damaged` holds bound shards whose record has no digest and is not the one that the manifest
    binds: it counts as none. `damage` says what is wrong with a manifest that counts as none.
    """

    directory: Path
    settings: dict
    bound: tuple[dict, ...]
    records: dict[str, dict]
    loose: tuple[str, ...]
    damaged: frozenset[str]
    damage: str | None

    @property
    def unbound(self) -> list[str]:
        """Names of finished shards that the manifest does not name, by number."""
        bound = {entry["name"] for entry in self.bound}
        return sorted(self.records.keys() - bound, key=shard_number)

    @property
    def names(self) -> list[str]:
        """Names of all shards."""
        return [entry["name"] for entry in self.bound] + self.unbound

    def is_whole(self, name: str) -> bool:
        """Whether the tar of a recorded shard has its size."""
        tar = self.directory / f"{name}.tar"
        return tar.is_file() and tar.stat().st_size == self.records[name]["size"]


def read_existing(directory: Path) -> Existing:
    """Shards that lie in a folder.

    Raises DataPipelineError where manifest.json is there and is not one of ours.
    """
    manifest, damage = _readable_manifest(directory)
    entries = () if manifest is None else _entries(manifest, directory)
    hashes = {entry["name"]: entry["record_sha256"] for entry in entries}
    records = {}
    damaged = set()
    for path in sorted(directory.glob("*.json")):
        record = read_shard_record(path)
        if record is None:
            continue
        if DIGEST_KEY in record or _is_bound(path, hashes):
            records[path.stem] = _slim(record)
        else:
            damaged.add(path.stem)
    if damage is not None and not records:
        raise _foreign_manifest(directory)
    first = min(records, key=shard_number, default=None)
    stated = manifest if manifest is not None else records.get(first, {})
    known = records.keys() | hashes.keys()
    tars = [path.stem for path in sorted(directory.glob("*.tar"))]
    return Existing(
        directory=directory,
        settings=stated.get("settings", {}),
        bound=entries,
        records=records,
        loose=tuple(name for name in tars if SHARD_NAME.fullmatch(name) and name not in known),
        damaged=frozenset(damaged),
        damage=damage,
    )


def _is_bound(path: Path, hashes: Mapping[str, str]) -> bool:
    """Whether a record is the one that the manifest binds, or the manifest names none."""
    bound = hashes.get(path.stem)
    return bound is None or hashlib.sha256(path.read_bytes()).hexdigest() == bound


def read_shard_record(path: Path) -> dict | None:
    """A shard's record, with its digest where it has one; None for a file that is absent, damaged,
    or no record of ours."""
    if not SHARD_NAME.fullmatch(path.stem):
        return None
    try:
        data = path.read_bytes()
        record = parse_json(data, str(path))
        if not record.keys() <= UNSEALED_KEYS:
            open_seal(record, data=data, name=str(path))
        check_fields(record, fields=RECORD_FIELDS, name=str(path))
        known_inputs(record)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    return record if record["name"] == path.stem else None


def remove_packing(existing: Existing) -> None:
    """Remove all shards of a folder, and the manifest first, which so never names one that is gone.

    A removal that is killed leaves shards without a manifest, as a packing that is killed does.
    """
    (existing.directory / MANIFEST_NAME).unlink(missing_ok=True)
    remove_shards(existing.directory, existing.names)
    tars = {name: existing.directory / f"{name}.tar" for name in existing.loose}
    remove_shards(
        existing.directory, [n for n, tar in tars.items() if tar_sources(tar) is not None]
    )


def remove_shards(directory: Path, names: Iterable[str]) -> None:
    """Remove the files of shards that no manifest names."""
    for name in names:
        for suffix in SHARD_SUFFIXES:
            (directory / f"{name}{suffix}").unlink(missing_ok=True)
        remove_temporary(directory, name)


def remove_temporary(directory: Path, name: str) -> None:
    """Remove what a run that was killed while it wrote this shard has left."""
    for stale in directory.glob(f".{name}.*tmp"):
        stale.unlink(missing_ok=True)


def tar_sources(path: Path) -> list[str] | None:
    """Names of the inputs whose samples lie in a tar that has no record; None for a tar that the
    packer did not write, or that is damaged.
    """
    sources = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if re.fullmatch(r"\d{6,}_\d{6,}\.json", member.name) and member.isreg():
                    stream = archive.extractfile(member)
                    assert stream is not None  # a regular file has one
                    info = stream.read(MAX_INFO_BYTES + 1)
                    values = parse_json(info, member.name, max_bytes=MAX_INFO_BYTES)
                    sources.append(values["source"])
                elif not re.fullmatch(r"\d{6,}_\d{6,}\.[a-z.]+", member.name):
                    return None
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError):
        return None
    return sources


def _slim(record: dict) -> dict:
    """A record without the places of its members, which are most of it: a folder has thousands."""
    kept = ("key", "source", "source_sha256")
    samples = [{name: sample.get(name) for name in kept} for sample in record["samples"]]
    return {**record, "samples": [] if "inputs" in record else samples}


def _readable_manifest(directory: Path) -> tuple[dict | None, str | None]:
    """(the manifest, what is wrong with it); (None, None) where there is none."""
    path = directory / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, None
    try:
        return parse_manifest(data, str(path)), None
    except DamagedFile as error:
        if not _looks_ours(data):
            raise _foreign_manifest(directory) from error
        return None, str(error)


def _looks_ours(data: bytes) -> bool:
    """Whether a damaged manifest is one of ours: it is no JSON any more, or has most keys."""
    try:
        content = parse_json(data, MANIFEST_NAME)
    except DamagedFile:
        return True
    return len(MANIFEST_FIELDS.keys() & content.keys()) >= len(MANIFEST_FIELDS) - 1


def _entries(manifest: dict, directory: Path) -> tuple[dict, ...]:
    entries = tuple(manifest["shards"])
    counts = [entry["num_samples"] + entry["num_rejected"] for entry in entries]
    ours = all(SHARD_NAME.fullmatch(entry["name"]) for entry in entries)
    if not ours or any(count < 0 for count in counts):
        raise _foreign_manifest(directory)
    return entries


def _foreign_manifest(directory: Path) -> DataPipelineError:
    return DataPipelineError(
        f"{directory / MANIFEST_NAME} is not a packing's, or is damaged, and would be overwritten: "
        "name another --output, or move that file away"
    )
