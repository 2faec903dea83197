"""Bad samples at training time: named, replaced by the plan's reserve, counted, and too many stop.

A damaged sample is never trained on and never replaced in silence: the batch says who stands in for
whom, the ledger records it. What is bad depends on the bytes alone, so a resumed run replaces the
same samples by the same reserves.
"""

import logging
from collections import Counter
from dataclasses import dataclass

from ..errors import BudgetExceeded
from ..shards.manifest import Manifest

MAX_LISTED = 50


@dataclass(frozen=True)
class ErrorBudget:
    """Shares of an epoch's and of one shard's samples that may be bad; one sample always may,
    unless the share is 0."""

    share: float = 0.001
    shard_share: float = 0.05

    def __post_init__(self):
        if not (0 <= self.share <= 1 and 0 <= self.shard_share <= 1):
            raise ValueError(f"error budget {self.share}, {self.shard_share}: shares lie in [0, 1]")


def allowed(share: float, count: int) -> int:
    """Bad samples that a share of `count` samples allows."""
    return max(1, int(share * count)) if share else 0


class Quarantine:
    """Bad samples and lost shards of one dataset as this rank met them."""

    def __init__(self, manifest: Manifest, budget: ErrorBudget, logger: logging.Logger | None):
        self._manifest, self._budget, self._logger = manifest, budget, logger
        self._reasons: dict[int, str] = {}
        self._lost: dict[str, str] = {}  # shard name -> reason
        self._met: tuple[int, set[int]] = (0, set())  # epoch, bad samples planned in it
        self.limit = allowed(budget.share, len(manifest))

    def reason(self, sample_id: int) -> str | None:
        """Why a sample is known to be bad; None for all others."""
        if not self._reasons and not self._lost:
            return None
        shard = self._manifest.locate(sample_id)[0]["name"] if self._lost else ""
        return self._reasons.get(sample_id) or self._lost.get(shard)

    def add(self, sample_id: int, reason: str) -> None:
        """Note a bad sample. Raises BudgetExceeded when its shard has too many of them."""
        if sample_id in self._reasons:
            return
        self._reasons[sample_id] = reason
        self._warn("quarantined sample %d: %s", sample_id, reason)
        shards = Counter(self._manifest.locate(bad)[0]["name"] for bad in self._reasons)
        shard = self._manifest.locate(sample_id)[0]
        if shards[shard["name"]] > allowed(self._budget.shard_share, len(shard["samples"])):
            raise BudgetExceeded(
                f"{shards[shard['name']]} of {len(shard['samples'])} samples of "
                f"{shard['name']}.tar are bad, more than {self._budget.shard_share:.1%}; pack that "
                f"shard again\n{self.listing()}"
            )

    def add_shard(self, sample_id: int, reason: str) -> None:
        """Note that the whole shard of a sample cannot be read any more."""
        shard = self._manifest.locate(sample_id)[0]["name"]
        if shard not in self._lost:
            self._lost[shard] = reason
            self._warn("quarantined shard %s: %s", shard, reason)

    def meet(self, epoch: int, sample_id: int) -> None:
        """Count a bad sample in the place where the plan has it. Raises BudgetExceeded."""
        if self._met[0] != epoch:
            self._met = (epoch, set())
        self._met[1].add(sample_id)
        if len(self._met[1]) > self.limit:
            raise BudgetExceeded(self.over_budget(epoch, len(self._met[1])))

    def met(self, epoch: int) -> int:
        """Bad samples that this rank met so far in an epoch, the one that is being read."""
        return len(self._met[1]) if self._met[0] == epoch else 0

    def over_budget(self, epoch: int, count: int) -> str:
        """Message for `count` bad samples in one epoch."""
        return (
            f"{count} bad samples in epoch {epoch} of {self._manifest.directory}, "
            f"{self.limit} are allowed ({self._budget.share:.2%}); run `python -m data_pipeline "
            f"verify {self._manifest.directory}` and pack the damaged shards again, or raise "
            f"error_budget.share\n{self.listing()}"
        )

    def listing(self) -> str:
        """What is bad and why, one line each, at most MAX_LISTED."""
        lines = [f"  shard {name}: {reason}" for name, reason in self._lost.items()]
        lines += [f"  sample {bad}: {reason}" for bad, reason in self._reasons.items()]
        more = [f"  and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
        return "\n".join(lines[:MAX_LISTED] + more)

    def _warn(self, *message) -> None:
        if self._logger:
            self._logger.warning(*message)
