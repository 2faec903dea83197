"""Many views -> one PackedBatch of a fixed number of tokens. The only place that concatenates.

The token count S of a pack is fixed, so a compiled graph sees one shape: what the items leave free
is filled with zero patches, cut into items no longer than the longest real one, that carry sample
id -1 and weight 0.
"""

from dataclasses import dataclass, replace

import torch

from ..errors import DataPipelineError
from .views import View


@dataclass(frozen=True)
class PackedBatch:
    """One pack. The first `num_samples` items are samples, the rest fills the token budget.

    hidden_states    float32 [S, P]     normalised patch rows
    patch_positions  int64 [S, 3]       (t, h, w)
    cu_seqlens       int32 [N + 1]      item boundaries; the truth also for sparse items
    max_seqlen       int                longest item, known on the host
    grid_thw         int64 [N, 3]       (1, 1, K) for sparse items
    sample_ids       int64 [N]          -1 for filling
    labels           int64 [n, L]       of the samples; -1 is ignored
    weights          float32 [n]        0 for the padding of an epoch's tail
    """

    hidden_states: torch.Tensor
    patch_positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    grid_thw: torch.Tensor
    sample_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    num_tokens: int  # tokens of samples, without filling
    epoch: int = 0
    index: int = 0

    @property
    def num_samples(self) -> int:
        """Items that are samples."""
        return len(self.weights)

    def model_inputs(self) -> dict:
        """Keyword arguments of LlavaViTPackingModel.forward."""
        return {
            "hidden_states": self.hidden_states,
            "patch_positions": self.patch_positions,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
        }

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on a device."""
        moved = {
            k: v.to(device, non_blocking=True)
            for k, v in vars(self).items()
            if isinstance(v, torch.Tensor)
        }
        return replace(self, **moved)


def pack_views(
    views: list[View],
    sample_ids: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    token_budget: int | None = None,
    epoch: int = 0,
    index: int = 0,
) -> PackedBatch:
    """Concatenate views in order and fill up to `token_budget` (None: no filling).

    Raises DataPipelineError when the views do not fit.
    """
    lengths = [len(view.patches) for view in views]
    used, longest = sum(lengths), max(lengths)
    budget = used if token_budget is None else token_budget
    if used > budget:
        raise DataPipelineError(
            f"{len(views)} items of {used} tokens do not fit the token budget {budget}"
        )
    fill = [min(longest, budget - start) for start in range(used, budget, longest)]
    patch_dim = views[0].patches.shape[1]
    patches = torch.cat(
        [view.patches for view in views] + [torch.zeros(n, patch_dim) for n in fill]
    )
    positions = torch.cat(
        [view.positions for view in views] + [torch.zeros(n, 3, dtype=torch.int64) for n in fill]
    )
    grids = [view.grid for view in views] + [(1, 1, n) for n in fill]
    bounds = torch.tensor([0, *lengths, *fill]).cumsum(0).to(torch.int32)
    filler = torch.full((len(fill),), -1, dtype=torch.int64)
    return PackedBatch(
        hidden_states=patches,
        patch_positions=positions,
        cu_seqlens=bounds,
        max_seqlen=longest,
        grid_thw=torch.tensor(grids),
        sample_ids=torch.cat([sample_ids, filler]),
        labels=labels,
        weights=weights,
        num_tokens=used,
        epoch=epoch,
        index=index,
    )
