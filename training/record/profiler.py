"""A trace of a few steps for chrome://tracing or Perfetto: OUTPUT/trace.json, written by rank 0.

The first WARMUP steps are left out: they compile, allocate and fill queues.
"""

from pathlib import Path

import torch

from ..distributed import Ranks

WARMUP = 3


class Profiler:
    """A context manager that records `steps` steps; 0 costs nothing."""

    def __init__(self, output: Path, steps: int, ranks: Ranks):
        self._profile = None
        if steps and ranks.is_main:
            schedule = torch.profiler.schedule(wait=WARMUP - 1, warmup=1, active=steps, repeat=1)
            self._profile = torch.profiler.profile(
                schedule=schedule,
                on_trace_ready=lambda done: done.export_chrome_trace(str(output / "trace.json")),
            )

    def __enter__(self) -> "Profiler":
        if self._profile is not None:
            self._profile.start()
        return self

    def step(self) -> None:
        """Tell that a step is over."""
        if self._profile is not None:
            self._profile.step()

    def __exit__(self, *_) -> None:
        if self._profile is not None:
            self._profile.stop()
