"""Flags are declared once: parsers and configurations are made of the same dataclass fields."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest

from model_factory.command_line.flags import add_flags, flag, flags_of, from_flags, values_of


@dataclass(frozen=True)
class Heads:
    lrs: tuple[float, ...] = flag("--lr_list", default=(1e-4,), help="learning rates")
    epochs: int = flag("--default-epoch", default=10, help="epochs")
    seed: int = flag("--seed", default=1, help="seed")


@dataclass(frozen=True)
class Probe:
    dataset: str = flag(help="required, under the name of its field")
    cache: Path | None = flag("--cache_dir", default=None, help="folder")
    partial: bool = flag("--allow-partial", default=False, help="report anyway")
    kind: str = flag("--kind", default="a", help="one of two", choices=("a", "b"))
    share: float = flag("--share", default=0.5, help="in percent", parse=lambda s: int(s) / 100)
    seed: int = flag("--seed", default=1, help="seed")
    heads: Heads = Heads()
    extra: int = 3


def parsed(*argv, only_given=False):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, Probe, only_given=only_given)
    return parser.parse_args(argv)


def test_defaults_of_the_fields_are_those_of_the_flags():
    assert from_flags(Probe, parsed("--dataset", "ssv2")) == Probe(dataset="ssv2")


def test_typed_values_reach_their_fields_with_the_types_of_the_annotations():
    config = from_flags(
        Probe,
        parsed(
            *("--dataset", "ssv2", "--cache_dir", "c", "--allow-partial", "--kind", "b"),
            *("--share", "25", "--lr_list", "1", "2e-3", "--default-epoch", "4", "--seed", "7"),
        ),
        extra=9,
    )
    heads = Heads(lrs=(1.0, 2e-3), epochs=4, seed=7)
    assert config == Probe(
        dataset="ssv2",
        cache=Path("c"),
        partial=True,
        kind="b",
        share=0.25,
        seed=7,
        heads=heads,
        extra=9,
    )


@pytest.mark.parametrize(
    "argv", [(), ("--dataset", "a", "--kind", "c"), ("--dataset", "a", "--seed", "x")]
)
def test_a_missing_or_unfit_value_is_refused(argv):
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parsed(*argv)


def test_flags_that_are_not_typed_can_be_told_from_defaults():
    values = values_of(Probe, parsed("--default-epoch", "4", only_given=True))
    assert values.pop("heads.epochs") == 4
    assert set(values.values()) == {None}


def test_every_flag_knows_its_path():
    paths = [declared.path for declared in flags_of(Probe)]
    assert paths[0] == "dataset" and paths[-3:] == ["heads.lrs", "heads.epochs", "heads.seed"]


def test_a_setting_that_is_on_by_default_cannot_be_a_flag_that_turns_it_on():
    @dataclass(frozen=True)
    class Always:
        on: bool = flag("--on", default=True, help="nothing could turn it off")

    with pytest.raises(TypeError, match="on: this flag can only turn a setting on"):
        add_flags(argparse.ArgumentParser(), Always)
