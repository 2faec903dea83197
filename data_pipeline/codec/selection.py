"""The order in which the patches of a clip are taken: I-frame patches, then the best P-frame
patches, within a token budget. Pure functions of scores; patches.py has the rules that make them.

The order is the contract: the selection of a smaller budget is a prefix of that of a larger one, so
nothing has to be selected again. I-frame patches come first (raster order), then P-frame patches by
falling score, ties by position. What changes the order keeps this:

    i_frame_share    so many of an I-frame's patches, evenly spread, and none of the others
    frame_discount   d: the k-th best patch of a P-frame (from 0) counts 1 / (1 + d k) of its score,
                     against one frame that takes all
    time_discount    d: a patch counts 1 - d of its score where the same place scores more in the
                     P-frame before or after, which most likely shows the same
    time_buckets     the P-frames are cut into that many spans of time, which take turns, each
                     giving its next best patch: no span of a clip goes without

A clip in which nothing moves (saliency.is_static) has no best P-frame patches; whole P-frames at
even times are taken instead, and `is_static` of the selection is True.

Patches of a P-frame that touch padding (content.py) are never taken; whole I-frames are taken with
theirs.

Shape legend: T frames, h, w patch grid, K selected patches.
"""

from dataclasses import dataclass

import numpy as np

# Roberts' R2 sequence: multiples of 1/g and 1/g^2, g the real root of g^3 = g + 1, modulo 1. Along
# rows and columns they give a mask whose every level is spread evenly.
SPREAD = (0.7548776662466927, 0.5698402909980532)
HIGHEST = float(np.finfo(np.float16).max)  # of a stored score


@dataclass(frozen=True)
class Order:
    """What changes the order of patches, as above."""

    i_frame_share: float = 1.0
    frame_discount: float = 0.0
    time_discount: float = 0.0
    time_buckets: int = 1

    def __post_init__(self) -> None:
        for name in ("i_frame_share", "time_discount"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, must lie between 0 and 1")
        if not 0 <= self.frame_discount < float("inf"):
            raise ValueError(f"frame_discount is {self.frame_discount}, must be 0 or more")
        if self.time_buckets < 1:
            raise ValueError(f"time_buckets is {self.time_buckets}, must be at least 1")


@dataclass(frozen=True)
class Selection:
    """positions uint16 [K, 3] (t index of the frame, row, column), scores float16 [K] (I-frame
    patches the highest), is_static.
    """

    positions: np.ndarray
    scores: np.ndarray
    is_static: bool


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
    scores: np.ndarray,
    is_i_frame: np.ndarray,
    budget: int,
    order: Order | None = None,
    is_static: bool = False,
    is_content: np.ndarray | None = None,
) -> Selection:
    """Choose at most `budget` patches by scores [T, h, w]; of P-frames only those of the mask
    `is_content` [h, w], where it is given.

    Raises ValueError when the budget cannot hold every I-frame.
    """
    order = order or Order()
    frames, height, width = scores.shape
    of_i_frame = np.flatnonzero(spread_mask(height, width, share=order.i_frame_share))
    num_i_frames = int(is_i_frame.sum())
    if budget < num_i_frames * len(of_i_frame):
        raise ValueError(
            f"a budget of {budget} patches cannot hold {num_i_frames} I-frames of "
            f"{len(of_i_frame)}: raise it, lower the size, or take a longer GOP"
        )
    linear = np.arange(scores.size).reshape(frames, height * width)
    # indices of patches in the clip, frame by frame
    intra = linear[is_i_frame][:, of_i_frame].ravel()
    of_p_frame = slice(None) if is_content is None else np.flatnonzero(is_content)
    candidates = linear[~is_i_frame][:, of_p_frame]
    ranked = scores.reshape(-1)[candidates]
    # without any score no patch is better than another
    is_static = candidates.size > 0 and (is_static or not ranked.any())
    if is_static:
        num_p_frames, per_frame = candidates.shape
        best = _even_frames(num_p_frames, per_frame)
    else:
        best = _best_first(ranked, order)
    inter_scores = ranked.ravel()[best]
    selected = np.concatenate([intra, candidates.ravel()[best]])[:budget]
    # patches of I-frames have no score of their own and get the highest
    highest = max(1.0, float(inter_scores.max(initial=0.0)))
    selected_scores = np.concatenate([np.full(len(intra), highest), inter_scores])[:budget]
    positions = np.stack(np.unravel_index(selected, scores.shape), axis=-1)
    return Selection(
        positions=positions.astype(np.uint16),
        scores=np.minimum(selected_scores, HIGHEST).astype(np.float16),
        is_static=is_static,
    )


def spread_mask(height: int, width: int, share: float) -> np.ndarray:
    """Mask bool [h, w] of the nearest whole number to this share of the patches, evenly spread."""
    rows = np.arange(height)[:, None] * SPREAD[0]
    columns = np.arange(width)[None, :] * SPREAD[1]
    levels = (rows + columns) % 1.0
    taken = np.argsort(levels, axis=None, kind="stable")[: round(share * height * width)]
    mask = np.zeros(height * width, bool)
    mask[taken] = True
    return mask.reshape(height, width)


def _best_first(scores: np.ndarray, order: Order) -> np.ndarray:
    """Order of P-frame patches of scores [P-frames, patches] by falling score, as discounted, in
    turns over the buckets of time."""
    num_frames, num_patches = scores.shape
    if order.time_discount and num_frames > 1:
        scores = np.where(_is_peak_in_time(scores), scores, scores * (1 - order.time_discount))
    if order.frame_discount:
        falling = np.argsort(-scores, axis=1, kind="stable")
        rank = np.argsort(falling, axis=1, kind="stable")
        scores = scores / (1 + order.frame_discount * rank)
    best = np.argsort(-scores, axis=None, kind="stable")  # stable: ties stay in order of position
    if order.time_buckets == 1 or num_frames == 0:
        return best
    # rank within its bucket decides first, so that all buckets give their best, then their second
    frame = best // num_patches
    bucket = frame * min(order.time_buckets, num_frames) // num_frames
    turn = np.empty_like(bucket)
    for number in np.unique(bucket):
        members = bucket == number
        turn[members] = np.arange(members.sum())
    return best[np.lexsort((bucket, turn))]


def _is_peak_in_time(scores: np.ndarray) -> np.ndarray:
    """Whether no neighbour in time scores more at the same place; scores [P-frames, patches]."""
    is_peak = np.ones(scores.shape, bool)
    is_peak[1:] &= scores[1:] >= scores[:-1]
    is_peak[:-1] &= scores[:-1] >= scores[1:]
    return is_peak


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
