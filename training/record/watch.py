"""What a team wants to be told while a run goes on: a rank that is slower than the others, a loss
that jumps.

Both only warn. Cost: one gather of a few numbers per log line, on the host.
"""

import logging
import statistics
from collections import deque

from ..distributed import all_gather_json
from .step_clock import own_seconds

SLOW = 1.5  # times the median of all ranks
SLOW_S = 0.02  # and at least so many seconds a step more: less is noise
WINDOW = 200  # losses that a jump is judged by
SPIKE = 10.0  # times their median absolute deviation


def compare_ranks(taken: dict[str, float], steps: int, logger: logging.Logger) -> list[float]:
    """Seconds of a step that each rank spent on its own, in rank order; ranks far above the median
    are named. Called by all ranks with what their clocks took over `steps` steps."""
    mine = {name: seconds / max(steps, 1) for name, seconds in taken.items()}
    ranks = all_gather_json(mine)
    own = [own_seconds(rank) for rank in ranks]
    middle = statistics.median_low(own)
    for number, seconds in enumerate(own):
        if seconds > SLOW * middle and seconds > middle + SLOW_S:
            parts = sorted(ranks[number].items(), key=lambda part: -part[1])
            shown = ", ".join(f"{name} {s:.3f} s" for name, s in parts if name != "total")
            logger.warning(
                "rank %d is slow: %.3f s a step on its own, the median rank %.3f s (%s)",
                number,
                seconds,
                middle,
                shown,
            )
    return own


class SpikeWatch:
    """Tells once when a loss leaves the band of its recent values, and again after it was back."""

    def __init__(self, logger: logging.Logger):
        self._recent: dict[str, deque[float]] = {}
        self._outside: set[str] = set()
        self._logger = logger

    def look(self, step: int, name: str, value: float) -> None:
        """Take note of one loss."""
        recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
        if len(recent) >= WINDOW // 4:
            middle = statistics.median(recent)
            spread = statistics.median(abs(past - middle) for past in recent)
            limit = middle + SPIKE * max(spread, 1e-3 * abs(middle))
            if value > limit and name not in self._outside:
                text = "step %d: %s jumped to %.4f, the median of the last %d is %.4f"
                self._logger.warning(text, step, name, value, len(recent), middle)
            (self._outside.add if value > limit else self._outside.discard)(name)
        recent.append(value)
