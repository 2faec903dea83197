"""One interface of all vision models: images or packs in, hidden states by layer index out.

    PictureTower   a transformers vision model of images (CLIP, SigLIP, DINOv2, ...); hooks record
                   what enters its blocks, so that a model need not know how to export its states
    PackedTower    our encoder, for images of any size, whole frames and codec patches alike
    ConvTower      a hierarchical network, whose only state is its last map (convnext.py)

Hidden state 0 is the input of the first block, i the output of block i - 1; negative numbers count
from the end. The last state of our encoder is taken after the post norm where its configuration
says `post_norm`. A tower without trainable parameters runs without a graph. Cost: that of the
model.

Shape legend: B images, I items of a pack, N patches of one image, E extra tokens before them
(class, registers), D width, S tokens of a pack, L blocks, p patch size.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, ConvNextModel, PretrainedConfig, PreTrainedModel

from ..llava_vision_tower import LlavaViTVisionModel
from ..pack_layout import PackLayout
from ..packing import compute_patch_positions_from_grid_thw, patchify
from .convnext import ConvNextVisionModel

Grid = tuple[int, int, int]  # frames, rows, columns


@dataclass(frozen=True)
class VisualInputs:
    """Images, or a pack of images and clips.

    pixel_values  float [B, 3, H, W], normalised
    rows          float [S, 3*p*p] patch rows, normalised
    positions     int64 [S, 3]
    lengths       int64 [I]
    grids         int64 [I, 3] frames, rows, columns; zeros for patches that fill no grid
    """

    pixel_values: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    grids: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "VisualInputs":
        """The same on a device; lengths and grids stay on the host, where they are read."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            pixel_values=moved(self.pixel_values),
            rows=moved(self.rows),
            positions=moved(self.positions),
        )


@dataclass(frozen=True)
class TowerStates:
    """Hidden states by absolute index, in the layout of the blocks.

    states     [S, D] of a pack, or [B, E + N, D]
    lengths    patches of each item
    grids      of each item; None for patches that fill no grid
    extra      E
    call       (args, kwargs) that a block takes beside its state; None for blocks that need only
               masks, which are then None
    cross      cross tokens [L, items, D] of every layer, of a tower that has them
    positions  int64 [sum of lengths, 3] of a pack's patches, for states that were stored
    """

    states: dict[int, torch.Tensor]
    lengths: list[int]
    grids: Sequence[Grid | None]
    extra: int = 0
    call: tuple[tuple, dict] | None = None
    cross: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "TowerStates":
        """The same on a device, for states that were stored."""
        states = {}
        for index, state in self.states.items():
            states[index] = state.to(device, dtype)
        positions = None if self.positions is None else self.positions.to(device)
        return replace(self, states=states, positions=positions)

    def patches(self, state: torch.Tensor) -> torch.Tensor:
        """Patch tokens [sum of lengths, D] of a state in the layout of the blocks."""
        if state.ndim == 2:  # of a pack, which has no extra tokens
            return state
        return state[:, self.extra :].flatten(0, 1)

    def maps(self, tokens: torch.Tensor) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """Tokens [sum of lengths, D] as maps: ((rows, columns), [frames, rows * columns, D]) for
        each run of neighbouring items with equal sides. Raises ValueError for patches that fill no
        grid."""
        sides: list[tuple[int, int]] = []
        counts: list[int] = []
        for grid, length in zip(self.grids, self.lengths, strict=True):
            if grid is None:
                raise ValueError(
                    f"{length} patches fill no grid, so neighbours cannot be merged or convolved: "
                    "give whole frames, or choose the projector mlp2x_gelu"
                )
            _, rows, columns = grid
            if not sides or sides[-1] != (rows, columns):
                sides.append((rows, columns))
                counts.append(0)
            counts[-1] += length
        for (rows, columns), run in zip(sides, tokens.split(counts), strict=True):
            frames = run.unflatten(0, (-1, rows * columns))
            yield (rows, columns), frames


@dataclass
class _Record:
    """Inputs of the blocks that hooks watch: states by index, and (args, kwargs) beside them."""

    states: dict[int, torch.Tensor] = field(default_factory=dict)
    call: tuple[tuple, dict] | None = None


