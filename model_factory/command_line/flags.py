"""Flags of a command, declared once: as metadata of the dataclass fields that they fill.

    @dataclass(frozen=True)
    class HeadsConfig:
        lrs: tuple[float, ...] = flag("--default_lr_list", default=(1e-4,), help="learning rates")
        epochs: int = flag("--default_epoch", default=10, help="epochs of every head")

    parser = argparse.ArgumentParser()
    add_flags(parser, HeadsConfig)
    config = from_flags(HeadsConfig, parser.parse_args())

The type of a value follows from the annotation of its field, so that a name, a type, a default and
a help text stand in one place. A field whose type is a dataclass stands for the flags of that
class; several fields may share a flag.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_KEY = "flag"  # of the metadata of a field


@dataclass(frozen=True)
class Flag:
    """How one field stands on the command line.

    names    as typed, with dashes; () for `--` and the name of the field
    help     what the value means; a default is appended by the formatter of the parser
    parse    text -> value where the annotation does not determine it (None: by the annotation)
    options  more arguments of `argparse.add_argument`, such as choices or metavar
    """

    names: tuple[str, ...]
    help: str
    parse: Callable[[str], Any] | None
    options: dict[str, Any]


def flag(
    *names: str,
    help: str,
    default: Any = dataclasses.MISSING,
    parse: Callable[[str], Any] | None = None,
    **options: Any,
) -> Any:
    """A dataclass field that a flag fills. Without a default the flag is required."""
    known = Flag(names=names, help=help, parse=parse, options=options)
    return dataclasses.field(default=default, metadata={_KEY: known})


def add_flags(parser: argparse._ActionsContainer, config: type, only_given: bool = False) -> None:
    """Add the flags of `config` and of the dataclasses inside it to a parser or a group.

    only_given: None stands for a flag that is not typed, whatever the default of its field, so
    that the value of a preset can stay. A flag that the parser has already is left as it is.
    """
    for declared in flags_of(config):
        # several fields may share a flag, and argparse refuses a repetition
        if declared.names[0] not in parser._option_string_actions:
            parser.add_argument(*declared.names, **declared.argparse_options(only_given))


def values_of(config: type, args: argparse.Namespace) -> dict[str, Any]:
    """{path of a field, such as `heads.epochs`: value of its flag}, in the order of declaration."""
    values = {}
    for declared in flags_of(config):
        value = getattr(args, declared.destination)
        # argparse collects a list where the field is declared as a tuple
        values[declared.path] = tuple(value) if isinstance(value, list) else value
    return values


def from_flags(config: type, args: argparse.Namespace, **others: Any) -> Any:
    """A `config` of parsed flags; `others` are its fields that have no flag, by name."""
    return _build(config, values_of(config, args), prefix="", others=others)


@dataclass(frozen=True)
class Declared:
    """One flag of a configuration: where its value belongs, and what argparse needs to know."""

    path: str
    names: tuple[str, ...]
    default: Any
    annotation: Any
    flag: Flag

    @property
    def destination(self) -> str:
        """Name of the value among parsed arguments, as argparse derives it."""
        bare = self.names[0].lstrip("-")
        return self.flag.options.get("dest") or bare.replace("-", "_")

    def argparse_options(self, only_given: bool) -> dict[str, Any]:
        """Arguments of `add_argument` beside the names."""
        options: dict[str, Any] = {"help": self.flag.help, **self.flag.options}
        if self.default is dataclasses.MISSING:
            options["required"] = not only_given
        elif not only_given:
            options["default"] = self.default
        kind, is_list = _value_type(self.annotation)
        if kind is bool and self.flag.parse is None:
            # typed means True, absent means False
            if self.default is True:
                raise TypeError(f"{self.path}: this flag can only turn a setting on")
            options["action"] = "store_true"
            options["default"] = None if only_given else False
            return options
        options["type"] = self.flag.parse or kind
        if is_list:
            options.setdefault("nargs", "+")
        return options


def flags_of(config: type, prefix: str = "") -> Iterator[Declared]:
    """The flags of a dataclass and of those inside it."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        annotation = hints[field.name]
        known = field.metadata.get(_KEY)
        if known is not None:
            yield Declared(
                path=prefix + field.name,
                names=known.names or (f"--{field.name}",),
                default=field.default,
                annotation=annotation,
                flag=known,
            )
        elif isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from flags_of(annotation, prefix=f"{prefix}{field.name}.")


def _build(config: type, values: dict[str, Any], prefix: str, others: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(config)
    given = dict(others)
    for field in dataclasses.fields(config):
        path = prefix + field.name
        if path in values:
            given.setdefault(field.name, values[path])
        elif any(known.startswith(f"{path}.") for known in values):
            inner = _build(hints[field.name], values, prefix=f"{path}.", others={})
            given.setdefault(field.name, inner)
    return config(**given)


def _value_type(annotation: Any) -> tuple[Callable[[str], Any], bool]:
    """(type of one value, whether the flag takes several) of `int`, `int | None`,
    `tuple[int, ...]` and the like."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        return _value_type(parts[0])
    if origin in (tuple, list):
        return typing.get_args(annotation)[0], True
    return annotation, False
