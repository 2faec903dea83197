"""What the encoder sees of a pack: each item a row, each of its instants a picture, patches at
their places, grey where there is none. Cost: a few milliseconds; drawn once per start.
"""

import numpy as np

from data_pipeline.loading.packing import PackedBatch

GREY = 128


def pack_picture(
    batch: PackedBatch, patch_size: int, most_items: int = 4, most_instants: int = 8
) -> np.ndarray:
    """uint8 [H, W, 3] of the first items of a batch; of many instants those that hold the most
    patches, in order of time."""
    bounds = batch.cu_seqlens.tolist()
    rows = []
    for item in range(min(batch.num_samples, most_items)):
        piece = slice(bounds[item], bounds[item + 1])
        pixels = batch.pixels[piece].cpu().numpy()
        positions = batch.patch_positions[piece].cpu().numpy()
        patches = pixels.reshape(-1, 3, patch_size, patch_size).transpose(0, 2, 3, 1)
        rows.append(_row(patches, positions, most_instants))
    height, width = max(len(row) for row in rows), max(row.shape[1] for row in rows)
    return np.concatenate([_padded(row, height, width) for row in rows])


def _row(patches: np.ndarray, positions: np.ndarray, most: int) -> np.ndarray:
    instants, counts = np.unique(positions[:, 0], return_counts=True)
    shown = np.sort(instants[np.argsort(-counts, kind="stable")[:most]])
    high, wide = positions[:, 1].max() + 1, positions[:, 2].max() + 1
    size = patches.shape[1]
    row = np.full((high * size, len(shown) * (wide * size + 2), 3), GREY, np.uint8)
    for place, instant in enumerate(shown):
        for k in np.flatnonzero(positions[:, 0] == instant):
            top = positions[k, 1] * size
            left = place * (wide * size + 2) + positions[k, 2] * size
            row[top : top + size, left : left + size] = patches[k]
    return row


def _padded(row: np.ndarray, height: int, width: int) -> np.ndarray:
    out = np.full((height + 2, width, 3), GREY, np.uint8)
    out[: row.shape[0], : row.shape[1]] = row
    return out
