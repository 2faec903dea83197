"""What a folder holds before a packing starts: the shards of an earlier one, finished or not.

Only files that the packer itself wrote count: manifest.json, and NAME.tar, NAME.tar.idx, NAME.json
of shards with a name of ours. Whatever else lies in the folder is neither read nor removed.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable
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
MEMBER_NAME = re.compile(r"\d{6,}_\d{6,}\.[a-z.]+")
# fields of records that were written before they had a digest; the oldest lack `inputs`
UNSEALED_KEYS = frozenset({"schema_version", "inputs_sha256", "inputs", *RECORD_FIELDS})


@dataclass(frozen=True)
class Existing:
    """Shards of a folder.

    settings   as the manifest, or else the first record, states them
    bound      the manifest's entries in their order
    records    by shard name, what every readable record states about inputs and settings
    loose      names of tars that have neither
    damaged    bound shards whose record has no digest and is not the one that the manifest binds:
               it counts as none
    damage     what is wrong with a manifest that counts as none
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


def read_existing(directory: Path) -> Existing:
    """Shards that lie in a folder.

    Raises DataPipelineError where manifest.json is there and is not one of ours.
    """
    manifest, damage = _readable_manifest(directory)
    bound = {} if manifest is None else {entry["name"]: entry for entry in manifest["shards"]}
    records = {}
    damaged = set()
    for path in sorted(directory.glob("*.json")):
        record = read_shard_record(path)
        if record is None:
            continue
        name = path.stem
        if DIGEST_KEY not in record and name in bound:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            if sha256 != bound[name]["record_sha256"]:
                damaged.add(name)
                continue
        # a folder may have thousands of records, and the positions of members are most of each
        samples = []
        if "inputs" not in record:
            fields = ("key", "source", "source_sha256")
            samples = [{key: sample.get(key) for key in fields} for sample in record["samples"]]
        records[name] = {**record, "samples": samples}
    # a damaged manifest can be written anew only from records
    if damage is not None and not records:
        raise _foreign_manifest(directory)
    stated = manifest
    if stated is None:
        stated = records[min(records, key=shard_number)] if records else {}
    loose = []
    for path in sorted(directory.glob("*.tar")):
        name = path.stem
        if SHARD_NAME.fullmatch(name) and name not in records and name not in bound:
            loose.append(name)
    return Existing(
        directory=directory,
        settings=stated.get("settings", {}),
        bound=tuple(bound.values()),
        records=records,
        loose=tuple(loose),
        damaged=frozenset(damaged),
        damage=damage,
    )


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
    # any JSON may lie in a folder: what does not read as a record is none
    except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    return record if record["name"] == path.stem else None


def remove_packing(existing: Existing) -> None:
    """Remove all shards of a folder, and the manifest first, which so never names one that is gone.

    A removal that is killed leaves shards without a manifest, as a packing that is killed does.
    """
    directory = existing.directory
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    remove_shards(directory, existing.names)
    # a tar without a record may be the user's own
    for name in existing.loose:
        if tar_sources(directory / f"{name}.tar") is not None:
            remove_shards(directory, [name])


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
                if not MEMBER_NAME.fullmatch(member.name):
                    return None
                # None for whatever is no file
                stream = archive.extractfile(member)
                if stream is not None and member.name.endswith(".json"):
                    data = stream.read(MAX_INFO_BYTES + 1)
                    info = parse_json(data, name=member.name, max_bytes=MAX_INFO_BYTES)
                    sources.append(info["source"])
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError):
        return None
    return sources


def _readable_manifest(directory: Path) -> tuple[dict | None, str | None]:
    """(the manifest, what is wrong with it); (None, None) where there is none."""
    path = directory / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, None
    try:
        manifest = parse_manifest(data, str(path))
    except DamagedFile as error:
        if not _looks_ours(data):
            raise _foreign_manifest(directory) from error
        return None, str(error)
    # names and counts are acted upon: files are removed by the one, inputs dealt out by the other
    for entry in manifest["shards"]:
        if not SHARD_NAME.fullmatch(entry["name"]):
            raise _foreign_manifest(directory)
        if entry["num_samples"] + entry["num_rejected"] < 0:
            raise _foreign_manifest(directory)
    return manifest, None


def _looks_ours(data: bytes) -> bool:
    """Whether a damaged manifest is one of ours: it is no JSON any more, or has most fields."""
    try:
        content = parse_json(data, MANIFEST_NAME)
    except DamagedFile:
        return True
    return len(MANIFEST_FIELDS.keys() & content.keys()) >= len(MANIFEST_FIELDS) - 1


def _foreign_manifest(directory: Path) -> DataPipelineError:
    return DataPipelineError(
        f"{directory / MANIFEST_NAME} is not a packing's, or is damaged, and would be overwritten: "
        "name another --output, or move that file away"
    )
