"""What a folder holds before a packing starts: the shards of an earlier one, finished or not.
Whether files on disk are still the inputs of its shards, and how another packing differs from it.

Only files that the packer itself wrote count: manifest.json, and NAME.tar, NAME.tar.idx, NAME.json
of shards with a name of ours. Whatever else lies in the folder is neither read nor removed.

A record lists its inputs in order as [source, stamp, digest]: the stamp is found without reading
(inputs.input_stamp), the digest is the start of the sha256 of the bytes. Equal stamps are trusted.
Where they differ, bytes decide: a data set that was copied without its modification times is the
same data set. Records from before that list name their inputs only by samples and rejected inputs.
"""

import functools
import hashlib
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from model_factory.files import (
    DIGEST_KEY,
    DamagedFile,
    check_fields,
    file_sha256,
    open_seal,
    parse_json,
)

from ..errors import DataPipelineError
from .inputs import Input, input_stamp, inputs_sha256
from .manifest import MANIFEST_FIELDS, MANIFEST_NAME, RECORD_FIELDS, parse_manifest
from .schema import MAX_INFO_BYTES
from .tasks import shard_number
from .writer import SHARD_SUFFIXES, SHORT_DIGEST

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
    entries = [] if manifest is None else manifest["shards"]
    bound = {entry["name"]: entry for entry in entries}
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


@dataclass(frozen=True)
class KnownInput:
    """One input as a record states it. `stamp` is None in older records; `digest` is None where the
    bytes were never read. `rejected` is its entry in the record's list when it made no sample.
    """

    source: str
    stamp: list | None = None
    digest: str | None = None
    rejected: dict | None = None

    def is_now(self, item: Input) -> bool:
        """Whether an input with this source name still has the bytes that were packed."""
        stamp = input_stamp(item)
        if stamp == self.stamp:
            return True
        if item.is_remote or self.digest is None or stamp[0] is None:
            return False
        return _short_sha256(item.location, stamp=tuple(stamp)) == self.digest


def known_inputs(record: dict) -> list[KnownInput]:
    """The inputs of a shard in the order in which they were packed.

    Raises KeyError, IndexError, TypeError or ValueError for what is no record of ours.
    """
    if "inputs" in record:
        rejected = {entry["source"]: entry for entry in record["rejected"]}
        return [
            KnownInput(source, stamp=stamp, digest=digest, rejected=rejected.get(source))
            for source, stamp, digest in record["inputs"]
        ]
    # a key's last digits are the index among the inputs; rejected ones fill the gaps, in order
    by_index = {}
    for sample in record["samples"]:
        index = int(sample["key"].split("_")[1])
        by_index[index] = sample
    rejections = list(record["rejected"])
    known = []
    for index in range(len(record["samples"]) + len(record["rejected"])):
        sample = by_index.get(index)
        if sample is None:
            entry = rejections.pop(0)
            known.append(KnownInput(entry["source"], rejected=entry))
        else:
            known.append(KnownInput(sample["source"], digest=sample.get("source_sha256") or None))
    return known


def rejected_digest(item: Input, max_bytes: int) -> str | None:
    """Digest of an input that made no sample; None for what is remote, gone, or larger than an
    input may be.
    """
    path = Path(item.location)
    if item.is_remote or not path.is_file() or path.stat().st_size > max_bytes:
        return None
    try:
        return _short_sha256(item.location, stamp=tuple(input_stamp(item)))
    except OSError:  # no right to read it, or gone by now
        return None


@functools.lru_cache(maxsize=1 << 16)
def _short_sha256(location: str, stamp: tuple) -> str:
    """Digest of a file, computed once for each of its stamps: one that changes while we run has
    another stamp, and is read again."""
    return file_sha256(Path(location))[:SHORT_DIGEST]


@dataclass
class Differences:
    """How what is asked for differs from what a folder holds, as sentences and source names."""

    settings: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)  # rejected ones, whose file is another by now
    moved: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def compare(self, record: dict, pairs: list[tuple[KnownInput, Input]]) -> None:
        """Add the inputs of a shard that are no longer what was packed or rejected."""
        # a record without `inputs` has one hash over names and stamps of all
        items = [item for _, item in pairs]
        if "inputs" not in record and record.get("inputs_sha256") == inputs_sha256(items):
            return
        for known, item in pairs:
            if not known.is_now(item):
                names = self.changed if known.rejected is None else self.mended
                names.append(known.source)

    def lines(self) -> list[str]:
        """One line for each kind of difference."""
        # another order follows from any of the other three
        moved = [] if self.settings or self.new or self.gone else self.moved
        kinds = {
            "new": self.new,
            "gone": self.gone,
            "changed, or another file of the same name": self.changed,
            "another file than the one that was rejected": self.mended,
            "packed in another order": moved,
        }
        lines = list(self.settings)
        for kind, names in kinds.items():
            if len(names) > 1:
                lines.append(f"{len(names)} inputs are {kind}: {names[0]} first")
            elif names:
                lines.append(f"1 input is {kind}: {names[0]}")
        return lines


def setting_differences(there: dict, asked: dict, prefix: str = "") -> list[str]:
    """One sentence for each setting that differs, with both values."""
    lines = []
    for name in sorted(there.keys() | asked.keys()):
        old = there.get(name)
        new = asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += setting_differences(old, new, prefix=f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name} is {old!r} there, {new!r} is asked for")
    return lines


def refusal(directory: Path, differences: Differences, what: str) -> DataPipelineError:
    """The error that lists the differences and names the ways to go on."""
    appending = "--append packs the new inputs behind the old ones"
    if differences.settings:
        appending = "--append needs equal settings"
    elif differences.changed or differences.moved:
        appending = "--append takes new inputs only"
    lines = [f"{directory} {what}; nothing was changed:", *differences.lines()]
    return DataPipelineError(
        "\n  ".join(lines)
        + f"\n{appending}; --replace removes the old shards and packs all anew; or name another "
        "--output"
    )
