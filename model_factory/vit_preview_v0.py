"""The source encoder: dense pictures and clips in, the same trunk and the source key layout.

`LlavaViTEncoder` cuts pixels into patch rows, keeps the visible ones and runs the packed trunk;
only the chosen patches are ever embedded. Its `state_dict` speaks the source layout
(`conv1.weight`, `transformer.layers.0...`), what a `backbone.pt` holds: the key map of
`state_dict_adapter` is applied on the way in and out.

Shape legend: B batch, T frames, K visible patches, L patches of one clip, D width, p patch size.
"""

import torch
from torch import nn

from .packing import compute_patch_positions_from_grid_thw, patchify
from .state_dict_adapter import packing_to_source, source_to_packing, strip_wrappers
from .vit_preview_v0_packing_hf import LlavaViTPackingConfig, LlavaViTPackingModel


class LlavaViTEncoder(nn.Module):
    """Dense-input encoder over the packed trunk."""

    def __init__(self, config: LlavaViTPackingConfig):
        super().__init__()
        self.config = config
        self.trunk = LlavaViTPackingModel(config)

    def forward(
        self,
        x: torch.Tensor,
        visible_indices: torch.Tensor | None = None,
        patch_positions: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encode pictures [B, 3, H, W] or clips [B, 3, T, H, W].

        visible_indices: integer [B, K] linear patch numbers t*gh*gw + row*gw + column; default all,
        ignored for pictures. patch_positions: [L, 3], replaces the grid's own positions for the
        whole batch. Returns visible_embeddings [B, K, D] (post-normed) and head_output [B, D].
        Raises ValueError for indices or positions that do not fit the clip.
        """
        clips = x.unsqueeze(2) if x.ndim == 4 else x
        rows = patchify(clips.transpose(1, 2), self.config.patch_size)  # [B, T, gh*gw, P]
        batch, frames = rows.shape[:2]
        grid = [
            frames,
            clips.shape[-2] // self.config.patch_size,
            clips.shape[-1] // self.config.patch_size,
        ]
        rows = rows.flatten(1, 2)
        positions = patch_positions
        if positions is None:
            positions = compute_patch_positions_from_grid_thw(torch.tensor([grid], device=x.device))
        total = rows.shape[1]
        if tuple(positions.shape) != (total, 3):
            raise ValueError(
                f"patch_positions must have shape [{total}, 3], got {list(positions.shape)}"
            )
        positions = positions.expand(batch, -1, -1)
        if visible_indices is not None and frames > 1:
            _check_indices(visible_indices, total)
            pick = visible_indices.long().unsqueeze(-1)
            rows = rows.gather(1, pick.expand(-1, -1, rows.shape[-1]))
            positions = positions.gather(1, pick.expand(-1, -1, 3))
        kept = rows.shape[1]
        out = self.trunk(
            rows.flatten(0, 1),
            patch_positions=positions.flatten(0, 1),
            cu_seqlens=torch.arange(batch + 1, dtype=torch.int32, device=x.device) * kept,
            max_seqlen=kept,
        )
        return {
            "visible_embeddings": out.last_hidden_state.unflatten(0, (batch, kept)),
            "head_output": out.pooler_output,
        }

    def state_dict(self, *args, **kwargs):
        """Weights in the source key layout."""
        return packing_to_source(self.trunk.state_dict(*args, **kwargs))

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load weights in the source key layout, `module.` and `_orig_mod.` prefixes allowed."""
        return self.trunk.load_state_dict(
            source_to_packing(strip_wrappers(state_dict)), strict=strict, assign=assign
        )


def _check_indices(visible_indices: torch.Tensor, total: int) -> None:
    low, high = int(visible_indices.min()), int(visible_indices.max())
    if low < 0 or high >= total:
        raise ValueError(
            f"visible_indices run from {low} to {high}, the clip has patches 0 to {total - 1}"
        )
