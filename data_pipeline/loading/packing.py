"""Many views -> one PackedBatch of a fixed number of tokens. The only place that concatenates.

The token count S of a pack is fixed, so a compiled graph sees one shape: what the items leave free
is filled with items of zeros, no longer than the longest real one, that carry sample id -1. Pixels
stay bytes until the device that trains normalises them. Cost: one copy of the bytes.
"""

from dataclasses import dataclass, replace

import torch

from ..errors import DataPipelineError
from .buffers import PackBuffers
from .views import View

CHUNK_ROWS = 256  # normalised at a time on a CPU, so that a chunk stays in its cache


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
    replaced: tuple[tuple[int, int], ...] = ()  # (bad sample, who stands in for it; -1: nobody)
    buffers: PackBuffers | None = None  # where memory for normalised rows comes from

    def hidden_states(self) -> torch.Tensor:
        """Normalised patch rows float32 [S, P], on the device of the pixels."""
        rows = (self.buffers or PackBuffers(self.pixels.device)).rows(
            *self.pixels.shape, torch.float32
        )
        lengths = self.cu_seqlens.diff().long()
        item = torch.repeat_interleave(lengths, output_size=len(rows))
        channels = self.pixels.unflatten(1, (3, -1))
        step = CHUNK_ROWS if rows.device.type == "cpu" else len(rows)
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            gain, offset = self.colours[item[piece]].unbind(1)
            out = rows[piece].unflatten(1, (3, -1)).copy_(channels[piece])
            out.mul_(gain[..., None]).add_(offset[..., None])
        return rows

    def model_inputs(self) -> dict:
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
        return moved if moved.pixels.device == self.pixels.device else replace(moved, buffers=None)

    def pinned(self) -> "PackedBatch":
        """The same batch in pinned host memory, if there is a CUDA device to copy it to."""
        if not torch.cuda.is_available():
            return self
        return self._with_tensors(lambda t: t if t.is_cuda or t.is_pinned() else t.pin_memory())

    def num_bytes(self) -> int:
        """Memory of all tensors."""
        tensors = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _with_tensors(self, change) -> "PackedBatch":
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


def pack_views(
    views: list[View],
    sample_ids: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    token_budget: int | None = None,
    buffers: PackBuffers | None = None,
    **facts,
) -> PackedBatch:
    """Concatenate views in order and fill up to `token_budget` (None: no filling). labels and
    weights may have more rows than there are views; `facts` are further fields of PackedBatch.

    Raises DataPipelineError when the views do not fit.
    """
    lengths = [len(view) for view in views]
    used, longest = sum(lengths), max(lengths)
    budget = used if token_budget is None else token_budget
    if used > budget:
        raise DataPipelineError(
            f"{len(views)} items of {used} tokens do not fit the token budget {budget}"
        )
    fill = [min(longest, budget - start) for start in range(used, budget, longest)]
    device = views[0].pieces[0].device
    pixels = (buffers or PackBuffers(device)).rows(budget, views[0].patch_dim, torch.uint8)
    for view, rows in zip(views, pixels[:used].split(lengths), strict=True):
        view.write(rows)
    pixels[used:] = 0
    positions = torch.zeros(budget, 3, dtype=torch.int64)
    torch.cat([view.positions for view in views], out=positions[:used])
    bounds = torch.tensor([0, *lengths, *fill]).cumsum(0).to(torch.int32)
    colours = torch.stack([view.colour for view in views])
    return PackedBatch(
        pixels=pixels,
        colours=torch.cat([colours, torch.zeros(len(fill), 2, 3)]).to(device),
        patch_positions=positions.to(device),
        cu_seqlens=bounds.to(device),
        max_seqlen=longest,
        grid_thw=torch.tensor([view.grid for view in views] + [(1, 1, n) for n in fill]),
        sample_ids=torch.cat([sample_ids, torch.full((len(fill),), -1, dtype=torch.int64)]),
        labels=labels,
        weights=weights,
        num_samples=len(views),
        num_tokens=used,
        buffers=buffers,
        **facts,
    )


def joined_inputs(batches: list[PackedBatch]) -> dict:
    """Keyword arguments of one forward pass over several batches, one after the other; their items
    stay apart, fillings included."""
    if len(batches) == 1:
        return batches[0].model_inputs()
    starts = torch.tensor([0] + [len(batch.pixels) for batch in batches]).cumsum(0).tolist()
    bounds = [b.cu_seqlens[1:] + start for b, start in zip(batches, starts, strict=False)]
    return {
        "hidden_states": torch.cat([batch.hidden_states() for batch in batches]),
        "patch_positions": torch.cat([batch.patch_positions for batch in batches]),
        "cu_seqlens": torch.cat([batches[0].cu_seqlens[:1], *bounds]),
        "max_seqlen": max(batch.max_seqlen for batch in batches),
    }
