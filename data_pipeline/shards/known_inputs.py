"""What a shard's record states about its inputs, whether a file on disk is still that input, and
how a packing that is asked for differs from the one in a folder.

A record lists its inputs in order as [source, stamp, digest]: the stamp is found without reading
(inputs.input_stamp), the digest is the start of the sha256 of the bytes. Equal stamps are trusted.
Where they differ, bytes decide: a data set that was copied without its modification times is the
same data set. Records from before that list name their inputs only by samples and rejected inputs.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from model_factory.files import file_sha256

from ..errors import DataPipelineError
from .inputs import Input, input_stamp, inputs_sha256
from .writer import SHORT_DIGEST


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
    by_index = {int(sample["key"].split("_")[1]): sample for sample in record["samples"]}
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
