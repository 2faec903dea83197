"""Samplers: shuffled, or with samples of like kind and length together, so that ranks wait little.

    mega-batch   the samples of one optimizer step: `batches_per_step` batches of `batch_size`,
                 where batches_per_step = world size x accumulation
    kinds        multimodal (positive length) and text-only (negative length)

Each kind is shuffled and cut into mega-batches; a mega-batch is dealt to its batches so that their
summed lengths are even; full mega-batches of both kinds are shuffled together. The last one of each
kind, full or not, is merged into one final mixed piece, by index. Random draws depend on seed and
epoch only. Cost: about a microsecond a sample and epoch.
"""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data_pipeline.random import counter_rng


def modality_length_order(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    batches_per_step: int,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Mega-batches of sample indices, a partition of all samples.

    All but the last hold batch_size x batches_per_step samples of one kind, batch after batch; the
    last holds what is left of both kinds, up to twice as many. lengths are as in
    `ModalityLengthSampler`.
    """
    lengths = np.asarray(lengths, np.int64)
    size = batch_size * batches_per_step
    mega_batches: list[list[int]] = []
    last: list[int] = []
    for number, is_of_kind in enumerate((lengths > 0, lengths < 0)):
        draw = counter_rng(seed, "modality length samples", epoch, number)
        indices = draw.permutation(np.flatnonzero(is_of_kind))
        # the last mega-batch of a kind, full or not (hence minus one), goes into the mixed one
        mixed_from = max(0, len(indices) - 1) // size * size
        for start in range(0, mixed_from, size):
            piece = indices[start : start + size]
            mega_batches.append(_deal(piece, np.abs(lengths[piece]), batch_size=batch_size))
        last += indices[mixed_from:].tolist()
    draw = counter_rng(seed, "modality length mega-batches", epoch)
    order = [mega_batches[index] for index in draw.permutation(len(mega_batches))]
    if last:
        order.append(sorted(last))
    return order


def _deal(indices: np.ndarray, lengths: np.ndarray, batch_size: int) -> list[int]:
    """Indices of a full mega-batch, batch after batch: the longest sample that is left goes to the
    batch with the smallest sum that has room; the lower batch where sums are equal."""
    num_batches = len(indices) // batch_size
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    open_batches = [(0, number) for number in range(num_batches)]  # a heap: (sum, batch)
    # stable, so that equal lengths keep their drawn order on every machine
    for longest in np.argsort(-lengths, kind="stable"):
        total, number = heapq.heappop(open_batches)
        batches[number].append(int(indices[longest]))
        if len(batches[number]) < batch_size:  # a full batch does not come back to the heap
            heapq.heappush(open_batches, (total + int(lengths[longest]), number))
    return [index for batch in batches for index in batch]


class ModalityLengthSampler(torch.utils.data.Sampler[int]):
    """The global order of samples under group_by_modality_length, every index once per epoch.

    Consecutive runs of `batch_size` indices are batches; a loader deals batch k to rank
    k % world size.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, batches_per_step: int, seed: int
    ) -> None:
        """
        lengths           words of each sample, negative where it is text-only
        batch_size        samples of one rank in one forward pass
        batches_per_step  world size x gradient accumulation

        Raises ValueError for a length of zero, which is of no kind, and counts below one.
        """
        self._lengths = np.asarray(lengths, np.int64)
        empty = np.flatnonzero(self._lengths == 0)
        if len(empty):
            raise ValueError(
                f"sample {empty[0]} has length 0 ({len(empty)} such samples): take samples without "
                "a word out of the list"
            )
        for name, value in (("batch_size", batch_size), ("batches_per_step", batches_per_step)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self._batch_size = batch_size
        self._batches_per_step = batches_per_step
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = modality_length_order(
            self._lengths,
            batch_size=self._batch_size,
            batches_per_step=self._batches_per_step,
            seed=self._seed,
            epoch=self._epoch,
        )
        for mega_batch in order:
            yield from mega_batch


class ShuffledSampler(torch.utils.data.Sampler[int]):
    """All indices in an order drawn from (seed, epoch)."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        draw = counter_rng(self._seed, "conversation samples", self._epoch)
        yield from draw.permutation(self._count).tolist()
