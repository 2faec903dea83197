"""ViT-Split: a projector with a trainable copy of the tower's last blocks and a small CNN.

    prior head   F frozen hidden states, concatenated -> two convolutions
    task head    copies of K blocks, whose input is the frozen state just before them
    fusion       both concatenated -> two convolutions to the language model's width

    F  K   output
    >0 >0  fusion of both
    >0  0  the prior head alone, to the language model's width
    0  >0  the task head, GELU, Linear

Hidden states have absolute indices: 0 is the input of the first block, i the output of block i - 1.
Published numbers count from the end (-1: the last block's output) and leave the last block out:
K = 1 copies the last but one. No gradient reaches the tower.

Two things differ from the published code on purpose. A copied block may receive the class and
register tokens too (`keep_extra_tokens`), so that it starts exactly at the pretrained function, and
they are dropped after it. Where K = 0 the convolutions preserve the border; `published_border`
brings the published one back (a 1x1 convolution with padding 1, whose border is constant).

Shape legend: B images, N patches, E extra tokens, D tower width, H language model's width.
"""

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from .towers import TowerStates


@dataclass(frozen=True)
class ViTSplitConfig:
    """Shape of the projector.

    frozen_layers  negative numbers of the prior head's hidden states, in order of concatenation
    tuned_layers   K
    """

    tower_width: int
    output_width: int
    frozen_layers: tuple[int, ...] = (-2,)
    tuned_layers: int = 1
    keep_extra_tokens: bool = True
    published_border: bool = False

    def __post_init__(self) -> None:
        if self.tuned_layers < 0:
            raise ValueError(f"tuned_layers is {self.tuned_layers}, must be at least 0")
        if not self.frozen_layers and self.tuned_layers < 1:
            raise ValueError(
                "ViT-Split needs frozen layers or tuned layers: give --mm_frozen_select_layer or "
                "--mm_tuned_layers_num"
            )
        if any(layer >= 0 for layer in self.frozen_layers):
            raise ValueError(f"frozen layers {self.frozen_layers} count from the end: below 0")

    @property
    def task_input(self) -> int:
        """Negative number of the hidden state that is the input of the first copied block."""
        return -(self.tuned_layers + 2)

    def needed(self, num_layers: int) -> list[int]:
        """Absolute indices of the hidden states that `forward` takes, ascending."""
        layers = list(self.frozen_layers)
        if self.tuned_layers:
            layers.append(self.task_input)
        absolute = sorted({num_layers + 1 + layer for layer in layers})
        if absolute[0] < 0:
            raise ValueError(
                f"a tower of {num_layers} layers has no hidden state {min(layers)}: choose later "
                "frozen layers or fewer tuned ones"
            )
        return absolute


