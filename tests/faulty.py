#!/usr/bin/env python
"""Makes a training fail at named points, from outside: FAULT=POINT[@STEP][#RANK]:ACTION, several
by commas.

    FAULT=step.optimizer@7#1:kill         SIGKILL on rank 1 before the optimizer of step 7
    FAULT=checkpoint.renamed:term         SIGTERM after any commit
    FAULT=checkpoint.write:disk_full      the write fails as on a full disk
    FAULT=step.begin@5:sleep=3            a slow rank

    FAULT=... python tests/faulty.py -m training.train_univit ...
    FAULT=... torchrun --standalone --nproc_per_node 2 tests/faulty.py -m training.train_univit ...
    FAULT=... PYTHON_EXEC=tests/faulty.py bash shells/train_multi_node.sh ...

A point is a function or method of the product that gets a wrapper; the product knows of none of
them. Without the variable the command runs as it is. In a test's own process: `armed(text)`.
"""

import contextlib
import errno
import functools
import inspect
import os
import runpy
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ACTIONS = ("kill", "term", "disk_full", "sleep", "nan")
POINTS = (
    "prepare",
    "step.begin",
    "step.backward",
    "step.optimizer",
    "step.end",
    "checkpoint.stage",
    "checkpoint.write",
    "checkpoint.manifest",
    "checkpoint.rename",
    "checkpoint.renamed",
    "checkpoint.prune",
    "rounds.cluster",
    "export",
)


@dataclass(frozen=True)
class Fault:
    """What happens at one point; None: at any step, on any rank."""

    point: str
    action: str
    amount: float
    step: int | None
    rank: int | None


def parse(text: str) -> list[Fault]:
    """The faults of FAULT; ValueError names what is wrong."""
    return [_parse_one(item) for item in text.split(",") if item]


def _parse_one(item: str) -> Fault:
    where, _, what = item.partition(":")
    where, _, rank = where.partition("#")
    point, _, step = where.partition("@")
    action, _, amount = what.partition("=")
    if point not in POINTS or action not in ACTIONS:
        raise ValueError(
            f"FAULT={item}: write POINT[@STEP][#RANK]:ACTION with a point of {', '.join(POINTS)} "
            f"and an action of {', '.join(ACTIONS)}"
        )
    return Fault(
        point=point,
        action=action,
        amount=float(amount or 0),
        step=int(step) if step else None,
        rank=int(rank) if rank else None,
    )


def reach(point: str, step: int | None = None) -> bool:
    """Do what is armed at a point; whether the numbers there are to be spoilt (`nan`).

    The variable is read anew, so that a script that takes it out of its environment disarms itself.
    """
    spoil = False
    for fault in parse(os.environ.get("FAULT", "")):
        here = fault.rank in (None, int(os.environ.get("RANK", 0)))
        if fault.point == point and fault.step in (None, step) and here:
            spoil |= _act(fault)
    return spoil


def _act(fault: Fault) -> bool:
    if fault.action == "sleep":
        time.sleep(fault.amount)
    elif fault.action == "disk_full":
        raise OSError(errno.ENOSPC, "No space left on device")
    elif fault.action in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGTERM)
    return fault.action == "nan"


class Wrappers:
    """Wrappers around functions and methods, which can be taken off again."""

    def __init__(self):
        self._originals: list[tuple[object, str, object]] = []

    def wrap(self, owner: object, name: str, wrapper: Callable) -> None:
        """Let `owner.name(...)` be `wrapper(original, arguments)`, arguments by their names."""
        original = getattr(owner, name)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            return wrapper(lambda: original(*args, **kwargs), bound.arguments)

        self._originals.append((owner, name, original))
        setattr(owner, name, wrapped)

    def before(self, owner: object, name: str, act: Callable) -> None:
        """Call act(arguments) before `owner.name(...)`."""

        def wrapper(original, arguments):
            act(arguments)
            return original()

        self.wrap(owner, name, wrapper)

    def after(self, owner: object, name: str, act: Callable) -> None:
        """Call act(arguments) after `owner.name(...)` has returned."""

        def wrapper(original, arguments):
            result = original()
            act(arguments)
            return result

        self.wrap(owner, name, wrapper)

    def take_off(self) -> None:
        """Put the originals back."""
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()


def install() -> Wrappers:
    """Wrap the points of this process's training."""
    from data_pipeline import datasets
    from training import rounds, train_step, trainer
    from training.checkpoint import checkpointer, files, folder

    step, saved = {}, {}  # numbers of the running step, and of the one that is being saved
    wrappers = Wrappers()

    def begin(arguments) -> None:
        step["number"] = arguments["step"] + 1
        reach("step.begin", step["number"])

    def objective(original, arguments):
        value = original()
        return value * float("nan") if reach("step.backward", step["number"]) else value

    wrappers.before(datasets, "prepare_embedded", lambda _: reach("prepare"))
    wrappers.before(train_step.TrainStep, "run", begin)
    wrappers.wrap(train_step.TrainStep, "_objective", objective)
    optimizer = lambda _: reach("step.optimizer", step["number"])  # noqa: E731
    wrappers.before(train_step, "clip_gradients", optimizer)
    end = lambda arguments: reach("step.end", arguments["self"].step)  # noqa: E731
    wrappers.after(trainer.Trainer, "_end_step", end)
    wrappers.before(trainer.Trainer, "_export", lambda a: reach("export", a["self"].step))
    wrappers.before(rounds, "recluster", lambda _: reach("rounds.cluster"))

    def note_save(arguments) -> None:
        saved["number"] = arguments["step"]

    def at_save(point: str) -> Callable:
        return lambda _: reach(point, saved["number"])

    def prune(original, arguments):
        def rmtree(path, *args, **kwargs):
            reach("checkpoint.prune", int(path.name.partition("_")[2].partition(".")[0]))
            shutil.rmtree(path, *args, **kwargs)

        # a commit is renamed before it is removed, and this is between the two
        folder.shutil = types.SimpleNamespace(**{**vars(shutil), "rmtree": rmtree})
        try:
            return original()
        finally:
            folder.shutil = shutil

    saver = checkpointer.Checkpointer
    wrappers.before(saver, "_stage", lambda a: reach("checkpoint.stage", a["step"]))
    wrappers.before(saver, "_write", note_save)
    wrappers.before(files._Writer, "write_data", at_save("checkpoint.write"))
    wrappers.before(checkpointer, "write_manifest", at_save("checkpoint.manifest"))
    wrappers.before(folder.CheckpointFolder, "commit", at_save("checkpoint.rename"))
    wrappers.after(folder.CheckpointFolder, "commit", at_save("checkpoint.renamed"))
    wrappers.wrap(folder.CheckpointFolder, "prune", prune)
    return wrappers


@contextlib.contextmanager
def armed(text: str) -> Iterator[None]:
    """While inside, trainings of this process have these faults."""
    parse(text)
    os.environ["FAULT"] = text
    wrappers = install()
    try:
        yield
    finally:
        wrappers.take_off()
        del os.environ["FAULT"]


def main() -> None:
    """Run `-m MODULE ARGUMENTS` or `FILE ARGUMENTS`, with the faults of the environment."""
    words = [word for word in sys.argv[1:] if word != "-u"]  # torchrun asks for it
    sys.path[0] = str(ROOT)
    if os.environ.get("FAULT"):
        parse(os.environ["FAULT"])
        install()
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
