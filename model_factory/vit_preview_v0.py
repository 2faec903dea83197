"""The source encoder: dense images and clips in, the same trunk and the source key layout.

`LlavaViTEncoder` cuts pixels into patch rows, selects the visible ones and runs the packed trunk;
only visible patches are embedded. Its `state_dict` has the source layout (`conv1.weight`,
`transformer.layers.0...`) of a `backbone.pt`: the key map of `state_dict_adapter` is applied when
one is written or read.

Shape legend: B batch, T frames, K visible patches, L patches of one clip, D width, p patch size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .configuration import LlavaViTPackingConfig
from .packing import compute_patch_positions_from_grid_thw, patchify
from .state_dict_adapter import check_fits, from_packing, to_packing
from .vit_preview_v0_packing_hf import LlavaViTPackingModel


class LlavaViTEncoder(nn.Module):
    """Dense-input encoder over the packed trunk."""

    def __init__(self, config: LlavaViTPackingConfig):
        super().__init__()
        self.config = config
        self.trunk = LlavaViTPackingModel(config)
        # hooks rather than overrides, so that the layout is the same inside any parent module
        self.register_state_dict_post_hook(_to_source_names)
        self.register_load_state_dict_pre_hook(_from_source_names)

    def forward(
        self,
        pixel_values: torch.Tensor,
        visible_indices: torch.Tensor | None = None,
        patch_positions: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encode images [B, 3, H, W] or clips [B, 3, T, H, W].

        visible_indices: integer [B, K] patch indices t*gh*gw + row*gw + column; default all,
        ignored for images and for clips of one frame, as in the source. patch_positions: [L, 3] for
        the whole batch or [B, L, 3], replaces the grid's own positions. Returns visible_embeddings
        [B, K, D] (post-normed) and head_output [B, D], None without a head. Raises ValueError,
        naming the argument and both numbers, for whatever does not fit; checking the range of
        indices on a GPU waits for it once.
        """
        rows, grid = self._rows(pixel_values)
        batch, total = rows.shape[:2]
        positions = self._positions(patch_positions, grid, batch=batch, total=total)
        positions = positions.to(rows.device)
        if visible_indices is not None and grid[0] > 1:
            _check_indices(visible_indices, batch=batch, total=total)
            pick = visible_indices.to(rows.device).long().unsqueeze(-1)
            every_number = pick.expand(-1, -1, rows.shape[-1])
            rows = rows.gather(1, every_number)
            positions = positions.gather(1, pick.expand(-1, -1, 3))
        num_visible = rows.shape[1]
        # equal items: boundaries, and with them the longest item, are known without reading values
        counts = torch.arange(batch + 1, dtype=torch.int32, device=rows.device)
        bounds = counts * num_visible
        out = self.trunk(
            rows.flatten(0, 1),
            patch_positions=positions.flatten(0, 1),
            cu_seqlens=bounds,
            max_seqlen=num_visible,
        )
        return {
            "visible_embeddings": out.last_hidden_state.unflatten(0, (batch, num_visible)),
            "head_output": out.pooler_output,
        }

    def _rows(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Patch rows [B, L, P] and the grid (T, gh, gw) of every clip."""
        shape = list(pixel_values.shape)
        config = self.config
        if len(shape) not in (4, 5) or shape[1] != config.num_channels or 0 in shape:
            raise ValueError(
                f"pixel_values must have shape [B, {config.num_channels}, H, W] or "
                f"[B, {config.num_channels}, T, H, W] with no empty side, got {shape}"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be normalised floats, got {pixel_values.dtype}: subtract the "
                "mean and divide by the standard deviation first"
            )
        clips = pixel_values.unsqueeze(2) if len(shape) == 4 else pixel_values
        frames = clips.transpose(1, 2)
        rows = patchify(frames, config.patch_size)  # [B, T, gh*gw, P]
        height = shape[-2] // config.patch_size
        width = shape[-1] // config.patch_size
        return rows.flatten(1, 2), (rows.shape[1], height, width)

    def _positions(
        self,
        patch_positions: torch.Tensor | None,
        grid: tuple[int, int, int],
        batch: int,
        total: int,
    ) -> torch.Tensor:
        """Positions [B, L, 3]: the given ones, else the grid's own."""
        if patch_positions is None:
            patch_positions = compute_patch_positions_from_grid_thw(torch.tensor([grid]))
        if list(patch_positions.shape) not in ([total, 3], [batch, total, 3]):
            raise ValueError(
                f"patch_positions must have shape [{total}, 3] or [{batch}, {total}, 3], got "
                f"{list(patch_positions.shape)}"
            )
        return patch_positions.expand(batch, -1, -1)

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights, `module.` and `_orig_mod.` prefixes allowed.

        With `strict`, any key layout is read, and ValueError lists every missing, unexpected or
        misshapen tensor by its source name. Without, what fits is loaded, as torch does: q, k and v
        that are stored apart are not joined and count as unexpected.
        """
        if strict:
            state_dict = from_packing(to_packing(state_dict), "source")
            check_fits(state_dict, self.state_dict(), origin="the state_dict")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _to_source_names(
    _encoder: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, _metadata: object
) -> None:
    """Rename the trunk's tensors in a state_dict that is written."""
    inside = prefix + "trunk."
    names = [name for name in state_dict if name.startswith(inside)]
    weights = {name.removeprefix(inside): state_dict.pop(name) for name in names}
    for name, tensor in from_packing(weights, "source").items():
        state_dict[prefix + name] = tensor


def _from_source_names(
    _encoder: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: object
) -> None:
    """Rename tensors in a state_dict that is read; a name of no rule stays, and torch reports
    it."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        inner = name.removeprefix(prefix)
        if inner.startswith("trunk."):  # named as this module's tensors are: nothing to rename
            continue
        try:
            (renamed,) = to_packing({inner: state_dict[name]})
        except ValueError:
            continue
        state_dict[f"{prefix}trunk.{renamed}"] = state_dict.pop(name)


def _check_indices(visible_indices: torch.Tensor, batch: int, total: int) -> None:
    shape = list(visible_indices.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] == 0:
        raise ValueError(
            f"visible_indices must have shape [{batch}, K] with K >= 1 for {batch} clips, got "
            f"{shape}"
        )
    if visible_indices.is_floating_point() or visible_indices.dtype == torch.bool:
        raise ValueError(f"visible_indices must be integers, got {visible_indices.dtype}")
    # both in one tensor, so that a GPU is waited for once
    extremes = torch.stack(visible_indices.aminmax())
    low, high = extremes.tolist()
    if low < 0 or high >= total:
        raise ValueError(
            f"visible_indices run from {low} to {high}, the clip has patches 0 to {total - 1}"
        )
