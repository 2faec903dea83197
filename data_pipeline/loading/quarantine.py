"""Bad samples at training time: named, replaced by the plan's reserve, counted, and too many stop.

A damaged sample is never trained on and never replaced in silence: the batch says who stands in for
whom, the ledger records it. What is bad is judged by the bytes that are read, every time anew, and
never by what a process met before: so a resumed run and any number of ranks replace alike. Only
what cannot be told from the bytes, that the decoder died of a picture, is remembered.
"""

import logging
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import BudgetExceeded
from ..shards.manifest import Manifest, how_to_repack

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
    """Bad samples of one dataset: why, and how many of an epoch."""

    def __init__(self, manifest: Manifest, budget: ErrorBudget, logger: logging.Logger | None):
        self._manifest, self._budget, self._logger = manifest, budget, logger
        self._reasons: dict[int, str] = {}
        self._undecodable: dict[tuple[int, int], str] = {}  # (sample, view) -> reason
        self._epoch, self._met = -1, set()

    def note(self, sample_id: int, reason: str) -> None:
        """Keep a bad sample's reason for messages, and say it once."""
        if sample_id not in self._reasons:
            self._reasons[sample_id] = reason
            if self._logger:
                self._logger.warning("quarantined sample %d: %s", sample_id, reason)

    def add_undecodable(self, sample_id: int, view: int, reason: str) -> None:
        """Remember a picture that must not reach the decoder again."""
        self._undecodable[sample_id, view] = reason
        self.note(sample_id, reason)

    def is_undecodable(self, sample_id: int, view: int) -> bool:
        """Whether the picture of a sample under a view must not reach the decoder."""
        return (sample_id, view) in self._undecodable

    def reason(self, sample_id: int) -> str:
        """Why a sample is bad."""
        return self._reasons.get(sample_id, "met by another rank or an earlier run")

    def count(self, epoch: int, bad: Iterable[int], reasons: dict[int, str] | None = None) -> int:
        """Count bad samples, of all ranks, in the batches of an epoch in their order; returns how
        many the epoch has so far. Raises BudgetExceeded with the list.
        """
        if epoch != self._epoch:
            self._epoch, self._met = epoch, set()
        self._met |= set(bad)
        self._reasons = {**(reasons or {}), **self._reasons}
        limit = allowed(self._budget.share, len(self._manifest))
        if len(self._met) > limit:
            raise BudgetExceeded(
                f"{len(self._met)} bad samples in epoch {epoch} of {self._manifest.directory}, "
                f"{limit} are allowed ({self._budget.share:.2%}); `python -m data_pipeline verify "
                f"{shlex.quote(str(self._manifest.directory))}` names the damaged shards, which "
                "the folder's `pack` command writes anew; or allow more with `--set "
                "heads.0.stream.error_budget.share=SHARE` (0: the head's place)\n"
                f"{self._listing()}"
            )
        self._check_shards()
        return len(self._met)

    def _check_shards(self) -> None:
        shards = [self._manifest.locate(sample)[0] for sample in self._met]
        sizes = {shard["name"]: len(shard["samples"]) for shard in shards}
        for name, count in Counter(shard["name"] for shard in shards).items():
            if count > allowed(self._budget.shard_share, sizes[name]):
                raise BudgetExceeded(
                    f"{count} of {sizes[name]} samples of {name}.tar are bad, more than "
                    f"{self._budget.shard_share:.1%}; {how_to_repack(name)}\n{self._listing()}"
                )

    def _listing(self) -> str:
        """The epoch's bad samples and why, one line each, at most MAX_LISTED."""
        lines = [f"  sample {bad}: {self.reason(bad)}" for bad in sorted(self._met)]
        more = [f"  and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
        return "\n".join(lines[:MAX_LISTED] + more)
