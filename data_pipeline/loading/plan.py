"""Which samples make a global batch: a pure function, the same for every world size.

    order     shards in an order drawn from (seed, epoch); samples shuffled inside windows of
              `shuffle_shards` shards, so that only so many shards are read at a time
    units     what a global batch is counted in: single samples, or packs of at most `pack_tokens`
              tokens, filled first-fit inside a window while passing over LOOK_AHEAD samples
    batch     `units` consecutive units; rank r of W takes the r-th of W equal pieces

The tail of an epoch is filled with its first units at weight 0: every rank always has units, every
sample counts exactly once per epoch. Nothing of the size of the dataset is kept: making a plan
costs one permutation of the shards, a window 20 ns a sample, packs another 0.6 microseconds. Where
a batch of packs starts is known after packing the windows before it: resuming packs the epoch's
past, a minute for 100 million samples.
"""

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from ..errors import DataPipelineError
from ..random import counter_rng, counter_uniform

LOOK_AHEAD = 64
RESERVES = 64  # replacements that are tried for one bad sample


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch, or one rank's share of it.

    sample_ids int64 [n], weights float32 [n] (0 for the tail's padding), stages int64 [n] (which
    stage of a progressive schedule each sample is seen in), unit_sizes int64 [units] (samples per
    unit) and rows, the most samples that any rank has: losses are computed on equal shapes.
    """

    epoch: int
    index: int
    sample_ids: np.ndarray
    weights: np.ndarray
    stages: np.ndarray
    unit_sizes: np.ndarray
    rows: int

    def share(self, rank: int, world_size: int) -> "PlannedBatch":
        """The piece of one rank; the units must divide by the world size."""
        per_rank = len(self.unit_sizes) // world_size
        sizes = self.unit_sizes.reshape(world_size, per_rank)
        bounds = np.concatenate([[0], sizes.sum(axis=1).cumsum()])
        piece = slice(bounds[rank], bounds[rank + 1])
        return replace(
            self,
            sample_ids=self.sample_ids[piece],
            weights=self.weights[piece],
            stages=self.stages[piece],
            unit_sizes=sizes[rank],
            rows=int(sizes.sum(axis=1).max()),
        )


class SampleOrder:
    """Two-level shuffle of an epoch: shards, then samples inside windows of shards."""

    def __init__(self, shard_sizes: np.ndarray, seed: int, shuffle_shards: int, absent=()):
        """shard_sizes: samples per shard; `absent` are shards that take no part, though their
        sample ids stay taken."""
        self._starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
        self._present = np.setdiff1d(
            np.arange(len(shard_sizes)), np.array(sorted(absent), np.int64)
        )
        self.seed, self._shuffle_shards = seed, shuffle_shards
        self.num_samples = int(np.asarray(shard_sizes)[self._present].sum())
        self._layout = lru_cache(maxsize=2)(self._shuffle)
        self.window = lru_cache(maxsize=4)(self._window)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in their order, int64 [windows + 1] places where windows start)."""
        shards = counter_rng(self.seed, "shards", epoch).permutation(self._present)
        sizes = np.diff(self._starts)[shards]
        cuts = np.arange(0, len(shards), self._shuffle_shards)
        return shards, np.concatenate([[0], np.add.reduceat(sizes, cuts).cumsum()])

    def bounds(self, epoch: int) -> np.ndarray:
        """int64 [windows + 1]: places in the epoch at which its windows start, and its length."""
        return self._layout(epoch)[1]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Sample ids int64 of one window, shuffled."""
        first = window * self._shuffle_shards
        shards = self._layout(epoch)[0][first : first + self._shuffle_shards]
        ids = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
        return counter_rng(self.seed, "window", epoch, window).permutation(ids)

    def ids(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sample ids at places start..stop of the epoch."""
        bounds = self.bounds(epoch)
        first, last = np.searchsorted(bounds, [start, stop - 1], side="right") - 1
        joined = np.concatenate([self.window(epoch, int(w)) for w in range(first, last + 1)])
        return joined[start - bounds[first] : stop - bounds[first]]


def first_fit(lengths: list[int], budget: int, look_ahead: int = LOOK_AHEAD) -> list[list[int]]:
    """Packs of item numbers, each of at most `budget` tokens in sum, every item in exactly one.

    A pack takes, in order, every waiting item that still fits, until `look_ahead` items have been
    passed over; those come first in the next pack, so none waits for long.
    """
    packs, waiting, ahead = [], [], iter(range(len(lengths)))
    shortest = min(lengths, default=0)
    while True:
        pack, passed, free, earlier = [], [], budget, iter(waiting)
        for item in itertools.chain(earlier, ahead):
            if lengths[item] <= free:
                pack.append(item)
                free -= lengths[item]
            else:
                passed.append(item)
            if free < shortest or len(passed) >= look_ahead:
                break
        if not pack:
            assert not passed, "an item is longer than the budget"
            return packs
        packs.append(pack)
        waiting = passed + list(earlier)


