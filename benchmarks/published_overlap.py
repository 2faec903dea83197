"""How many patches that the public preparation tool chose does `--rule published_llava` choose too?

    python benchmarks/published_overlap.py VIDEO INDEX_FOLDER

INDEX_FOLDER holds NAME.visidx_thw.npy, int32 [K, 3], and NAME.frame_ids.npy, int32 [T], of the
video's name: the public tool's own files. Prints one JSON line: overlap of the patches that are not
of frame 0, its value by chance, rank correlations of how many patches each frame, and each cell of
4 frames x 4 x 4 patches, was given by both.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from data_pipeline.codec.decode import decode_video
from data_pipeline.codec.framing import Framing
from data_pipeline.codec.published_rule import choose_published, decompose_published

CELL = (4, 4, 4)  # frames, rows and columns of patches


def published_overlap(video: Path, index_folder: Path, size: int, patch_size: int) -> dict:
    """The measures of one video."""
    public = np.load(index_folder / f"{video.stem}.visidx_thw.npy")
    frame_ids = np.load(index_folder / f"{video.stem}.frame_ids.npy")
    framing = Framing(
        num_frames=len(frame_ids), size=size, patch_size=patch_size, fit="pad", by_index=True
    )
    start = time.perf_counter()
    indices = decode_video(video, framing).indices
    decoded = time.perf_counter()
    clip, scores = decompose_published(video, framing)
    scored = time.perf_counter()
    selection = choose_published(clip, scores, budget=len(public), whole_first_frame=True)
    theirs = _marked(public, scores.shape)
    ours = _marked(selection.positions, scores.shape)
    inside = clip.whole_patches(patch_size)
    candidates = (len(scores) - 1) * int(inside.sum())
    return {
        "video": video.name,
        "same_frames": bool(np.array_equal(indices, frame_ids)),
        "patches": int(theirs.sum()),
        "overlap": round(float((ours & theirs).sum() / theirs.sum()), 4),
        "chance": round(float(theirs.sum() / candidates), 4),
        "rank_frames": round(_rank_correlation(_per_frame(ours), _per_frame(theirs)), 3),
        "rank_cells": round(
            _rank_correlation(_per_cell(ours, inside), _per_cell(theirs, inside)), 3
        ),
        "outside": int(theirs[:, ~inside].sum() + ours[:, ~inside].sum()),
        "seconds_decoding": round(decoded - start, 2),
        "seconds_rule": round(scored - decoded, 2),
    }


def _marked(positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Mask bool [T, h, w] of positions [K, 3] without those of frame 0."""
    mask = np.zeros(shape, bool)
    mask[tuple(positions.astype(int).T)] = True
    mask[0] = False
    return mask


def _per_frame(mask: np.ndarray) -> np.ndarray:
    return mask[1:].sum(axis=(1, 2))


def _per_cell(mask: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Patches in every whole cell of the frames behind frame 0 and of the content."""
    rows = np.flatnonzero(inside.any(axis=1))
    columns = np.flatnonzero(inside.any(axis=0))
    content = mask[1:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    counts = [side // cell for side, cell in zip(content.shape, CELL, strict=True)]
    whole = content[: counts[0] * CELL[0], : counts[1] * CELL[1], : counts[2] * CELL[2]]
    cells = whole.reshape(counts[0], CELL[0], counts[1], CELL[1], counts[2], CELL[2])
    return cells.sum(axis=(1, 3, 5)).ravel()


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties at their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def main() -> None:
    """Print the measures."""
    parser = argparse.ArgumentParser(description="Compare with the public tool's choice.")
    parser.add_argument("video", type=Path)
    parser.add_argument("index_folder", type=Path)
    parser.add_argument("--size", type=int, default=576, help="side of the padded square")
    parser.add_argument("--patch-size", type=int, default=16)
    args = parser.parse_args()
    measures = published_overlap(
        args.video, args.index_folder, size=args.size, patch_size=args.patch_size
    )
    print(json.dumps(measures))


if __name__ == "__main__":
    main()
