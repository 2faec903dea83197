"""The packed layout: patch rows, sequence boundaries and (t, h, w) positions.

One row is one patch, flattened channel-first inside the patch (C, ph, pw); rows run t-major, then
row, then column. Everything here is pure tensor code without a loop over patches, and imports
without a GPU library.

Shape legend: S packed tokens, N items, P patch dim = 3 * p * p, T frames.
"""

from collections.abc import Sequence

import torch

# of OpenAI's CLIP, per channel (red, green, blue) of pixels from 0 to 1; the public weights of
# this encoder were trained with them
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# the time base of temporal positions: t runs over 0..63 whatever the clip's length
TARGET_FRAMES = 64
MAX_BYTE = 255  # of a uint8 pixel


def gain_and_offset(
    mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> torch.Tensor:
    """float32 [2, C] that normalises bytes: byte * gain + offset = (byte / 255 - mean) / std.

    Mean and std are per channel, of pixels from 0 to 1. Computed in float64 and rounded once.
    """
    means = torch.tensor(mean, dtype=torch.float64)
    stds = torch.tensor(std, dtype=torch.float64)
    gain = 1 / (MAX_BYTE * stds)
    offset = -means / stds
    return torch.stack([gain, offset]).float()


def patchify(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Patch rows [..., (H/p) * (W/p), 3*p*p] of pixels [..., 3, H, W].

    Raises ValueError when a side is not a multiple of the patch size.
    """
    height, width = pixels.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"picture is {height}x{width}, not a multiple of patch_size {patch_size}: resize or "
            "crop it first"
        )
    bands = pixels.unflatten(-2, (-1, patch_size))
    grid = bands.unflatten(-1, (-1, patch_size))  # [..., 3, h, p, w, p]
    patches = grid.movedim((-4, -2), (-5, -4))  # [..., h, w, 3, p, p]
    rows = patches.flatten(-3)
    return rows.flatten(-3, -2)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Patches [..., 3, p, p] of patch rows [..., 3*p*p]."""
    return patches.unflatten(-1, (3, patch_size, patch_size))


def compute_patch_positions_from_grid_thw(grid_thw: torch.Tensor) -> torch.Tensor:
    """Positions int64 [S, 3] (t, h, w) of whole grids; t counts frames from 0 and is not scaled to
    the time base.

    grid_thw: integer [N, 3] in patches. Raises ValueError for another shape, an empty pack or a
    non-positive side.
    """
    if grid_thw.ndim != 2 or grid_thw.shape[-1] != 3 or grid_thw.shape[0] == 0:
        raise ValueError(f"grid_thw must have shape [N, 3] with N >= 1, got {list(grid_thw.shape)}")
    if bool((grid_thw <= 0).any()):
        raise ValueError(f"grid_thw must be positive, got the smallest entry {int(grid_thw.min())}")
    grid = grid_thw.long()
    lengths = grid.prod(dim=-1)
    items = torch.arange(len(grid), device=grid.device)
    item = torch.repeat_interleave(items, lengths)
    starts = lengths.cumsum(0) - lengths
    row = torch.arange(int(lengths.sum()), device=grid.device)
    index = row - starts[item]  # of a patch within its own item
    height = grid[item, 1]
    width = grid[item, 2]
    # rows of an item run t-major, then row, then column
    t = index // (height * width)
    h = index // width % height
    w = index % width
    return torch.stack((t, h, w), dim=-1)


def interpolate_frame_indices(
    frame_indices: torch.Tensor, total_frames: torch.Tensor, target_frames: int = TARGET_FRAMES
) -> torch.Tensor:
    """Times int64 [B, T] on the 0..target-1 time base, of frame indices in clips of any length.

    frame_indices: [B, T]; total_frames: any shape with B elements. The result is
    round_half_even(index / max(total - 1, 1) * (target - 1)), clamped to [0, target - 1].
    """
    if frame_indices.ndim != 2 or total_frames.numel() != len(frame_indices):
        raise ValueError(
            f"frame_indices must have shape [B, T] and total_frames B elements, got "
            f"{list(frame_indices.shape)} and {total_frames.numel()}"
        )
    # in float64, as a half that fp32 misses would round to another frame
    total = total_frames.reshape(-1, 1).to(torch.float64)
    # a clip of one frame would divide by 0
    fraction = frame_indices.to(torch.float64) / (total - 1).clamp(min=1)
    scaled = fraction * (target_frames - 1)
    return scaled.round().long().clamp(0, target_frames - 1)


def compute_patch_positions_with_interpolated_temporal(
    frame_indices: torch.Tensor,
    height: int,
    width: int,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Positions int64 [B*T*height*width, 3] of whole frames at given times [B, T], in batch order;
    height and width in patches.
    """
    times = frame_indices.to(device=device, dtype=torch.int64).reshape(-1)
    rows = torch.arange(height, device=times.device)
    columns = torch.arange(width, device=times.device)
    return torch.cartesian_prod(times, rows, columns)
