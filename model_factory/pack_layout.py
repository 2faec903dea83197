"""What a caller says about a pack, checked and completed before anything is computed.

A pack is described by any sufficient mixture of `grid_thw`, `cu_seqlens`, `patch_positions` and
`max_seqlen`. Checks read host memory: they cost microseconds on a CPU. On another device they need
one copy of the boundaries to the host, which waits for the device; a caller that gives
`cu_seqlens`, `max_seqlen` and `patch_positions` (as our packer does) is trusted there and nothing
waits.

Shape legend: S packed tokens, N items.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .packing import compute_patch_positions_from_grid_thw


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
    num_rows, device = len(hidden_states), hidden_states.device
    if grid_thw is None and cu_seqlens is None:
        raise ValueError(
            "give grid_thw [N, 3] or cu_seqlens [N + 1]: neither names the items of the pack"
        )
    if grid_thw is None and patch_positions is None:
        raise ValueError(
            "cu_seqlens alone places no patch: give patch_positions [S, 3] or grid_thw [N, 3] too"
        )
    if patch_positions is not None:
        patch_positions = _checked_positions(patch_positions, num_rows)
    known = None not in (patch_positions, cu_seqlens, max_seqlen)
    if known and device.type != "cpu":
        return PackLayout(patch_positions.to(device), cu_seqlens.to(device).int(), max_seqlen)
    grid = None if grid_thw is None else _checked_grid(grid_thw)
    if cu_seqlens is None:
        lengths = grid.prod(axis=1)
        if lengths.sum() != num_rows:
            raise ValueError(
                f"grid_thw describes {lengths.sum()} patches (sum of t * h * w over {len(grid)} "
                f"items), hidden_states has {num_rows} rows"
            )
    else:
        lengths = _checked_lengths(cu_seqlens, num_rows)
        if grid is not None:
            _check_agreement(grid, lengths, exact=patch_positions is None)
    if patch_positions is None:
        patch_positions = compute_patch_positions_from_grid_thw(torch.from_numpy(grid))
    longest = int(lengths.max())
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"max_seqlen is {max_seqlen}, the longest item has {longest} patches")
    bounds = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    return PackLayout(patch_positions.to(device), bounds.to(device), max_seqlen or longest)


def host_array(tensor: torch.Tensor) -> np.ndarray:
    """Numbers of a tensor in host memory: no copy from a CPU tensor, one wait on other devices."""
    return tensor.detach().cpu().numpy()


def _check_rows(hidden_states, patch_dim):
    shape = list(hidden_states.shape)
    if len(shape) != 2 or shape[1] != patch_dim or shape[0] == 0:
        raise ValueError(
            f"hidden_states must have shape [S, {patch_dim}] (3 * patch_size ** 2) with S >= 1, "
            f"got {shape}"
        )
    if not hidden_states.is_floating_point():
        raise ValueError(
            f"hidden_states must be normalised floating point rows, got {hidden_states.dtype}: "
            "subtract the mean and divide by the standard deviation first"
        )


def _checked_positions(patch_positions, num_rows):
    positions = torch.as_tensor(patch_positions)
    if tuple(positions.shape) != (num_rows, 3):
        raise ValueError(
            f"patch_positions must have shape [{num_rows}, 3] like hidden_states' rows, got "
            f"{list(positions.shape)}"
        )
    if positions.dtype == torch.bool or positions.is_complex():
        raise ValueError(f"patch_positions must be (t, h, w) numbers, got {positions.dtype}")
    return positions


def _integers(tensor, name: str) -> np.ndarray:
    array = host_array(torch.as_tensor(tensor))
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {array.dtype}")
    return array.astype(np.int64)


def _checked_grid(grid_thw) -> np.ndarray:
    grid = _integers(grid_thw, "grid_thw")
    if grid.ndim != 2 or grid.shape[1] != 3 or len(grid) == 0:
        raise ValueError(f"grid_thw must have shape [N, 3] with N >= 1, got {list(grid.shape)}")
    if (grid <= 0).any():
        row = int((grid <= 0).any(axis=1).argmax())
        raise ValueError(f"grid_thw must be positive, row {row} is {grid[row].tolist()}")
    return grid


def _checked_lengths(cu_seqlens, num_rows: int) -> np.ndarray:
    bounds = _integers(cu_seqlens, "cu_seqlens")
    if bounds.ndim != 1 or len(bounds) < 2:
        raise ValueError(
            f"cu_seqlens must have shape [N + 1] with N >= 1, got {list(bounds.shape)}"
        )
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
    """With explicit positions a grid is only a description and may be larger than its item."""
    if len(grid) != len(lengths):
        raise ValueError(
            f"grid_thw has {len(grid)} items, cu_seqlens has {len(lengths)} (N + 1 boundaries)"
        )
    wrong = grid.prod(axis=1) != lengths
    if exact and wrong.any():
        item = int(wrong.argmax())
        raise ValueError(
            f"grid_thw row {item} describes {grid[item].prod()} patches, cu_seqlens gives that "
            f"item {lengths[item]}: a sparse item needs patch_positions"
        )
