"""A decomposed clip -> the patches that survive; the same for packing and for the probe."""

import numpy as np

from .decompose import CodecClip
from .saliency import SaliencyConfig, is_static, patch_saliency
from .selection import Selection, select_patches


def choose_patches(
    clip: CodecClip,
    patch_size: int,
    budget: int,
    saliency: SaliencyConfig,
    keep_i_frames: bool = True,
    time_buckets: int = 1,
) -> Selection:
    """At most `budget` patches of a clip, as selection.select_patches chooses them by saliency."""
    return select_patches(
        patch_saliency(clip, patch_size, saliency),
        clip.is_i_frame,
        budget,
        keep_i_frames=keep_i_frames,
        time_buckets=time_buckets,
        is_static=is_static(clip),
    )


def cut_patches(frames: np.ndarray, positions: np.ndarray, patch_size: int) -> np.ndarray:
    """Patches uint8 [K, p, p, 3] of frames [T, H, W, 3] at positions [K, 3] (frame, row, column of
    the patch grid)."""
    count, height, width, _ = frames.shape
    rows = height // patch_size
    columns = width // patch_size
    grid = frames.reshape(count, rows, patch_size, columns, patch_size, 3)
    frame, row, column = positions.astype(np.int64).T
    return np.ascontiguousarray(grid[frame, row, :, column])
