"""Named places where a test makes a run fail: FAULT=NAME[@STEP][#RANK]:ACTION, several by commas.

    FAULT=step.optimizer@7#1:kill         SIGKILL on rank 1 before the optimizer of step 7
    FAULT=checkpoint.renamed:term         SIGTERM after any commit
    FAULT=checkpoint.write:disk_full      the write fails as on a full disk
    FAULT=step.begin@5:sleep=3            a slow rank

Nothing is armed without the variable; a place then costs a look into an empty dictionary.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass

ACTIONS = ("kill", "term", "disk_full", "sleep", "nan")
PLACES = (
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
    """What happens at one place; None: at any step, on any rank."""

    action: str
    amount: float
    step: int | None
    rank: int | None


_armed: dict[str, list[Fault]] = {}
_rank = 0


def arm(text: str | None, rank: int) -> None:
    """Read the faults of this process; ValueError names what is wrong."""
    global _rank
    _rank = rank
    _armed.clear()
    for item in (text or "").split(","):
        if item:
            place, fault = _parse(item)
            _armed.setdefault(place, []).append(fault)


def reach(place: str, step: int | None = None) -> bool:
    """Do what is armed here; whether the caller shall spoil its numbers (`nan`)."""
    spoil = False
    for fault in _armed.get(place, ()):
        if fault.step in (None, step) and fault.rank in (None, _rank):
            spoil |= _act(fault)
    return spoil


def _parse(item: str) -> tuple[str, Fault]:
    where, _, what = item.partition(":")
    where, _, rank = where.partition("#")
    place, _, step = where.partition("@")
    action, _, amount = what.partition("=")
    if place not in PLACES or action not in ACTIONS:
        raise ValueError(
            f"FAULT={item}: write PLACE[@STEP][#RANK]:ACTION with a place of {', '.join(PLACES)} "
            f"and an action of {', '.join(ACTIONS)}"
        )
    numbers = (int(part) if part else None for part in (step, rank))
    return place, Fault(action, float(amount or 0), *numbers)


def _act(fault: Fault) -> bool:
    if fault.action == "sleep":
        time.sleep(fault.amount)
    elif fault.action == "disk_full":
        raise OSError(errno.ENOSPC, "No space left on device")
    elif fault.action in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGTERM)
    return fault.action == "nan"
