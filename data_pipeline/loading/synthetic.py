"""The loader's contract without files: noise around one pattern per class,
for smoke runs and the throughput ceiling.
"""

import torch

from ..random import counter_rng
from .buffers import PackBuffers
from .packing import PackedBatch, pack_views
from .views import View


class SyntheticStream:
    """Endless packed batches; batch i is a pure function of (seed, rank, i).
    The first label names the pattern.
    """

    activity = "making noise"

    def __init__(
        self,
        batch_size: int,
        tokens: int,
        patch_size: int,
        num_classes: int,
        num_labels: int,
        seed: int,
        rank: int,
    ):
        self._shape = (batch_size, tokens, patch_size)
        self._classes, self._labels = num_classes, num_labels
        self._seed, self._rank, self._next = seed, rank, 0
        self.plan_sha256 = f"noise {self._shape} {num_classes} {num_labels} {seed}"
        self._buffers = PackBuffers(torch.device("cpu"))

    def seek(self, epoch: int, next_batch: int) -> None:
        """Go on with this batch; noise has one epoch."""
        self._next = next_batch

    def __next__(self) -> PackedBatch:
        rng = counter_rng(self._seed, "synthetic", self._rank, self._next)
        batch, tokens, patch_size = self._shape
        shape = (3, patch_size, patch_size)
        positions = torch.stack(
            [torch.arange(tokens) % 64, torch.arange(tokens) // 8, torch.arange(tokens) % 8], -1
        )
        labels = rng.integers(0, self._classes, (batch, self._labels))
        views = []
        for label in labels[:, 0]:
            pattern = counter_rng(self._seed, "pattern", int(label)).integers(64, 192, shape)
            pixels = pattern + rng.integers(-64, 64, (tokens, *shape))
            pieces = (torch.from_numpy(pixels.astype("uint8")),)
            views.append(View(pieces, positions, (1, 1, tokens)))
        index, self._next = self._next, self._next + 1
        ids = torch.arange(batch) + batch * self._rank
        labels, weights = torch.from_numpy(labels), torch.ones(batch)
        return pack_views(views, ids, labels, weights, None, self._buffers, index=index)

    def count_bad(self, epoch: int, bad: list[int], reasons: dict | None = None) -> int:
        """Noise is never bad."""
        return 0

    def close(self) -> None:
        """Nothing to close."""
