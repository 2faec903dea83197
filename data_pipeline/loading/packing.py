"""Many views -> one PackedBatch of a fixed number of tokens. The only place that concatenates.

The token count S of a pack is fixed, so a compiled graph sees one shape: what the items leave free
is filled with items of zeros, no longer than the longest real one, that carry sample id -1. Pixels
stay bytes until the device that trains normalises them. Cost: one copy of the bytes.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..errors import DataPipelineError
from .views import View

CHUNK_ROWS = 256  # normalised at a time on a CPU, so that a chunk stays in its cache


class PackBuffers:
    """Host memory that packs are written into, for several threads.

    Fresh pages cost more than the copy into them: 16 clips of 2048 tokens of 16 px are 25 MB, and
    memory just mapped is cleared page by page by the system. So a block is handed out again, but
    only after the last tensor that shows it is gone. On a CUDA machine torch's cache of pinned
    memory does the same and makes copies to the device asynchronous.
    """

    def __init__(self, device: torch.device):
        """device: where the rows are wanted; on a CPU beside a CUDA device they are pinned."""
        self._device = device
        self._pinned = device.type == "cpu" and torch.cuda.is_available()
        self._free: dict[int, list[np.ndarray]] = {}  # bytes -> blocks of that size

    def rows(self, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[count, width] of undefined content."""
        if self._pinned or self._device.type != "cpu":
            return torch.empty(
                count, width, dtype=dtype, device=self._device, pin_memory=self._pinned
            )
        size = count * width * dtype.itemsize
        free = self._free.setdefault(size, [])
        try:
            block = free.pop()  # one step for the interpreter, so no two threads get one block
        except IndexError:
            block = np.empty(size, np.uint8)
        # A view of its own: tensors refer to it, and it dies with the last of them.
        lease = block[:]
        # no lock: a finalizer may run inside any allocation, also in the thread that would hold it
        weakref.finalize(lease, free.append, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(count, width)


@dataclass(frozen=True)
class PackedBatch:
    """One pack. The first `num_samples` items are samples, the rest fills the token budget.

    pixels           uint8 [S, P]       patch rows
    colours          float32 [N, 2, 3]  gain and offset per channel that normalise an item's bytes
    patch_positions  int64 [S, 3]       (t, h, w)
    cu_seqlens       int32 [N + 1]      item boundaries; the truth also for sparse items
    max_seqlen       int                longest item, known on the host
    grid_thw         int64 [N, 3]       (1, 1, K) for sparse items
    sample_ids       int64 [N]          -1 for filling
    labels           int64 [R, L]       of the samples, then rows of -1; -1 is ignored
    weights          float32 [R]        0 for the padding of an epoch's tail and for empty rows

    R is num_samples, or more when another rank has more samples: losses need equal shapes.
    """

    pixels: torch.Tensor
    colours: torch.Tensor
    patch_positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    grid_thw: torch.Tensor
    sample_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    num_samples: int
    num_tokens: int  # tokens of samples, without filling
    epoch: int = 0
    index: int = 0  # of the global batch in its epoch
    replaced: tuple[tuple[int, int], ...] = ()  # (bad sample, its reserve; -1: none)
    buffers: PackBuffers | None = None  # where memory for normalised rows comes from

    def hidden_states(self) -> torch.Tensor:
        """Normalised patch rows float32 [S, P], on the device of the pixels."""
        buffers = self.buffers or PackBuffers(self.pixels.device)
        count, width = self.pixels.shape
        rows = buffers.rows(count, width, dtype=torch.float32)
        lengths = self.cu_seqlens.diff().long()
        item = torch.repeat_interleave(lengths, output_size=len(rows))
        channels = self.pixels.unflatten(1, (3, -1))
        step = CHUNK_ROWS if rows.device.type == "cpu" else len(rows)
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            gain, offset = self.colours[item[piece]].unbind(1)
            # bytes become floats in the copy; then x * gain + offset of the item's channels
            out = rows[piece].unflatten(1, (3, -1))
            out.copy_(channels[piece])
            out.mul_(gain[..., None]).add_(offset[..., None])
        return rows

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of LlavaViTPackingModel.forward."""
        return {
            "hidden_states": self.hidden_states(),
            "patch_positions": self.patch_positions,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
        }

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on a device; copies from pinned memory do not wait."""
        moved = self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        if moved.pixels.device == self.pixels.device:
            return moved
        # these buffers give memory of the device that the batch came from
        return replace(moved, buffers=None)

    def pinned(self) -> "PackedBatch":
        """The same batch in pinned host memory, if there is a CUDA device to copy it to."""
        if not torch.cuda.is_available():
            return self

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()

        return self._with_tensors(pin)

    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, torch.Tensor]:
        fields = vars(self).items()
        return {name: value for name, value in fields if isinstance(value, torch.Tensor)}

    def _with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        changed: dict[str, Any] = {}
        for name, tensor in self._tensors().items():
            changed[name] = change(tensor)
        return replace(self, **changed)


