"""Where the time of a step goes, by section, without making the device wait.

    with clock.section("forward"): ...

A section is wall time, but sections of DEVICE on CUDA: there it is the time between two events on
the stream, read only when `take` is called. Sections of SHARED need other ranks, so a slow rank
shows in the rest of its step while everybody's sections of SHARED grow. Cost: two clock reads, or
two events.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

DEVICE = ("forward", "loss", "backward", "optimizer")
SHARED = ("agree", "loss", "backward", "optimizer")


class StepClock:
    """Seconds per section since the last `take`."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what happens inside; sections do not nest."""
        if self._cuda and name in DEVICE:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
            return
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """{section: seconds} since the last call, with `total`, the wall time, and `other`, what of
        it no section had."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1e3
        now = time.perf_counter()
        taken = dict(self._seconds)
        taken["other"] = max(0.0, now - self._since - sum(taken.values()))
        taken["total"] = now - self._since
        self._seconds.clear()
        self._events.clear()
        self._since = now
        return taken


def own_seconds(taken: dict[str, float]) -> float:
    """Seconds that a rank spent on its own, without waiting for others."""
    return sum(s for name, s in taken.items() if name not in (*SHARED, "total"))
