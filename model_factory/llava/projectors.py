"""Projectors from a tower's width to a language model's, by the names of a LLaVA configuration.

    linear           Linear
    mlp{n}x_gelu     Linear, then n - 1 times GELU and Linear; n from 1
    identity         nothing
    spatial_merge    2 x 2 patches side by side, LayerNorm of each, Linear, GELU, Linear
    vitsplit         vit_split.py, which needs the tower's blocks and is built there

State-dict names of the first two are those of LLaVA's mm_projector. `project` runs any of them on
the states of any tower of towers.py.

Shape legend: B images, N tokens, D tower width, H language model's width.
"""

import re

import torch
from torch import nn

from .towers import Grid, TowerStates, VisionTower
from .vit_split import ViTSplit

PROJECTORS = ("linear", "mlp{n}x_gelu", "identity", "spatial_merge", "vitsplit")


class SpatialMerge(nn.Module):
    """Tokens [B, N / 4, H] of tokens [B, N = rows * columns, D] in raster order."""

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
        normed = self.norm(tokens)
        squares = normed.unflatten(1, (rows // 2, 2, columns // 2, 2))
        merged = squares.transpose(2, 3).flatten(3)  # [B, rows / 2, columns / 2, 4 * D]
        return self.mlp(merged.flatten(1, 2))


def build_projector(kind: str, width: int, output_width: int) -> nn.Module:
    """The projector of a LLaVA `mm_projector_type`. Raises ValueError for an unknown name, and for
    `vitsplit`, which is built by vit_split.ViTSplit."""
    if kind == "linear":
        return nn.Linear(width, output_width)
    if kind == "identity":
        return nn.Identity()
    if kind == "spatial_merge":
        return SpatialMerge(width, output_width)
    depth = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if depth is None:
        raise ValueError(f"mm_projector_type {kind!r}: choose one of {', '.join(PROJECTORS)}")
    mlp = nn.Sequential(nn.Linear(width, output_width))
    for _ in range(int(depth[1]) - 1):
        mlp.append(nn.GELU())
        mlp.append(nn.Linear(output_width, output_width))
    return mlp


def layers_of(projector: nn.Module, tower: VisionTower, select_layer: int) -> list[int]:
    """Absolute indices of the hidden states that a projector reads, ascending."""
    if isinstance(projector, ViTSplit):
        return projector.config.needed(tower.num_layers)
    return [tower.absolute(select_layer)]


def project(
    projector: nn.Module, states: TowerStates, layer: int
) -> tuple[torch.Tensor, list[int]]:
    """(tokens of all items one after another [sum of counts, H], their counts).

    layer: absolute index of the state that is read, except by ViT-Split, which names its own.
    """
    if isinstance(projector, ViTSplit):
        return projector.project(states), states.lengths
    tokens = states.patches(states.states[layer])
    if isinstance(projector, SpatialMerge):
        merged = []
        for grid, maps in states.maps(tokens):
            merged.append(projector(maps, grid).flatten(0, 1))
        # 2 x 2 patches make one token
        return torch.cat(merged), [length // 4 for length in states.lengths]
    return projector(tokens), states.lengths


def tokens_after(projector: nn.Module, grid: Grid | None, tokens: int) -> int:
    """Tokens that the language model receives for an item of `tokens`. Raises ValueError for a grid
    that cannot be merged."""
    if not isinstance(projector, SpatialMerge):
        return tokens
    if grid is None or grid[1] % 2 or grid[2] % 2:
        raise ValueError(
            f"a grid of {grid} patches is not made of 2 x 2 squares: choose a picture size with an "
            "even number of patches on both sides, and whole frames of clips"
        )
    return tokens // 4  # 2 x 2 patches make one token
