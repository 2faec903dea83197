"""The loader's contract without files: noise around one pattern per class,
for smoke runs and the throughput ceiling.
"""

import torch

from ..counter_rng import counter_rng
from .packing import PackedBatch, pack_views
from .views import View


class SyntheticStream:
    """Endless packed batches; batch i is a pure function of (seed, rank, i).
    The first label names the pattern.
    """

    def __init__(
        self,
        batch_size: int,
        tokens: int,
        patch_size: int,
        num_classes: int,
        num_labels: int,
        seed: int,
        rank: int,
        start: int = 0,
    ):
        self._shape = (batch_size, tokens, 3 * patch_size**2)
        self._classes, self._labels = num_classes, num_labels
        self._seed, self._rank, self._next = seed, rank, start
        self.token_budget = batch_size * tokens

    def __next__(self) -> PackedBatch:
        rng = counter_rng(self._seed, "synthetic", self._rank, self._next)
        batch, tokens, patch_dim = self._shape
        positions = torch.stack(
            [torch.arange(tokens) % 64, torch.arange(tokens) // 8, torch.arange(tokens) % 8], -1
        )
        labels = rng.integers(0, self._classes, (batch, self._labels))
        views = []
        for label in labels[:, 0]:
            pattern = counter_rng(self._seed, "pattern", int(label)).standard_normal(
                patch_dim, "float32"
            )
            patches = pattern + rng.standard_normal((tokens, patch_dim), "float32")
            views.append(View(torch.from_numpy(patches), positions, (1, 1, tokens)))
        index, self._next = self._next, self._next + 1
        ids = torch.arange(batch) + batch * self._rank
        return pack_views(
            views, ids, torch.from_numpy(labels), torch.ones(batch), self.token_budget, index=index
        )
