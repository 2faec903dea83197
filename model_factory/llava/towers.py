"""Any registered vision model behind one face: pictures or packs in, hidden states by index out.

    PictureTower   a transformers vision model of pictures (CLIP, SigLIP, DINOv2, ...), by watching
                   what enters its blocks: no model needs to know how to export its states
    PackedTower    our encoder, for pictures of any size, whole frames and codec patches alike
    ConvTower      a hierarchical network, whose only state is its last map (convnext_tower.py)

Hidden state 0 is what enters the first block, i what leaves block i - 1; numbers below zero count
from the end. A tower that learns nothing runs without a graph. Cost: that of the model.

Shape legend: B pictures, N patches of one, E extra tokens before them (class, registers), D width,
S tokens of a pack, L blocks, p patch size.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import AutoModel, ConvNextModel, PreTrainedModel

from ..llava_vision_tower import LlavaViTVisionModel
from ..pack_layout import PackLayout
from ..packing import compute_patch_positions_from_grid_thw, patchify
from .convnext import ConvNextVisionModel

Grid = tuple[int, int, int]  # frames, rows, columns


@dataclass(frozen=True)
class VisualInputs:
    """Pictures, or a pack of pictures and clips.

    pixel_values  float [B, 3, H, W], normalised
    rows          float [S, 3*p*p] patch rows, normalised
    positions     int64 [S, 3]
    lengths       int64 [N items]
    grids         int64 [N items, 3] frames, rows, columns; zeros for patches that fill no grid
    """

    pixel_values: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    grids: torch.Tensor | None = None

    def to(self, device) -> "VisualInputs":
        """The same on a device; lengths and grids stay on the host, where they are read."""
        moved = {"pixel_values": self.pixel_values, "rows": self.rows, "positions": self.positions}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if v is not None})


@dataclass(frozen=True)
class TowerStates:
    """Hidden states by absolute index as the blocks see them, and how to read them.

    states   [S, D] of a pack, or [B, E + N, D]
    lengths  patches of each item
    grids    of each item; None for patches that fill no grid
    extra    E
    call     what a block is called with beside its state; None: nothing but its masks, absent
    cross    cross tokens [L, items, D] of every layer, of a tower that has them
    positions  int64 [sum of lengths, 3] of a pack's patches, for states that were stored
    """

    states: dict[int, torch.Tensor]
    lengths: list[int]
    grids: list[Grid | None]
    extra: int = 0
    call: tuple[tuple, dict] | None = None
    cross: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def to(self, device, dtype: torch.dtype | None = None) -> "TowerStates":
        """The same on a device, for states that were stored."""
        moved = {index: state.to(device, dtype) for index, state in self.states.items()}
        where = None if self.positions is None else self.positions.to(device)
        return replace(self, states=moved, positions=where)

    def patches(self, state: torch.Tensor) -> torch.Tensor:
        """[sum of lengths, D] of a state in the blocks' own layout."""
        return state if state.ndim == 2 else state[:, self.extra :].flatten(0, 1)

    def maps(self, tokens: torch.Tensor):
        """((rows, columns), [frames, rows * columns, D]) of runs of items with equal sides, of
        tokens [sum of lengths, D]. Raises ValueError for patches that fill no grid."""
        runs: list[list] = []
        for grid, length in zip(self.grids, self.lengths, strict=True):
            if grid is None:
                raise ValueError(
                    f"{length} patches fill no grid, so neighbours cannot be merged or convolved: "
                    "give whole frames, or choose the projector mlp2x_gelu"
                )
            if not runs or runs[-1][0] != grid[1:]:
                runs.append([grid[1:], 0])
            runs[-1][1] += length
        for (sides, _), part in zip(runs, tokens.split([n for _, n in runs]), strict=True):
            yield sides, part.unflatten(0, (-1, sides[0] * sides[1]))


@dataclass
class _Record:
    """What entered watched blocks."""

    states: dict[int, torch.Tensor] = field(default_factory=dict)
    call: tuple[tuple, dict] | None = None


