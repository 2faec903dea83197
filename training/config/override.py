"""Changes of a configuration by the paths of its fields, checked as a whole.

    draft = Draft(preset("demo"))
    draft.put("optimizer.lr", 0.1)                   a flag's value
    draft.assign("heads.0.loss.margin=0.2")          a --set
    config = draft.build()

Configurations check themselves when they are made. Fields that are valid only together could not be
changed one by one in every order, so configurations are made once, at the end, of all changes.
"""

import copy
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

if typing.TYPE_CHECKING:
    from .schema import TrainConfig


@dataclass
class _Fields:
    """A dataclass taken apart: its class, and its fields, which may be changed."""

    kind: type
    values: dict[str, Any]


class Draft:
    """A configuration under change; the one it starts from stays as it is."""

    def __init__(self, config: "TrainConfig"):
        self._root = _opened(config)
        self._assigned: list[str] = []

    def repeat(self, name: str, count: int) -> None:
        """Let a list be `count` copies of its first item."""
        first = self._root.values[name][0]
        # copies, since each is changed by itself later
        self._root.values[name] = [copy.deepcopy(first) for _ in range(count)]

    def put(self, path: str, value: Any) -> None:
        """Set a field to a value of its type; the last one counts. ValueError for NaN and infinity,
        which comparisons with bounds let pass."""
        _check_finite(value, name=path)
        holder, key, _ = self._find(path, name=path)
        holder[key] = _opened(value)

    def assign(self, assignment: str) -> None:
        """Set "a.b.0.c=value", the value as JSON, else as text; the last one counts.

        ValueError names the nearest known field for an unknown one, a value of another type, and
        two assignments of which one sets a part of the other, since their order would decide.
        """
        name = f"--set {assignment!r}"
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"{name}: write it as field.subfield=value")
        for earlier in self._assigned:
            if earlier.startswith(f"{path}.") or path.startswith(f"{earlier}."):
                raise ValueError(
                    f"{name}: --set {earlier} is about the same values, give one of them"
                )
        self._assigned.append(path)
        holder, key, hint = self._find(path, name)
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError):  # brackets nested too deeply are text, too
            value = text

        field = f"{name}: {path.rpartition('.')[2]}"
        if _has_fields(hint):
            raise ValueError(f"{field} has fields of its own, set those")
        _check_finite(value, name=field)
        try:
            holder[key] = _converted(value, hint)
        except TypeError:
            kind = getattr(hint, "__name__", hint)
            raise ValueError(f"{field} takes {kind}, got {value!r}") from None

    def build(self) -> Any:
        """The configuration; ValueError for values that do not go together."""
        return _closed(self._root)

    def _find(self, path: str, name: str) -> tuple[Any, str | int, Any]:
        """(dict or list that holds a field, its key there, its type hint)."""
        node: Any = self._root
        hint: Any = None
        for part in path.split("."):
            if isinstance(node, list):
                if not part.isdecimal() or int(part) >= len(node):
                    raise ValueError(f"{name}: {part!r} is no index of a list of {len(node)}")
                holder: Any = node
                index = int(part)
                key: str | int = index
                kinds = typing.get_args(hint)
                # tuple[X, ...] has one type for all items, tuple[X, Y] one for each
                hint = kinds[0] if kinds[1:] == (...,) else kinds[index]
            else:
                holder = node.values if isinstance(node, _Fields) else {}
                if part not in holder:
                    near = difflib.get_close_matches(part, holder, n=3) or list(holder)
                    names = ", ".join(near) or "none"
                    raise ValueError(f"{name}: unknown field {part!r}; nearest known: {names}")
                key = part
                hint = typing.get_type_hints(node.kind)[part]
            node = holder[key]
        return holder, key, hint


def override(config: "TrainConfig", assignments: Iterable[str]) -> "TrainConfig":
    """The configuration with all assignments of `--set`, in any order."""
    draft = Draft(config)
    for assignment in assignments:
        draft.assign(assignment)
    return draft.build()


def _opened(value: Any) -> Any:
    """A value whose dataclasses are _Fields and whose tuples are lists."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        opened = {name: _opened(getattr(value, name)) for name in names}
        return _Fields(type(value), opened)
    return [_opened(item) for item in value] if isinstance(value, tuple) else value


def _closed(node: Any) -> Any:
    """The inverse of _opened."""
    if isinstance(node, _Fields):
        closed = {name: _closed(value) for name, value in node.values.items()}
        return node.kind(**closed)
    return tuple(_closed(item) for item in node) if isinstance(node, list) else node


def _check_finite(value: Any, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: {value} is no number to work with")


def _has_fields(hint: Any) -> bool:
    """Whether a value of this type is set by its parts alone: a configuration, or a list of those
    that no row of numbers stands for, such as the heads."""
    if typing.get_origin(hint) is tuple:
        return any(_has_fields(item) and not _is_row(item) for item in typing.get_args(hint))
    return dataclasses.is_dataclass(hint)


def _is_row(kind: type) -> bool:
    """Whether a configuration is written as a list of numbers: one without further ones inside."""
    return all(hint in (int, float) for hint in typing.get_type_hints(kind).values())


def _converted(value: Any, hint: Any) -> Any:
    """A JSON value as a field of this type holds it; TypeError for one of another type."""
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for kind in kinds:  # of `X | None` and the like the first that fits
            try:
                return _converted(value, kind)
            except TypeError:
                continue
    elif typing.get_origin(hint) is tuple and isinstance(value, list):
        if kinds[1:] == (...,):  # tuple[X, ...]: as many X as there are values
            kinds = kinds[:1] * len(value)
        if len(kinds) == len(value):
            return tuple(_converted(item, kind) for item, kind in zip(value, kinds, strict=True))
    elif dataclasses.is_dataclass(hint) and isinstance(value, list):
        return value  # a row of numbers, which the configuration that holds it makes and checks
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:  # the very type: True is an int for isinstance
        return value
    raise TypeError
