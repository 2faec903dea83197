"""Bad samples at training time: named, replaced by the plan's reserve, counted, and too many stop.

A damaged sample is never trained on and never replaced in silence: the batch names it with its
reserve, the ledger records both. A sample is checked by the bytes that are read, every time anew,
and never by what a process met before: so a resumed run and any number of ranks replace alike. Only
what cannot be seen in the bytes, that the decoder died of an image, is remembered.
"""

import logging
import shlex
from collections import Counter
from collections.abc import Iterable

from ..errors import BudgetExceeded
from ..shards.manifest import Manifest, how_to_repack
from .config import ErrorBudget

MAX_LISTED = 50  # lines of an error message: a screenful


def allowed(share: float, count: int) -> int:
    """Bad samples that a share of `count` samples allows."""
    return max(1, int(share * count)) if share else 0


class Quarantine:
    """Bad samples of one dataset: why, and how many of an epoch."""

    def __init__(self, manifest: Manifest, budget: ErrorBudget, logger: logging.Logger | None):
        self._manifest = manifest
        self._budget = budget
        self._logger = logger
        self._reasons: dict[int, str] = {}
        self._undecodable: set[tuple[int, int]] = set()  # (sample, view)
        self._epoch = -1
        self._bad: set[int] = set()  # of this epoch

    def note(self, sample_id: int, reason: str) -> None:
        """Keep a bad sample's reason for messages, and log it once."""
        if sample_id not in self._reasons:
            self._reasons[sample_id] = reason
            if self._logger is not None:
                self._logger.warning("quarantined sample %d: %s", sample_id, reason)

    def add_undecodable(self, sample_id: int, view: int, reason: str) -> None:
        """Remember an image that must not reach the decoder again."""
        self._undecodable.add((sample_id, view))
        self.note(sample_id, reason)

    def is_undecodable(self, sample_id: int, view: int) -> bool:
        """Whether the image of a sample under a view must not reach the decoder."""
        return (sample_id, view) in self._undecodable

    def reason(self, sample_id: int) -> str:
        """Why a sample is bad."""
        return self._reasons.get(sample_id, "met by another rank or an earlier run")

    def count(self, epoch: int, bad: Iterable[int], reasons: dict[int, str] | None = None) -> int:
        """Count bad samples, of all ranks, in the batches of an epoch in their order; returns how
        many the epoch has so far. Raises BudgetExceeded with the list.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            self._bad = set()
        self._bad.update(bad)
        self._reasons = {**(reasons or {}), **self._reasons}
        limit = allowed(self._budget.share, len(self._manifest))
        if len(self._bad) > limit:
            raise BudgetExceeded(
                f"{len(self._bad)} bad samples in epoch {epoch} of {self._manifest.directory}, "
                f"{limit} are allowed ({self._budget.share:.2%}); `python -m data_pipeline verify "
                f"{shlex.quote(str(self._manifest.directory))}` names the damaged shards, which "
                "the folder's `pack` command writes anew; or allow more with `--set "
                "heads.0.stream.error_budget.share=SHARE` (0: the head's index)\n"
                f"{self._listing()}"
            )
        self._check_shards()
        return len(self._bad)

    def _check_shards(self) -> None:
        shards = [self._manifest.locate(sample)[0] for sample in self._bad]
        sizes = {shard["name"]: len(shard["samples"]) for shard in shards}
        for name, count in Counter(shard["name"] for shard in shards).items():
            if count > allowed(self._budget.shard_share, sizes[name]):
                raise BudgetExceeded(
                    f"{count} of {sizes[name]} samples of {name}.tar are bad, more than "
                    f"{self._budget.shard_share:.1%}; {how_to_repack(name)}\n{self._listing()}"
                )

    def _listing(self) -> str:
        """The epoch's bad samples and why, one line each, at most MAX_LISTED."""
        bad = sorted(self._bad)
        lines = [f"  sample {sample}: {self.reason(sample)}" for sample in bad]
        unlisted = len(lines) - MAX_LISTED
        if unlisted > 0:
            lines[MAX_LISTED:] = [f"  and {unlisted} more"]
        return "\n".join(lines)