class ViTSplit(nn.Module):
    """The projector; `blocks` are the tower's, of which the K before the last one are copied."""

    def __init__(self, config: ViTSplitConfig, blocks: nn.ModuleList):
        """Raises ValueError for a tower with too few blocks."""
        super().__init__()
        config.needed(len(blocks))
        self.config = config
        self.num_layers = len(blocks)
        self.prior_width = config.tower_width * len(config.frozen_layers)
        out = config.output_width
        tuned = config.tuned_layers
        self.tuned_head = nn.ModuleList(
            copy.deepcopy(block)
            for block in blocks[-(tuned + 1) : -1]  # empty for K = 0
        )
        self.tuned_head.requires_grad_(True)  # copies of a frozen tower's blocks are frozen too
        self.frozen_conv: nn.Sequential | None = None
        self.fusion_conv: nn.Sequential | None = None
        self.proj: nn.Sequential | None = None
        if config.frozen_layers and tuned:
            self.frozen_conv = _convolutions(self.prior_width, self.prior_width)
            self.fusion_conv = _convolutions(self.prior_width + config.tower_width, out)
        elif config.frozen_layers:
            # 1 in all: the 3 x 3 convolution needs it to keep the map's size; given to the 1 x 1
            # convolution instead, it brings the size back with a border of constants
            spatial_padding = 0 if config.published_border else 1
            self.frozen_conv = nn.Sequential(
                nn.Conv2d(self.prior_width, self.prior_width, 3, padding=spatial_padding),
                nn.GELU(),
                nn.Conv2d(self.prior_width, out, 1, padding=1 - spatial_padding),
                nn.GELU(),
            )
        else:
            self.proj = nn.Sequential(nn.GELU(), nn.Linear(config.tower_width, out))

    def forward(
        self,
        hidden_states: Mapping[int, torch.Tensor],
        num_extra_tokens: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Tokens [B, N, H] of hidden states [B, E + N, D] by absolute index; `config.needed` lists
        the indices.

        grid: rows and columns of the patches; without it they must be a square.
        """
        any_state = next(iter(hidden_states.values()))
        batch, tokens = any_state.shape[:2]
        patches = tokens - num_extra_tokens
        if grid is None:
            side = math.isqrt(patches)
            if side * side != patches:
                raise ValueError(f"{patches} patches are no square: give the grid")
            grid = (side, side)
        rows, columns = grid
        if rows * columns != patches:
            raise ValueError(f"a grid of {rows} x {columns} has not {patches} patches")
        states = TowerStates(
            states=dict(hidden_states),
            lengths=[patches] * batch,
            grids=[(1, rows, columns)] * batch,
            extra=num_extra_tokens,
        )
        return self.project(states).unflatten(0, (batch, -1))

    def project(self, states: TowerStates) -> torch.Tensor:
        """Tokens [sum of lengths, H] of a tower's states; every frame of a clip is a map of its
        own.

        Raises ValueError where convolutions would meet patches that fill no grid.
        """
        if self.proj is not None:
            return self.proj(self._task(states))
        assert self.frozen_conv is not None  # there are frozen layers, or `proj`
        frozen = [self._state(states, layer) for layer in self.config.frozen_layers]
        inputs = [states.patches(state) for state in frozen]
        if self.fusion_conv is not None:
            inputs.append(self._task(states))
        # both heads' channels go through `maps` together, so that they are cut alike
        out = []
        for grid, group in states.maps(torch.cat(inputs, dim=-1)):
            maps = group.unflatten(1, grid).movedim(-1, 1)  # [frames, channels, rows, columns]
            prior = maps[:, : self.prior_width]
            fused = self.frozen_conv(prior)
            if self.fusion_conv is not None:
                task = maps[:, self.prior_width :]
                fused = self.fusion_conv(torch.cat([fused, task], dim=1))
            channels_last = fused.movedim(1, -1)
            out.append(channels_last.flatten(0, 2))
        return torch.cat(out)

    def _task(self, states: TowerStates) -> torch.Tensor:
        """Output of the copied blocks, patches only [sum of lengths, D]."""
        x = self._state(states, self.config.task_input)
        extra = states.extra
        args, kwargs = states.call or ((), None)
        if not self.config.keep_extra_tokens and extra:
            if any(isinstance(value, torch.Tensor) for value in [*args, *(kwargs or {}).values()]):
                raise ValueError(
                    "this tower's blocks know where each token is, so class and register tokens "
                    "cannot be left out before them: keep_extra_tokens must stay on"
                )
            x = x[:, extra:]
            extra = 0
        for block in self.tuned_head:
            options = _without_masks(block) if kwargs is None else kwargs
            out = block(x, *args, **options)
            x = out[0] if isinstance(out, tuple) else out
        return replace(states, extra=extra).patches(x)

    def _state(self, states: TowerStates, layer: int) -> torch.Tensor:
        index = self.num_layers + 1 + layer
        if index not in states.states:
            raise ValueError(f"hidden state {index} ({layer} from the end) was not given")
        return states.states[index].detach()


def _without_masks(block: nn.Module) -> dict[str, None]:
    """Arguments that a block requires beside its input: masks, one or two of them, depending on
    the release of transformers."""
    parameters = inspect.signature(block.forward).parameters
    others = list(parameters.values())[1:]
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    masks: dict[str, None] = {}
    for parameter in others:
        if parameter.kind is plain and parameter.default is parameter.empty:
            masks[parameter.name] = None
    return masks


def _convolutions(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, out, 1),
        nn.GELU(),
        nn.Conv2d(out, out, 3, padding=1),
        nn.GELU(),
    )