class EpochPlan:
    """Batches of one dataset, counted in samples (`pack_tokens` None) or in packs."""

    def __init__(
        self, order: SampleOrder, units: int, tokens_of=None, pack_tokens=None, stages=(0,)
    ):
        """
        units: samples or packs of one global batch. tokens_of(ids, stages, epoch) gives the tokens
        of samples, needed for packs. stages: ascending numbers of samples after which the stages of
        a progressive schedule start, the first 0.

        Raises DataPipelineError when the dataset cannot fill one global batch.
        """
        self.order, self.units, self.pack_tokens = order, units, pack_tokens
        self._tokens_of, self._stages = tokens_of, np.asarray(stages)
        self._packs = lru_cache(maxsize=4)(self._pack_window)
        self._pack_counts: dict[int, list[int]] = {}  # epoch -> packs before each window so far
        if order.num_samples < (1 if pack_tokens else units):
            self._refuse(order.num_samples, "samples")
        if pack_tokens and self._count_packs(0, units) < units:
            self._refuse(self._pack_counts[0][-1], f"packs of {pack_tokens} tokens")

    def _refuse(self, count: int, what: str):
        raise DataPipelineError(
            f"the dataset has {count} {what}, one global batch takes {self.units}: lower the batch "
            "size (--list_batch_size times the number of processes) or pack more data"
        )

    def batch(self, epoch: int, index: int) -> PlannedBatch | None:
        """Global batch `index` of an epoch, counted from 0; None beyond the epoch's end."""
        make = self._batch_of_packs if self.pack_tokens else self._batch_of_samples
        return make(epoch, index)

    def _batch_of_samples(self, epoch: int, index: int) -> PlannedBatch | None:
        total, start = self.order.num_samples, index * self.units
        if start >= total:
            return None
        stop = min(start + self.units, total)
        places = np.arange(start, stop)
        ids = self.order.ids(epoch, start, stop)
        missing = self.units - len(ids)
        if missing:
            ids = np.concatenate([ids, self.order.ids(epoch, 0, missing)])
            places = np.concatenate([places, np.full(missing, stop - 1)])
        weights = np.ones(self.units, np.float32)
        weights[self.units - missing :] = 0.0
        ones = np.ones(self.units, np.int64)
        return PlannedBatch(
            epoch, index, ids, weights, self._stage(epoch, places), ones, self.units
        )

    def _batch_of_packs(self, epoch: int, index: int) -> PlannedBatch | None:
        start = index * self.units
        available = min(self._count_packs(epoch, start + self.units) - start, self.units)
        if available <= 0:
            return None
        packs = [self._pack(epoch, start + n) for n in range(available)]
        weights = [np.ones(len(ids), np.float32) for ids, _ in packs]
        total = self._pack_counts[epoch][-1]
        padding = [self._pack(epoch, n % total) for n in range(self.units - available)]
        packs += padding
        weights += [np.zeros(len(ids), np.float32) for ids, _ in padding]
        sizes = np.array([len(ids) for ids, _ in packs])
        ids, stages = (np.concatenate(parts) for parts in zip(*packs, strict=True))
        return PlannedBatch(
            epoch, index, ids, np.concatenate(weights), stages, sizes, int(sizes.sum())
        )

    def reserve(self, epoch: int, sample_id: int, attempt: int) -> int:
        """The attempt-th sample that stands in for a bad one: any of the epoch, at random."""
        word = torch.tensor([sample_id * RESERVES + attempt])
        place = int(counter_uniform(word, self.order.seed, "reserve", epoch).item() * 2**24)
        place = place * self.order.num_samples >> 24
        return int(self.order.ids(epoch, place, place + 1)[0])

    def _stage(self, epoch: int, places: np.ndarray) -> np.ndarray:
        seen = epoch * self.order.num_samples + places
        return np.searchsorted(self._stages, seen, side="right") - 1

    def _pack_window(self, epoch: int, window: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(sample ids, stages) of each pack of a window, which lies in one stage as a whole."""
        ids = self.order.window(epoch, window)
        stages = self._stage(epoch, np.full(len(ids), self.order.bounds(epoch)[window]))
        lengths = self._tokens_of(ids, stages, epoch).tolist()
        return [(ids[pack], stages[pack]) for pack in first_fit(lengths, self.pack_tokens)]

    def _count_packs(self, epoch: int, needed: int) -> int:
        """Packs of the epoch, counted window by window until there are `needed`."""
        counts = self._pack_counts.setdefault(epoch, [0])
        windows = len(self.order.bounds(epoch)) - 1
        while counts[-1] < needed and len(counts) <= windows:
            counts.append(counts[-1] + len(self._packs(epoch, len(counts) - 1)))
        for old in [e for e in self._pack_counts if e < epoch - 1 and e != 0]:
            del self._pack_counts[old]
        return counts[-1]

    def _pack(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        counts = self._pack_counts[epoch]
        window = int(np.searchsorted(counts, number, side="right")) - 1
        return self._packs(epoch, window)[number - counts[window]]


def batches_from(plan: EpochPlan, epoch: int, index: int):
    """Endless batches from a position on; beyond an epoch's end is the next one's start."""
    for number in itertools.count(epoch):
        while (batch := plan.batch(number, index)) is not None:
            yield batch
            index += 1
        index = 0
