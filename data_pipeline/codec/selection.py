"""Which patches of a clip are selected: every I-frame patch, then the best P-frame patches, within
a token budget. The same for packing and for the probe.

The order is the contract: the selection of a smaller budget is a prefix of that of a larger one, so
nothing has to be selected again. By default I-frame patches come first (raster order), then P-frame
patches by falling saliency, ties by position. With `time_buckets` the P-frames are cut into that
many spans of time which take turns, each giving its next best patch: still a prefix, but no span of
a clip goes without. A clip in which nothing moves (saliency.is_static) has no best P-frame patches;
whole P-frames at even times are taken instead, and `is_static` of the selection is True.

Patches of a P-frame that touch padding (content.py) are never taken; whole I-frames are taken with
theirs. The published rules have a module of their own (published_rule.py).

Shape legend: T frames, h, w patch grid, K selected patches.
"""

from dataclasses import dataclass

import numpy as np

from .decompose import CodecClip
from .saliency import SaliencyConfig, is_static, patch_saliency


@dataclass(frozen=True)
class Selection:
    """positions uint16 [K, 3] (t index of the frame, row, column), scores float16 [K] (I-frame
    patches 1), is_static.
    """

    positions: np.ndarray
    scores: np.ndarray
    is_static: bool


def choose_patches(
    clip: CodecClip,
    patch_size: int,
    budget: int,
    saliency: SaliencyConfig,
    keep_i_frames: bool = True,
    time_buckets: int = 1,
) -> Selection:
    """At most `budget` patches of a clip, as select_patches chooses them by saliency."""
    return select_patches(
        patch_saliency(clip, patch_size=patch_size, config=saliency),
        is_i_frame=clip.is_i_frame,
        budget=budget,
        keep_i_frames=keep_i_frames,
        time_buckets=time_buckets,
        is_static=is_static(clip),
        is_content=clip.whole_patches(patch_size),
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


def select_patches(
    saliency: np.ndarray,
    is_i_frame: np.ndarray,
    budget: int,
    keep_i_frames: bool = True,
    time_buckets: int = 1,
    is_static: bool = False,
    is_content: np.ndarray | None = None,
) -> Selection:
    """Choose at most `budget` patches of saliency [T, h, w]; of P-frames only those of the mask
    `is_content` [h, w], where it is given.

    Raises ValueError when the budget cannot hold every I-frame.
    """
    frames, height, width = saliency.shape
    per_frame = height * width
    num_i_frames = int(is_i_frame.sum())
    if keep_i_frames and budget < num_i_frames * per_frame:
        raise ValueError(
            f"a budget of {budget} patches cannot hold {num_i_frames} I-frames of {per_frame}: "
            "raise it, lower the size, or take a longer GOP"
        )
    linear = np.arange(saliency.size).reshape(frames, per_frame)
    # indices of patches in the clip, frame by frame
    intra = linear[is_i_frame].ravel() if keep_i_frames else np.zeros(0, int)
    patches_of_frame = slice(None) if is_content is None else np.flatnonzero(is_content)
    candidates = linear[~is_i_frame][:, patches_of_frame]
    inter = candidates.ravel()
    scores = saliency.reshape(-1)[inter]
    # without any saliency no patch is better than another
    is_static = len(inter) > 0 and (is_static or not scores.any())
    if is_static:
        order = _even_frames(frames - num_i_frames, candidates.shape[1])
    else:
        order = _best_first(scores, num_p_frames=frames - num_i_frames, time_buckets=time_buckets)
    selected = np.concatenate([intra, inter[order]])[:budget]
    # the saliency of I-frames is 0, by definition: their patches get the highest score
    intra_scores = np.ones(len(intra))
    selected_scores = np.concatenate([intra_scores, scores[order]])[:budget]
    positions = np.stack(np.unravel_index(selected, saliency.shape), axis=-1)
    return Selection(
        positions=positions.astype(np.uint16),
        scores=selected_scores.astype(np.float16),
        is_static=is_static,
    )


def _best_first(scores: np.ndarray, num_p_frames: int, time_buckets: int) -> np.ndarray:
    """Order of P-frame patches by falling score, in turns over the buckets of time."""
    order = np.argsort(-scores, kind="stable")  # stable: equal scores stay in order of position
    if time_buckets == 1 or num_p_frames == 0:
        return order
    # rank within its bucket decides first, so that all buckets give their best, then their second
    frame = order // (len(scores) // num_p_frames)
    bucket = frame * min(time_buckets, num_p_frames) // num_p_frames
    turn = np.empty_like(bucket)
    for number in np.unique(bucket):
        members = bucket == number
        turn[members] = np.arange(members.sum())
    return order[np.lexsort((bucket, turn))]


def _even_frames(num_p_frames: int, per_frame: int) -> np.ndarray:
    """Order of P-frame patches that takes whole frames, each next one halving the largest gap:
    frame indices with their bits reversed (van der Corput order).
    """
    bits = max(1, (num_p_frames - 1).bit_length())
    times = []
    for i in range(1 << bits):
        time = int(format(i, f"0{bits}b")[::-1], 2)
        if time < num_p_frames:
            times.append(time)
    first_patches = np.array(times)[:, None] * per_frame
    return (first_patches + np.arange(per_frame)).ravel()
