"""Which samples make a global batch: a pure function, the same for every world size.

    order     shards in an order drawn from (seed, epoch); samples shuffled inside windows of
              `shuffle_shards` shards, so that only so many shards are read at a time
    units     what a global batch is counted in: single samples, or packs of at most `pack_tokens`
              tokens, filled first-fit inside a window while passing over LOOK_AHEAD samples
    batch     `units` consecutive units; rank r of W takes the r-th of W equal pieces

The tail of an epoch is filled with its first units at weight 0: every rank always has units, every
sample counts exactly once per epoch. Nothing of the size of the dataset is held: making a plan
costs one permutation of the shards, a window 20 ns a sample, packs another 0.6 microseconds. Where
a batch of packs starts is known after packing the windows before it: resuming packs the epoch's
past, a minute for 100 million samples.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from ..errors import DataPipelineError
from ..random import counter_rng, counter_uniform

LOOK_AHEAD = 64  # samples that a pack may pass over, a choice; part of the plan's identity
RESERVES = 64  # replacements that are tried for one bad sample; a choice

# (sample ids, stages, epoch) -> tokens of each sample
TokensOf = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


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
        sizes = self.unit_sizes.reshape(world_size, -1)  # [ranks, units of each]
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

    def __init__(
        self,
        shard_sizes: np.ndarray,
        seed: int,
        shuffle_shards: int,
        absent: Iterable[int] = (),
    ):
        """shard_sizes: samples per shard; `absent` are shards that take no part, though their
        sample ids stay taken."""
        self.seed = seed
        self._shuffle_shards = shuffle_shards
        ends = np.cumsum(shard_sizes)
        self._starts = np.concatenate([[0], ends]).astype(np.int64)
        self._present = np.setdiff1d(
            np.arange(len(shard_sizes)), np.array(sorted(absent), np.int64)
        )
        self.num_samples = int(np.asarray(shard_sizes)[self._present].sum())
        # caches of this object, so that they go with it: @lru_cache would keep it alive.
        # Consecutive batches share a window or touch two; at an epoch's end two epochs are in use
        self._layout = lru_cache(maxsize=2)(self._shuffle)
        self.window = lru_cache(maxsize=4)(self._window)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in their order, int64 [windows + 1] positions where windows start)."""
        shards = counter_rng(self.seed, "shards", epoch).permutation(self._present)
        sizes = np.diff(self._starts)[shards]
        cuts = np.arange(0, len(shards), self._shuffle_shards)
        window_sizes = np.add.reduceat(sizes, cuts)
        return shards, np.concatenate([[0], window_sizes.cumsum()])

    def bounds(self, epoch: int) -> np.ndarray:
        """int64 [windows + 1]: where the epoch's windows start, and its length at the end."""
        return self._layout(epoch)[1]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Sample ids int64 of one window, shuffled."""
        first = window * self._shuffle_shards
        order = self._layout(epoch)[0]
        shards = order[first : first + self._shuffle_shards]
        of_shards = [np.arange(self._starts[s], self._starts[s + 1]) for s in shards]
        ids = np.concatenate(of_shards)
        return counter_rng(self.seed, "window", epoch, window).permutation(ids)

    def ids(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sample ids at positions start..stop of the epoch."""
        bounds = self.bounds(epoch)
        # the windows of the first and the last position; whole windows, which are cached
        first, last = np.searchsorted(bounds, [start, stop - 1], side="right") - 1
        windows = [self.window(epoch, int(w)) for w in range(first, last + 1)]
        joined = np.concatenate(windows)
        return joined[start - bounds[first] : stop - bounds[first]]


def first_fit(lengths: list[int], budget: int, look_ahead: int = LOOK_AHEAD) -> list[list[int]]:
    """Packs of item numbers, each of at most `budget` tokens in sum, every item in exactly one.

    A pack takes, in order, every waiting item that still fits, until `look_ahead` items have been
    passed over; those come first in the next pack, so none waits for long.
    """
    packs: list[list[int]] = []
    waiting: list[int] = []
    ahead = iter(range(len(lengths)))
    shortest = min(lengths, default=0)
    while True:
        pack = []
        passed = []
        free = budget
        earlier = iter(waiting)
        for item in itertools.chain(earlier, ahead):
            if lengths[item] <= free:
                pack.append(item)
                free -= lengths[item]
            else:
                passed.append(item)
            # the pack is as full as any item could make it, or enough items were passed over
            if free < shortest or len(passed) >= look_ahead:
                break
        if not pack:
            assert not passed, "an item is longer than the budget"
            return packs
        packs.append(pack)
        # `earlier` holds what the loop did not reach
        waiting = passed + list(earlier)


