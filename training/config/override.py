"""Changes of a configuration by the paths of its fields, checked as a whole.

    draft = Draft(preset("demo"))
    draft.put("optimizer.lr", 0.1)                   a flag's value
    draft.assign("heads.0.loss.margin=0.2")          a --set
    config = draft.build()

Configurations check themselves when they are made. Fields that are valid only together could not be
changed one by one in every order, so they are made once, at the end, of all that was changed.
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


@dataclass
class _Fields:
    """A dataclass taken apart: its class, and its fields, which may be changed."""

    kind: type
    values: dict


class Draft:
    """A configuration under change; the one it starts from stays as it is."""

    def __init__(self, config):
        self._root = _opened(config)
        self._assigned: list[str] = []

    def repeat(self, name: str, count: int) -> None:
        """Let a list be `count` copies of its first item."""
        first = self._root.values[name][0]
        self._root.values[name] = [copy.deepcopy(first) for _ in range(count)]

    def put(self, path: str, value) -> None:
        """Set a field to a value of its type; the last one counts. ValueError for NaN and infinity,
        which comparisons with bounds let pass."""
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path}: {value} is no number to work with")
        node, key, _ = self._find(path, name=path)
        node[key] = _opened(value)

    def assign(self, assignment: str) -> None:
        """Set "a.b.0.c=value", the value as JSON, else as text; the last one counts.

        ValueError names the nearest known field for an unknown one, a value of another type, and
        two assignments of which one is about a part of the other, since their order would decide.
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
        node, key, hint = self._find(path, name)
        try:
            value = json.loads(text)
        # deep nesting is no text that anyone means
        except (json.JSONDecodeError, RecursionError):
            value = text
        node[key] = _typed(value, hint, f"{name}: {path.rpartition('.')[2]}")

    def build(self):
        """The configuration; ValueError for values that do not go together."""
        return _closed(self._root)

    def _find(self, path: str, name: str) -> tuple[dict | list, str | int, object]:
        """(what holds a field, its key there, its type hint)."""
        node = self._root
        hint = None
        holder: dict | list = {}
        key: str | int = ""
        for part in path.split("."):
            if isinstance(node, list):
                if not part.isdecimal() or int(part) >= len(node):
                    raise ValueError(f"{name}: {part!r} is no index of a list of {len(node)}")
                holder = node
                key = int(part)
                hint = _item_hint(hint, key)
            else:
                known = node.values if isinstance(node, _Fields) else {}
                if part not in known:
                    near = difflib.get_close_matches(part, known, n=3) or list(known)
                    names = ", ".join(near) or "none"
                    raise ValueError(f"{name}: unknown field {part!r}; nearest known: {names}")
                holder = known
                key = part
                hint = typing.get_type_hints(node.kind)[part]
            node = holder[key]
        return holder, key, hint


def override(config, assignments: Iterable[str]):
    """The configuration with all assignments of `--set`, in any order."""
    draft = Draft(config)
    for assignment in assignments:
        draft.assign(assignment)
    return draft.build()


def _opened(value):
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return _Fields(type(value), {name: _opened(getattr(value, name)) for name in names})
    return [_opened(item) for item in value] if isinstance(value, tuple) else value


def _closed(node):
    if isinstance(node, _Fields):
        return node.kind(**{name: _closed(value) for name, value in node.values.items()})
    return tuple(_closed(item) for item in node) if isinstance(node, list) else node


def _item_hint(hint, index: int):
    kinds = typing.get_args(hint)
    return kinds[0] if kinds[1:] == (...,) else kinds[index]


def _typed(value, hint, name: str):
    """The value as its field holds it; ValueError for one of another type."""
    kinds = _alternatives(hint)
    if any(_has_fields(kind) for kind in kinds):
        raise ValueError(f"{name} has fields of its own, set those")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: {value} is no number to work with")
    for kind in kinds:
        fits, converted = _as_kind(value, kind)
        if fits:
            return converted
    raise ValueError(f"{name} takes {getattr(hint, '__name__', hint)}, got {value!r}")


def _alternatives(hint) -> tuple:
    """The types of a union, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _has_fields(kind) -> bool:
    """Whether a value of this type is set by its parts alone: a configuration, or a list of those
    that no row of numbers stands for, such as the heads."""
    items = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
    rows_only = all(_is_row(item) for item in items if dataclasses.is_dataclass(item))
    return dataclasses.is_dataclass(kind) or not rows_only


def _is_row(kind: type) -> bool:
    """Whether a configuration is written as a list of numbers: one without further ones inside."""
    hints = typing.get_type_hints(kind).values()
    return all(hint in (int, float) for hint in hints)


def _as_kind(value, kind) -> tuple[bool, object]:
    """(whether a JSON value is one of this type, the value of this type)."""
    if typing.get_origin(kind) is tuple:
        return _as_tuple(value, kind)
    if kind is type(None):
        return value is None, None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    # True is an int for isinstance
    is_bool = isinstance(value, bool)
    return isinstance(value, kind) and is_bool == (kind is bool), value


def _as_tuple(value, kind) -> tuple[bool, object]:
    """The same of a list; a list of numbers inside of it is a configuration's row, which the
    configuration that holds it makes and checks."""
    kinds = typing.get_args(kind)
    if not isinstance(value, list):
        return False, value
    if kinds[1:] == (...,):
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        return False, value
    items = []
    for item, wanted in zip(value, kinds, strict=True):
        is_row = dataclasses.is_dataclass(wanted)
        fits, converted = (isinstance(item, list), item) if is_row else _as_kind(item, wanted)
        if not fits:
            return False, value
        items.append(converted)
    return True, tuple(items)
