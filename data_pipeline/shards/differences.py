"""How a packing that is asked for differs from the one in a folder, and the error that says so."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from ..errors import DataPipelineError
from .inputs import Input, inputs_sha256
from .known_inputs import KnownInput


@dataclass
class Differences:
    """How what is asked for differs from what a folder holds, as sentences and source names."""

    settings: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, kind.name) for kind in fields(self))

    def compare(self, record: dict, pairs: list[tuple[KnownInput, Input]]) -> None:
        """Add the inputs of a shard that are no longer what was packed or rejected."""
        if "inputs" not in record:  # an older record has one hash over names and stamps of all
            items = [item for _, item in pairs]
            if record.get("inputs_sha256") == inputs_sha256(items):
                return
        for known, item in pairs:
            if not known.is_now(item):
                names = self.changed if known.rejected is None else self.mended
                names.append(known.source)

    def lines(self) -> list[str]:
        """One line for each kind of difference."""
        moved = [] if self.settings or self.new or self.gone else self.moved  # which follows
        kinds = {
            "new": self.new,
            "gone": self.gone,
            "changed, or another file of the same name": self.changed,
            "another file than the one that was rejected": self.mended,
            "packed in another order": moved,
        }
        counted = [
            f"{len(names)} {'inputs are' if len(names) > 1 else 'input is'} {kind}: {names[0]}"
            + (" first" if len(names) > 1 else "")
            for kind, names in kinds.items()
            if names
        ]
        return self.settings + counted


def setting_differences(there: dict, asked: dict, prefix: str = "") -> list[str]:
    """One sentence for each setting that differs, with both values."""
    lines = []
    for name in sorted(there.keys() | asked.keys()):
        old = there.get(name)
        new = asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += setting_differences(old, new, f"{prefix}{name}.")
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
    ways = f"{appending}; --replace removes the old shards and packs all anew; or name another"
    lines = [f"{directory} {what}; nothing was changed:", *differences.lines()]
    return DataPipelineError("\n  ".join(lines) + f"\n{ways} --output")
