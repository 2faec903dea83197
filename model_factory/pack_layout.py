"""The description of a pack, checked and completed before anything is computed.

A pack is described by any sufficient mixture of `grid_thw`, `cu_seqlens`, `patch_positions` and
`max_seqlen`. Checks read host memory: they cost microseconds on a CPU. On another device they need
one copy of the boundaries to the host, which waits for the device; a caller that gives
`patch_positions`, `max_seqlen` and a `cu_seqlens` on that device (as our packer does) is trusted
with its values, and nothing waits. Shapes and dtypes are always checked.

Shape legend: S packed tokens, N items.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .packing import compute_patch_positions_from_grid_thw

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class PackLayout:
    """Positions [S, 3] and boundaries int32 [N + 1] on the pack's device; longest item, or a bound
    of it, as a host integer.
    """

    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


def resolve_layout(
    hidden_states: torch.Tensor,
    patch_dim: int,
    grid_thw: torch.Tensor | None = None,
    patch_positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> PackLayout:
    """Layout of a pack; see LlavaViTPackingModel.forward for the arguments.

    Raises ValueError that names the argument and both numbers when anything disagrees.
    """
    _check_rows(hidden_states, patch_dim)
    num_rows = len(hidden_states)
    device = hidden_states.device
    if max_seqlen is not None and max_seqlen < 1:
        raise ValueError(f"max_seqlen is {max_seqlen}, the longest item has at least 1 patch")
    if patch_positions is not None:
        patch_positions = _checked_positions(patch_positions, num_rows)
    if cu_seqlens is not None:
        cu_seqlens = _checked_shape(cu_seqlens, name="cu_seqlens", shape="[N + 1]")
    if grid_thw is not None:
        grid_thw = _checked_shape(grid_thw, name="grid_thw", shape="[N, 3]")
    # the fast path on a GPU: reading a value there would wait for all kernels before it
    if patch_positions is not None and cu_seqlens is not None and max_seqlen is not None:
        if cu_seqlens.device.type != "cpu":
            return PackLayout(
                positions=patch_positions.to(device),
                cu_seqlens=cu_seqlens.to(device).int(),
                max_seqlen=max_seqlen,
            )
    if grid_thw is None and cu_seqlens is not None and patch_positions is None:
        raise ValueError(
            "cu_seqlens alone places no patch: give patch_positions [S, 3] or grid_thw [N, 3] too"
        )
    # from here on values are read, which on a GPU waits for the boundaries
    lengths = _item_lengths(
        grid_thw,
        cu_seqlens=cu_seqlens,
        num_rows=num_rows,
        exact=patch_positions is None,
    )
    if patch_positions is None:
        assert grid_thw is not None  # or the error above
        # on the host: that function reads values of the grid, each of which a GPU would wait for
        patch_positions = compute_patch_positions_from_grid_thw(grid_thw.cpu())
    longest = int(lengths.max())
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"max_seqlen is {max_seqlen}, the longest item has {longest} patches")
    ends = lengths.cumsum()
    bounds = np.concatenate([[0], ends]).astype(np.int32)
    return PackLayout(
        positions=patch_positions.to(device),
        cu_seqlens=torch.from_numpy(bounds).to(device),
        max_seqlen=max_seqlen or longest,
    )


def _item_lengths(
    grid_thw: torch.Tensor | None, cu_seqlens: torch.Tensor | None, num_rows: int, exact: bool
) -> np.ndarray:
    """Patches of every item, int64 [N], from whichever of the two is given; both must agree."""
    grid = None if grid_thw is None else _checked_grid(grid_thw)
    if cu_seqlens is not None:
        lengths = _checked_lengths(cu_seqlens, num_rows)
        if grid is not None:
            _check_agreement(grid, lengths, exact=exact)
        return lengths
    if grid is None:
        raise ValueError(
            "give grid_thw [N, 3] or cu_seqlens [N + 1]: neither names the items of the pack"
        )
    lengths = grid.prod(axis=1)
    if lengths.sum() != num_rows:
        raise ValueError(
            f"grid_thw describes {lengths.sum()} patches (sum of t * h * w over {len(grid)} "
            f"items), hidden_states has {num_rows} rows"
        )
    return lengths


def host_array(tensor: torch.Tensor) -> np.ndarray:
    """Values of a tensor in host memory: no copy of a CPU tensor, one wait on other devices."""
    return tensor.detach().cpu().numpy()


def _check_rows(hidden_states: torch.Tensor, patch_dim: int) -> None:
    shape = list(hidden_states.shape)
    if len(shape) != 2 or shape[1] != patch_dim or shape[0] == 0:
        raise ValueError(
            f"hidden_states must have shape [S, {patch_dim}] (num_channels * patch_size ** 2) with "
            f"S >= 1, got {shape}"
        )
    if not hidden_states.is_floating_point():
        raise ValueError(
            f"hidden_states must be normalised floating point rows, got {hidden_states.dtype}: "
            "subtract the mean and divide by the standard deviation first"
        )


def _checked_positions(patch_positions: torch.Tensor, num_rows: int) -> torch.Tensor:
    positions = torch.as_tensor(patch_positions)
    if tuple(positions.shape) != (num_rows, 3):
        raise ValueError(
            f"patch_positions must have shape [{num_rows}, 3] like hidden_states' rows, got "
            f"{list(positions.shape)}"
        )
    if positions.dtype == torch.bool or positions.is_complex():
        raise ValueError(f"patch_positions must be (t, h, w) numbers, got {positions.dtype}")
    return positions


def _checked_shape(tensor: torch.Tensor, name: str, shape: str) -> torch.Tensor:
    """Integers of the shape "[N + 1]" or "[N, 3]"; reads no value, so a GPU is not waited for."""
    tensor = torch.as_tensor(tensor)
    if shape == "[N, 3]":
        has_sides = tensor.ndim == 2 and tensor.shape[1] == 3
        fits = has_sides and len(tensor) >= 1
    else:
        fits = tensor.ndim == 1 and len(tensor) >= 2
    if not fits:
        raise ValueError(f"{name} must have shape {shape} with N >= 1, got {list(tensor.shape)}")
    if tensor.dtype not in INTEGERS:
        raise ValueError(f"{name} must hold integers, got {tensor.dtype}")
    return tensor


def _checked_grid(grid_thw: torch.Tensor) -> np.ndarray:
    grid = host_array(grid_thw).astype(np.int64)
    if (grid <= 0).any():
        row = int((grid <= 0).any(axis=1).argmax())
        raise ValueError(f"grid_thw must be positive, row {row} is {grid[row].tolist()}")
    return grid


def _checked_lengths(cu_seqlens: torch.Tensor, num_rows: int) -> np.ndarray:
    # signed, as differences of unsigned boundaries would wrap around instead of being negative
    bounds = host_array(cu_seqlens).astype(np.int64)
    lengths = np.diff(bounds)
    if bounds[0] != 0 or (lengths <= 0).any():
        raise ValueError(
            f"cu_seqlens must start at 0 and grow with every item, got first entry {bounds[0]}, "
            f"shortest item {lengths.min()}"
        )
    if bounds[-1] != num_rows:
        raise ValueError(
            f"cu_seqlens ends at {bounds[-1]} patches, hidden_states has {num_rows} rows"
        )
    return lengths


def _check_agreement(grid: np.ndarray, lengths: np.ndarray, exact: bool) -> None:
    """Raise ValueError where grid and boundaries differ. With explicit positions (not `exact`) a
    grid may be larger than its item: a sparse selection fills a part of it."""
    if len(grid) != len(lengths):
        raise ValueError(
            f"grid_thw has {len(grid)} items, cu_seqlens has {len(lengths)} (N + 1 boundaries)"
        )
    extent = grid.prod(axis=1)
    wrong = extent != lengths if exact else extent < lengths
    if wrong.any():
        item = int(wrong.argmax())
        raise ValueError(
            f"grid_thw row {item} describes {extent[item]} patches, cu_seqlens gives that item "
            f"{lengths[item]}: only a sparse item, with patch_positions, may have fewer"
        )
