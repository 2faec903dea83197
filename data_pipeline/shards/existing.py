"""What a folder holds before a packing starts: the shards of an earlier one, finished or not.

Only files that the packer itself wrote count: manifest.json, and NAME.tar, NAME.tar.idx, NAME.json
of shards with a name of ours. Whatever else lies in the folder is neither read nor removed.
"""

import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataPipelineError
from .known_inputs import known_inputs
from .manifest import MANIFEST_NAME
from .tasks import shard_number

SHARD_NAME = re.compile(r"[A-Za-z0-9_]+-\d{6,}")  # no separator: a manifest names files beside it
SUFFIXES = (".json", ".tar.idx", ".tar")  # the record first: without it a shard does not exist


@dataclass(frozen=True)
class Existing:
    """Shards of a folder. `bound` holds the manifest's entries in their order, `records` what every
    readable record says of inputs and settings, by shard name, `settings` what the manifest, or
    else the first record, states. `loose` holds names of tars that have neither.
    """

    directory: Path
    settings: dict
    bound: tuple[dict, ...]
    records: dict[str, dict]
    loose: tuple[str, ...]

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
    records = {}
    for path in sorted(directory.glob("*.json")):
        record = read_shard_record(path)
        if record is not None:
            records[path.stem] = _slim(record)
    manifest = _read_object(directory / MANIFEST_NAME)
    bound: tuple[dict, ...] = ()
    if manifest is not None:
        bound = _entries(manifest, directory)
    elif (directory / MANIFEST_NAME).exists() and not records:
        raise _foreign_manifest(directory)
    first = min(records, key=shard_number, default=None)
    stated = manifest if manifest is not None else records.get(first, {})
    settings = stated.get("settings", {})
    known = records.keys() | {entry["name"] for entry in bound}
    tars = [path.stem for path in sorted(directory.glob("*.tar"))]
    return Existing(
        directory=directory,
        settings=settings if isinstance(settings, dict) else {},
        bound=bound,
        records=records,
        loose=tuple(name for name in tars if SHARD_NAME.fullmatch(name) and name not in known),
    )


def read_shard_record(path: Path) -> dict | None:
    """A shard's record; None for a file that is absent, damaged, or no record of ours."""
    if not SHARD_NAME.fullmatch(path.stem):
        return None
    record = _read_object(path)
    try:
        if record is None or record["name"] != path.stem:
            return None
        known_inputs(record)
        complete = (
            type(record["size"]) is int
            and isinstance(record["settings"], dict)
            and isinstance(record["samples"], list)
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    return record if complete else None


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
        for suffix in SUFFIXES:
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
                    sources.append(json.loads(stream.read())["source"])
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


def _read_object(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _entries(manifest: dict, directory: Path) -> tuple[dict, ...]:
    try:
        entries = tuple(manifest["shards"])
        counts = [entry["num_samples"] + entry["num_rejected"] for entry in entries]
        ours = all(SHARD_NAME.fullmatch(entry["name"]) for entry in entries)
    except (KeyError, TypeError) as error:
        raise _foreign_manifest(directory) from error
    if not ours or not all(type(count) is int and count >= 0 for count in counts):
        raise _foreign_manifest(directory)
    return entries


def _foreign_manifest(directory: Path) -> DataPipelineError:
    return DataPipelineError(
        f"{directory / MANIFEST_NAME} is not a packing's, or is damaged, and would be overwritten: "
        "name another --output, or move that file away"
    )