class EpochPlan:
    """Batches of one dataset, counted in samples (`pack_tokens` None) or in packs."""

    def __init__(
        self,
        order: SampleOrder,
        units: int,
        tokens_of: TokensOf | None = None,
        pack_tokens: int | None = None,
        stages: Sequence[int] = (0,),
    ):
        """
        units: samples or packs of one global batch. tokens_of(ids, stages, epoch) gives the tokens
        of samples, needed for packs. stages: ascending numbers of samples after which the stages of
        a progressive schedule start, the first 0.

        Raises DataPipelineError when the dataset cannot fill one global batch.
        """
        self.order = order
        self.units = units
        self.pack_tokens = pack_tokens
        self._tokens_of = tokens_of
        self._stages = np.asarray(stages)
        self._packs = lru_cache(maxsize=4)(self._pack_window)
        self._pack_counts: dict[int, list[int]] = {}  # epoch -> packs before each window so far
        if pack_tokens is None:
            if order.num_samples < units:
                raise self._too_small(order.num_samples, "samples")
        elif order.num_samples < 1:
            raise self._too_small(0, "samples")
        elif self._count_packs(0, units) < units:
            raise self._too_small(self._pack_counts[0][-1], f"packs of {pack_tokens} tokens")

    def _too_small(self, count: int, what: str) -> DataPipelineError:
        return DataPipelineError(
            f"the dataset has {count} {what}, one global batch takes {self.units}: lower the batch "
            "size (--list_batch_size times the number of processes) or pack more data"
        )

    def batch(self, epoch: int, index: int) -> PlannedBatch | None:
        """Global batch `index` of an epoch, counted from 0; None beyond the epoch's end."""
        if self.pack_tokens is None:
            return self._batch_of_samples(epoch, index)
        return self._batch_of_packs(epoch, index)

    def _batch_of_samples(self, epoch: int, index: int) -> PlannedBatch | None:
        start = index * self.units
        stop = min(start + self.units, self.order.num_samples)
        if start >= stop:
            return None
        positions = np.arange(start, stop)
        ids = self.order.ids(epoch, start=start, stop=stop)
        weights = np.ones(self.units, np.float32)
        missing = self.units - len(ids)
        if missing:
            first = self.order.ids(epoch, start=0, stop=missing)
            ids = np.concatenate([ids, first])
            # padding is seen in the stage of the batch, not in that of the epoch's start
            positions = np.concatenate([positions, np.full(missing, stop - 1)])
            weights[-missing:] = 0.0
        return PlannedBatch(
            epoch=epoch,
            index=index,
            sample_ids=ids,
            weights=weights,
            stages=self._stage(epoch, positions),
            unit_sizes=np.ones(self.units, np.int64),
            rows=self.units,
        )

    def _batch_of_packs(self, epoch: int, index: int) -> PlannedBatch | None:
        start = index * self.units
        counted = self._count_packs(epoch, start + self.units)
        available = min(counted - start, self.units)
        if available <= 0:
            return None
        total = self._pack_counts[epoch][-1]
        # fewer packs than units: the epoch ends here, and its first packs fill up at weight 0
        packs = [self._pack(epoch, start + n) for n in range(available)]
        missing = self.units - available
        packs += [self._pack(epoch, n % total) for n in range(missing)]
        sizes = np.array([len(ids) for ids, _ in packs])
        is_padding = np.arange(self.units) >= available
        return PlannedBatch(
            epoch=epoch,
            index=index,
            sample_ids=np.concatenate([ids for ids, _ in packs]),
            weights=np.repeat(np.where(is_padding, 0.0, 1.0).astype(np.float32), sizes),
            stages=np.concatenate([stages for _, stages in packs]),
            unit_sizes=sizes,
            rows=int(sizes.sum()),
        )

    def reserve(self, epoch: int, sample_id: int, attempt: int) -> int:
        """The attempt-th sample that stands in for a bad one, at a uniformly drawn position of the
        epoch; of more than 2**24 samples only as many, evenly spaced, can be drawn."""
        word = torch.tensor([sample_id * RESERVES + attempt])
        # a uniform float32 is a multiple of 2 ** -24: whole numbers from here on, so no rounding
        uniform = counter_uniform(word, self.order.seed, "reserve", epoch).item()
        position = int(uniform * 2**24)
        position = position * self.order.num_samples >> 24
        ids = self.order.ids(epoch, start=position, stop=position + 1)
        return int(ids[0])

    def _stage(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        seen = epoch * self.order.num_samples + positions
        return np.searchsorted(self._stages, seen, side="right") - 1

    def _pack_window(self, epoch: int, window: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(sample ids, stages) of each pack of a window, which lies in one stage as a whole."""
        assert self._tokens_of is not None and self.pack_tokens is not None
        ids = self.order.window(epoch, window)
        start = self.order.bounds(epoch)[window]
        stages = self._stage(epoch, np.full(len(ids), start))
        lengths = self._tokens_of(ids, stages, epoch).tolist()
        packs = first_fit(lengths, budget=self.pack_tokens)
        return [(ids[pack], stages[pack]) for pack in packs]

    def _count_packs(self, epoch: int, needed: int) -> int:
        """Packs of the epoch, counted window by window until there are `needed`."""
        counts = self._pack_counts.setdefault(epoch, [0])
        windows = len(self.order.bounds(epoch)) - 1
        while counts[-1] < needed and len(counts) <= windows:
            window = len(counts) - 1
            packs = self._packs(epoch, window)
            counts.append(counts[-1] + len(packs))
        # a stream only goes on: earlier epochs are forgotten
        self._pack_counts = {e: c for e, c in self._pack_counts.items() if e >= epoch - 1}
        return counts[-1]

    def _pack(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        counts = self._pack_counts[epoch]
        window = int(np.searchsorted(counts, number, side="right")) - 1
        return self._packs(epoch, window)[number - counts[window]]


def batches_from(plan: EpochPlan, epoch: int, index: int) -> Iterator[PlannedBatch]:
    """Endless batches from a position on; beyond an epoch's end is the next one's start."""
    while True:
        batch = plan.batch(epoch, index)
        if batch is None:
            epoch += 1
            index = 0
        else:
            yield batch
            index += 1
