"""From a tower's width to a language model's: the projectors a LLaVA configuration names.

    linear           Linear
    mlp{n}x_gelu     Linear, then n - 1 times GELU and Linear; n from 1
    identity         nothing
    spatial_merge    2 x 2 patches side by side, LayerNorm of each, Linear, GELU, Linear
    vitsplit         vit_split.py, which needs the tower's blocks and is built there

State-dict names of the first two are those of LLaVA's mm_projector. `project` runs any of them on
what any tower of vision_towers.py gives.

Shape legend: B pictures, N tokens, D tower width, H language model's width.
"""

import re

import torch
from torch import nn

from .towers import Grid, TowerStates, VisionTower
from .vit_split import ViTSplit

PROJECTORS = ("linear", "mlp{n}x_gelu", "identity", "spatial_merge", "vitsplit")


class SpatialMerge(nn.Module):
    """Tokens [B, rows * columns, D] in raster order -> [B, N / 4, H]."""

    def __init__(self, width: int, output_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(4 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, output_width)
        )

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """grid: rows and columns, both even. Raises ValueError otherwise."""
        rows, columns = grid
        if rows * columns != tokens.shape[1] or rows % 2 or columns % 2:
            raise ValueError(
                f"{tokens.shape[1]} tokens on a grid of {rows} x {columns} are not whole 2 x 2 "
                "squares: choose a picture size with an even number of patches on both sides"
            )
        squares = self.norm(tokens).unflatten(1, (rows // 2, 2, columns // 2, 2))
        return self.mlp(squares.transpose(2, 3).flatten(3).flatten(1, 2))


def build_projector(kind: str, width: int, output_width: int) -> nn.Module:
    """The projector of a LLaVA `mm_projector_type`. Raises ValueError for an unknown name, and for
    `vitsplit`, which is built by vit_split.ViTSplit."""
    if kind == "linear":
        return nn.Linear(width, output_width)
    if kind == "identity":
        return nn.Identity()
    if kind == "spatial_merge":
        return SpatialMerge(width, output_width)
    layers = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if layers is None:
        raise ValueError(f"mm_projector_type {kind!r}: choose one of {', '.join(PROJECTORS)}")
    parts: list[nn.Module] = [nn.Linear(width, output_width)]
    for _ in range(int(layers[1]) - 1):
        parts += [nn.GELU(), nn.Linear(output_width, output_width)]
    return nn.Sequential(*parts)


def layers_of(projector: nn.Module, tower: VisionTower, select_layer: int) -> list[int]:
    """Absolute indices of the hidden states that a projector reads, ascending."""
    if isinstance(projector, ViTSplit):
        return projector.config.needed(tower.num_layers)
    return [tower.absolute(select_layer)]


def project(
    projector: nn.Module, states: TowerStates, layer: int
) -> tuple[torch.Tensor, list[int]]:
    """(tokens of all items one after another [sum of counts, H], how many of each); `layer`: the
    absolute index of the state that projectors of one state read."""
    if isinstance(projector, ViTSplit):
        return projector.project(states), states.lengths
    tokens = states.patches(states.states[layer])
    if isinstance(projector, SpatialMerge):
        parts = [projector(group, sides).flatten(0, 1) for sides, group in states.maps(tokens)]
        return torch.cat(parts), [length // 4 for length in states.lengths]
    return projector(tokens), states.lengths


def tokens_after(projector: nn.Module, grid: Grid | None, tokens: int) -> int:
    """Tokens that the language model receives for an item of so many. Raises ValueError for a grid
    that cannot be merged."""
    if not isinstance(projector, SpatialMerge):
        return tokens
    if grid is None or grid[1] % 2 or grid[2] % 2:
        raise ValueError(
            f"a grid of {grid} patches is not made of 2 x 2 squares: choose a picture size with an "
            "even number of patches on both sides, and whole frames of clips"
        )
    return tokens // 4
