"""Which samples make global batch g: a pure function, the same for every world size.

    epoch, place  = divmod(g, batches_per_epoch)
    order         = permutation of all samples, drawn from (seed, epoch)
    batch g       = order[place * B : (place + 1) * B]; rank r takes the r-th of W equal pieces

The tail of an epoch is filled with samples from its beginning at weight 0, so every rank always has
the same number of rows and every sample counts exactly once per epoch. The state of the whole
loader is the number g. Cost: one permutation per epoch (8 bytes per sample).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..counter_rng import counter_rng
from ..errors import DataPipelineError


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch: its number, its epoch, sample ids int64 [B] and weights
    float32 [B] (0 for tail padding).
    """

    index: int
    epoch: int
    sample_ids: np.ndarray
    weights: np.ndarray

    def share(self, rank: int, world_size: int) -> "PlannedBatch":
        """The piece of one rank; B must divide by the world size (checked
        when the plan is made).
        """
        size = len(self.sample_ids) // world_size
        piece = slice(rank * size, (rank + 1) * size)
        return PlannedBatch(self.index, self.epoch, self.sample_ids[piece], self.weights[piece])


class EpochPlan:
    """Order of one dataset under one seed and global batch size."""

    def __init__(self, num_samples: int, global_batch: int, seed: int):
        """Raises DataPipelineError when the dataset cannot fill one global batch."""
        if num_samples < global_batch:
            raise DataPipelineError(
                f"the dataset has {num_samples} samples, one global batch takes {global_batch}: "
                "lower the batch size "
                "(--list_batch_size times the number of processes) or pack more data"
            )
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self.batches_per_epoch = -(-num_samples // global_batch)
        self._order = lru_cache(maxsize=2)(self._permutation)

    def batch(self, index: int) -> PlannedBatch:
        """Global batch `index`, counted over all epochs from 0."""
        epoch, place = divmod(index, self.batches_per_epoch)
        order = self._order(epoch)
        ids = order[place * self.global_batch : (place + 1) * self.global_batch]
        missing = self.global_batch - len(ids)
        weights = np.ones(self.global_batch, np.float32)
        if missing:
            ids = np.concatenate([ids, order[:missing]])
            weights[-missing:] = 0.0
        return PlannedBatch(index, epoch, ids, weights)

    def _permutation(self, epoch: int) -> np.ndarray:
        return counter_rng(self.seed, "epoch order", epoch).permutation(self.num_samples)