class VisionTower(nn.Module):
    """Common to all: `model`, `blocks`, `num_layers`, `width`."""

    blocks: nn.ModuleList | tuple = ()

    def __init__(self, model: nn.Module, width: int):
        super().__init__()
        self.model, self.width = model, width

    @property
    def num_layers(self) -> int:
        """Blocks; hidden states are one more."""
        return len(self.blocks)

    def absolute(self, layer: int) -> int:
        """Index of a hidden state. Raises ValueError for one that the tower has not."""
        index = layer if layer >= 0 else self.num_layers + 1 + layer
        if not 0 <= index <= self.num_layers:
            raise ValueError(
                f"a tower of {self.num_layers} layers has no hidden state {layer}: choose one from "
                f"{-self.num_layers - 1} to {self.num_layers}"
            )
        return index

    def forward(self, visuals: VisualInputs, layers: Iterable[int]) -> TowerStates:
        """States of the asked layers (absolute indices)."""
        learns = any(p.requires_grad for p in self.model.parameters())
        with contextlib.nullcontext() if learns else torch.no_grad():
            return self._states(visuals, list(layers))

    def train_from(self, stage: int | None) -> None:
        """Let the stages from a number on learn. Raises ValueError for a tower without stages."""
        raise ValueError(
            f"{type(self.model).__name__} has no stages: --tune_vit_from_layer is for ConvNeXt"
        )

    def tokens_of(self, grid: Grid | None, patches: int) -> int:
        """Tokens that a projector receives for an item of so many patches."""
        return patches

    def with_call(self, states: TowerStates) -> TowerStates:
        """Stored states with what blocks are called with beside them; here nothing but masks."""
        return states

    def patches_of(self, height: int, width: int) -> Grid:
        """Grid of a picture. Raises ValueError for sides that do not fit."""
        raise NotImplementedError

    def _states(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        raise NotImplementedError

    @contextlib.contextmanager
    def _watched(self, layers: list[int]):
        """Records the states that enter blocks, and what the last block gives."""
        record, last = _Record(), self.num_layers

        def before(index):
            def hook(_block, args, kwargs):
                given = args[0] if args else kwargs["hidden_states"]
                others = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                record.states[index], record.call = given, (args[1:], others)

            return hook

        def after(_block, _args, out):
            record.states[last] = out[0] if isinstance(out, tuple) else out

        wanted = {i for i in layers if i < last} | {0}
        handles = [
            self.blocks[i].register_forward_pre_hook(before(i), with_kwargs=True) for i in wanted
        ]
        handles.append(self.blocks[-1].register_forward_hook(after))
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()


class PictureTower(VisionTower):
    """A transformers vision model; every picture of a batch has one size."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, model.config.hidden_size)
        self.patch_size: int = model.config.patch_size

    @property
    def blocks(self) -> nn.ModuleList:
        """The list of blocks, wherever the model keeps it."""
        count = self.model.config.num_hidden_layers
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise ValueError(f"{type(self.model).__name__} has no list of {count} blocks")

    def patches_of(self, height: int, width: int) -> Grid:
        """Convolutions leave out what does not fill a patch."""
        return 1, height // self.patch_size, width // self.patch_size

    def _states(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        pixels = visuals.pixel_values
        if pixels is None:
            raise ValueError(
                f"{type(self.model).__name__} takes pictures, not packs: give clips as frames"
            )
        grid = self.patches_of(*pixels.shape[-2:])
        with self._watched(layers) as record:
            self.model(pixel_values=pixels.to(self.model.dtype))
        tokens = record.states[0].shape[1]
        extra = tokens - grid[1] * grid[2]
        states = {index: record.states[index] for index in layers}
        count = len(pixels)
        return TowerStates(states, [tokens - extra] * count, [grid] * count, extra, record.call)


class PackedTower(VisionTower):
    """Our encoder: pictures and clips of any size side by side."""

    def __init__(self, model: LlavaViTVisionModel):
        super().__init__(model, model.config.hidden_size)

    @property
    def blocks(self) -> nn.ModuleList:
        """Of the packed encoder."""
        return self.model.packing.encoder.layers

    def patches_of(self, height: int, width: int) -> Grid:
        """Sides must be multiples of the patch size."""
        return 1, *self.model.grid(height, width)

    def packed(self, visuals: VisualInputs) -> VisualInputs:
        """Pictures as a pack; a pack as it is."""
        pixels = visuals.pixel_values
        if pixels is None:
            return visuals
        grids = torch.tensor([self.patches_of(*pixels.shape[-2:])] * len(pixels))
        return VisualInputs(
            rows=patchify(pixels, self.model.config.patch_size).flatten(0, 1),
            positions=compute_patch_positions_from_grid_thw(grids).to(pixels.device),
            lengths=grids.prod(dim=1),
            grids=grids,
        )

    def with_call(self, states: TowerStates) -> TowerStates:
        """Stored states with the context of their pack."""
        bounds = torch.tensor([0, *states.lengths]).cumsum(0)
        bounds = bounds.to(states.positions.device, torch.int32)
        layout = PackLayout(states.positions, bounds, max(states.lengths))
        return replace(states, call=((self.model.packing.pack_context(layout),), {}))

    def _states(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        pack = self.packed(visuals)
        bounds = torch.cat([pack.lengths.new_zeros(1), pack.lengths.cumsum(0)]).to(torch.int32)
        with self._watched(layers) as record:
            out = self.model.packing(
                pack.rows.to(self.model.dtype),
                patch_positions=pack.positions,
                cu_seqlens=bounds.to(pack.rows.device),
                max_seqlen=int(pack.lengths.max()),
            )
        if self.model.config.post_norm:
            record.states[self.num_layers] = out.last_hidden_state
        states = {index: record.states[index] for index in layers}
        return TowerStates(states, pack.lengths.tolist(), grids_of(pack), 0, record.call)


class ConvTower(VisionTower):
    """A ConvNeXt of any number of stages; its one state is the last map, row by row."""

    def __init__(self, model: ConvNextVisionModel):
        super().__init__(model, model.config.hidden_size)

    def absolute(self, layer: int) -> int:
        """Only the last map can be asked for."""
        if layer not in (0, -1):
            raise ValueError(f"a convolutional tower has no hidden state {layer}: choose -1")
        return 0

    def patches_of(self, height: int, width: int) -> Grid:
        """Sides must be multiples of the stride."""
        return 1, *self.model.tower().grid(height, width)

    def train_from(self, stage: int | None) -> None:
        """See ConvNextTower.train_from."""
        self.model.tower().train_from(stage)

    def _states(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        pixels = visuals.pixel_values
        if pixels is None:
            raise ValueError("a convolutional tower takes pictures, not packs")
        tokens = self.model(pixels.to(self.model.dtype)).last_hidden_state
        count, grid = len(pixels), self.patches_of(*pixels.shape[-2:])
        return TowerStates({0: tokens}, [tokens.shape[1]] * count, [grid] * count)


def grids_of(visuals: VisualInputs) -> list[Grid | None]:
    """Grids of a pack's items as numbers of the host."""
    return [tuple(grid) if all(grid) else None for grid in visuals.grids.tolist()]


def tower_of(model: PreTrainedModel) -> VisionTower:
    """The face that fits a loaded model. Raises ValueError for one that is no tower."""
    if isinstance(model, LlavaViTVisionModel):
        return PackedTower(model)
    if isinstance(model, ConvNextModel):
        model = ConvNextVisionModel.from_network(model)
    if isinstance(model, ConvNextVisionModel):
        return ConvTower(model)
    if not isinstance(getattr(model.config, "patch_size", None), int):
        raise ValueError(
            f"{type(model).__name__} is no tower: it has no patch_size and is no ConvNeXt"
        )
    return PictureTower(model)


def tower_from_config(config) -> VisionTower:
    """A tower with random weights."""
    return tower_of(AutoModel.from_config(config))