class VisionTower(nn.Module):
    """What all towers have: `model`, `blocks`, `num_layers` and `width`."""

    def __init__(self, model: PreTrainedModel, width: int):
        super().__init__()
        self.model = model
        self.width = width

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks whose hidden states can be read; a convolutional tower has none."""
        return nn.ModuleList()

    @property
    def num_layers(self) -> int:
        """Number of blocks; there is one hidden state more."""
        return len(self.blocks)

    def absolute(self, layer: int) -> int:
        """Absolute index of a hidden state. Raises ValueError for one that the tower lacks."""
        index = layer if layer >= 0 else self.num_layers + 1 + layer
        if not 0 <= index <= self.num_layers:
            raise ValueError(
                f"a tower of {self.num_layers} layers has no hidden state {layer}: choose one from "
                f"{-self.num_layers - 1} to {self.num_layers}"
            )
        return index

    def forward(self, visuals: VisualInputs, layers: Iterable[int]) -> TowerStates:
        """States of the requested layers (absolute indices)."""
        # activations of a frozen tower would be stored for a backward pass that never comes
        learns = any(p.requires_grad for p in self.model.parameters())
        with contextlib.nullcontext() if learns else torch.no_grad():
            return self._states(visuals, list(layers))

    def train_from(self, stage: int | None) -> None:
        """Train the stages from a number on. Raises ValueError for a tower without stages."""
        raise ValueError(
            f"{type(self.model).__name__} has no stages: --tune_vit_from_layer is for ConvNeXt"
        )

    def tokens_of(self, grid: Grid | None, patches: int) -> int:
        """Tokens that a projector receives for an item of `patches`."""
        return patches

    def with_call(self, states: TowerStates) -> TowerStates:
        """Stored states with `call` filled in; for image towers unchanged."""
        return states

    def grid_of(self, height: int, width: int) -> Grid:
        """Grid of an image of height x width pixels. Raises ValueError for sides that do not
        fit."""
        raise NotImplementedError

    def _states(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        raise NotImplementedError

    @contextlib.contextmanager
    def _watched(self, layers: list[int]) -> Iterator[_Record]:
        """Record the inputs of blocks, and the output of the last one."""
        record = _Record()
        last = self.num_layers

        def before(index: int) -> Callable[..., None]:
            def hook(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                # models pass the state by position or by this name
                record.states[index] = args[0] if args else kwargs["hidden_states"]
                others = {name: v for name, v in kwargs.items() if name != "hidden_states"}
                record.call = (args[1:], others)

            return hook

        def after(_block: nn.Module, _args: tuple, out: Any) -> None:
            # some models' blocks return a tuple, with the state first
            record.states[last] = out[0] if isinstance(out, tuple) else out

        # block 0 always, as the number of tokens is that of its input
        watched = {index for index in layers if index < last} | {0}
        handles = [
            self.blocks[index].register_forward_pre_hook(before(index), with_kwargs=True)
            for index in watched
        ]
        handles.append(self.blocks[-1].register_forward_hook(after))
        try:
            yield record
        finally:
            # a hook that stays would hold the states of this batch
            for handle in handles:
                handle.remove()


class PictureTower(VisionTower):
    """A transformers vision model; all images of a batch have one size."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, model.config.hidden_size)
        self.patch_size: int = model.config.patch_size

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's list of as many modules as it has layers, whatever its name."""
        count = self.model.config.num_hidden_layers
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise ValueError(f"{type(self.model).__name__} has no list of {count} blocks")

    def grid_of(self, height: int, width: int) -> Grid:
        """Pixels that fill no patch are left out, as by the model's own convolution."""
        return 1, height // self.patch_size, width // self.patch_size

    def _states(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        pixels = visuals.pixel_values
        if pixels is None:
            raise ValueError(
                f"{type(self.model).__name__} takes pictures, not packs: give clips as frames"
            )
        height, width = pixels.shape[-2:]
        grid = self.grid_of(height, width)
        patches = grid[1] * grid[2]
        with self._watched(layers) as record:
            self.model(pixel_values=pixels.to(self.model.dtype))
        return TowerStates(
            states={index: record.states[index] for index in layers},
            lengths=[patches] * len(pixels),
            grids=[grid] * len(pixels),
            # counted, as models differ in their class and register tokens
            extra=record.states[0].shape[1] - patches,
            call=record.call,
        )


class PackedTower(VisionTower):
    """Our encoder: images and clips of any size side by side."""

    def __init__(self, model: LlavaViTVisionModel):
        super().__init__(model, model.config.hidden_size)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the packed encoder."""
        return self.model.packing.encoder.layers

    def grid_of(self, height: int, width: int) -> Grid:
        """Sides must be multiples of the patch size."""
        return 1, *self.model.grid(height, width)

    def packed(self, visuals: VisualInputs) -> VisualInputs:
        """Images as a pack; a pack as it is."""
        pixels = visuals.pixel_values
        if pixels is None:
            return visuals
        height, width = pixels.shape[-2:]
        grid = self.grid_of(height, width)
        grids = torch.tensor([grid] * len(pixels))
        return VisualInputs(
            rows=patchify(pixels, self.model.config.patch_size).flatten(0, 1),
            positions=compute_patch_positions_from_grid_thw(grids).to(pixels.device),
            lengths=grids.prod(dim=1),
            grids=grids,
        )

    def with_call(self, states: TowerStates) -> TowerStates:
        """Stored states with the context of their pack."""
        assert states.positions is not None, "states of a pack are stored with positions"
        bounds = torch.tensor([0, *states.lengths]).cumsum(0)
        layout = PackLayout(
            positions=states.positions,
            cu_seqlens=bounds.to(states.positions.device, torch.int32),
            max_seqlen=max(states.lengths),
        )
        return replace(states, call=((self.model.packing.pack_context(layout),), {}))

    def _states(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        pack = self.packed(visuals)
        assert pack.rows is not None and pack.lengths is not None and pack.grids is not None
        ends = pack.lengths.cumsum(0)
        start = pack.lengths.new_zeros(1)
        bounds = torch.cat([start, ends]).to(torch.int32)
        with self._watched(layers) as record:
            out = self.model.packing(
                pack.rows.to(self.model.dtype),
                patch_positions=pack.positions,
                cu_seqlens=bounds.to(pack.rows.device),
                max_seqlen=int(pack.lengths.max()),
            )
        if self.model.config.post_norm:
            # in place of the hook's state, which is the block's output before the norm
            record.states[self.num_layers] = out.last_hidden_state
        return TowerStates(
            states={index: record.states[index] for index in layers},
            lengths=pack.lengths.tolist(),
            # zeros stand for patches that fill no grid
            grids=[tuple(grid) if all(grid) else None for grid in pack.grids.tolist()],
            call=record.call,
        )


class ConvTower(VisionTower):
    """A ConvNeXt of any number of stages; its one state is the last map, row by row."""

    def __init__(self, model: ConvNextVisionModel):
        super().__init__(model, model.config.hidden_size)

    def absolute(self, layer: int) -> int:
        """0, the last map, which is the only state."""
        if layer not in (0, -1):
            raise ValueError(f"a convolutional tower has no hidden state {layer}: choose -1")
        return 0

    def grid_of(self, height: int, width: int) -> Grid:
        """Sides must be multiples of the stride."""
        return 1, *self.model.grid(height, width)

    def train_from(self, stage: int | None) -> None:
        """See ConvNextVisionModel.train_from."""
        self.model.train_from(stage)

    def _states(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        pixels = visuals.pixel_values
        if pixels is None:
            raise ValueError("a convolutional tower takes pictures, not packs")
        tokens = self.model(pixels.to(self.model.dtype)).last_hidden_state
        grid = self.grid_of(*pixels.shape[-2:])
        return TowerStates(
            states={0: tokens},
            lengths=[tokens.shape[1]] * len(pixels),
            grids=[grid] * len(pixels),
        )


def tower_of(model: PreTrainedModel) -> VisionTower:
    """The tower around a loaded model. Raises ValueError for a model that cannot be one."""
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


def tower_from_config(config: PretrainedConfig) -> VisionTower:
    """A tower with random weights."""
    return tower_of(AutoModel.from_config(config))