def pack_views(
    views: list[View],
    sample_ids: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    token_budget: int | None = None,
    buffers: PackBuffers | None = None,
    epoch: int = 0,
    index: int = 0,
    replaced: tuple[tuple[int, int], ...] = (),
) -> PackedBatch:
    """Concatenate views in order and fill up to `token_budget` (None: no filling). labels and
    weights may have more rows than there are views; the rest are fields of PackedBatch.

    Raises DataPipelineError when the views do not fit.
    """
    lengths = [len(view) for view in views]
    used = sum(lengths)
    longest = max(lengths)
    budget = used if token_budget is None else token_budget
    if used > budget:
        raise DataPipelineError(
            f"{len(views)} items of {used} tokens do not fit the token budget {budget}"
        )
    # in pieces no longer than the longest sample, which max_seqlen and attention's cost follow
    fill = [min(longest, budget - start) for start in range(used, budget, longest)]
    device = views[0].pieces[0].device
    buffers_here = buffers or PackBuffers(device)
    pixels = buffers_here.rows(budget, width=views[0].patch_dim, dtype=torch.uint8)
    rows_of_views = pixels[:used].split(lengths)
    for view, rows in zip(views, rows_of_views, strict=True):
        view.write(rows)
    pixels[used:] = 0  # buffers come with undefined content
    positions = torch.zeros(budget, 3, dtype=torch.int64)
    torch.cat([view.positions for view in views], out=positions[:used])
    item_lengths = torch.tensor([0, *lengths, *fill])
    bounds = item_lengths.cumsum(0).to(torch.int32)
    colours = [view.colour for view in views]
    colours += [torch.zeros(2, 3)] * len(fill)
    grids = [view.grid for view in views]
    grids += [(1, 1, length) for length in fill]
    no_ids = torch.full((len(fill),), -1, dtype=torch.int64)
    return PackedBatch(
        pixels=pixels,
        colours=torch.stack(colours).to(device),
        patch_positions=positions.to(device),
        cu_seqlens=bounds.to(device),
        max_seqlen=longest,
        grid_thw=torch.tensor(grids),
        sample_ids=torch.cat([sample_ids, no_ids]),
        labels=labels,
        weights=weights,
        num_samples=len(views),
        num_tokens=used,
        buffers=buffers,
        epoch=epoch,
        index=index,
        replaced=replaced,
    )


def joined_inputs(batches: list[PackedBatch]) -> dict[str, Any]:
    """Keyword arguments of one forward pass over several batches, one after the other; their items
    stay apart, fillings included."""
    if len(batches) == 1:
        return batches[0].model_inputs()
    bounds = [batches[0].cu_seqlens[:1]]  # the leading 0, once
    start = 0
    for batch in batches:
        bounds.append(batch.cu_seqlens[1:] + start)
        start += len(batch.pixels)
    return {
        "hidden_states": torch.cat([batch.hidden_states() for batch in batches]),
        "patch_positions": torch.cat([batch.patch_positions for batch in batches]),
        "cu_seqlens": torch.cat(bounds),
        "max_seqlen": max(batch.max_seqlen for batch in batches),
    }
