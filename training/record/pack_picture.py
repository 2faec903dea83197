"""Image of a pack as the encoder sees it: each item a row, each of its frames a column, patches at
their positions (of a tube its first frame's), grey where there is none. Cost: a few milliseconds;
drawn once per start.
"""

import numpy as np

from data_pipeline.loading.packing import PackedBatch

GREY = 128
GAP = 2  # grey pixels between frames and between items


def pack_picture(
    batch: PackedBatch, patch_size: int, most_items: int = 4, most_frames: int = 8
) -> np.ndarray:
    """uint8 [H, W, 3] of the first items of a batch; of many frames those with the most patches, in
    order of time."""
    bounds = batch.cu_seqlens.tolist()
    rows = []
    for item in range(min(batch.num_samples, most_items)):
        tokens = slice(bounds[item], bounds[item + 1])
        pixels = batch.pixels[tokens].cpu().numpy()
        positions = batch.patch_positions[tokens].cpu().numpy()
        # rows of a pack are channels first, frames of a tube one below the other; images have
        # channels last
        tubes = pixels.reshape(len(pixels), 3, -1, patch_size)
        patches = tubes[:, :, :patch_size].transpose(0, 2, 3, 1)
        rows.append(_row(patches, positions=positions, most_frames=most_frames))
    width = max(row.shape[1] for row in rows)
    height = max(len(row) for row in rows) + GAP
    shape = (len(rows) * height, width, 3)
    image = np.full(shape, GREY, np.uint8)
    for number, row in enumerate(rows):
        top = number * height
        image[top : top + len(row), : row.shape[1]] = row
    return image


def _row(patches: np.ndarray, positions: np.ndarray, most_frames: int) -> np.ndarray:
    """uint8 [h, w, 3] of one item from its patches [n, p, p, 3] and positions (t, h, w) [n, 3]."""
    times, counts = np.unique(positions[:, 0], return_counts=True)
    # stable: of frames with as many patches the earlier ones are shown
    fullest = np.argsort(-counts, kind="stable")[:most_frames]
    shown = np.sort(times[fullest])
    high = positions[:, 1].max() + 1
    wide = positions[:, 2].max() + 1
    size = patches.shape[1]
    stride = wide * size + GAP  # pixels from one frame to the next
    shape = (high * size, len(shown) * stride, 3)
    row = np.full(shape, GREY, np.uint8)
    for column, time in enumerate(shown):
        for k in np.flatnonzero(positions[:, 0] == time):
            top = positions[k, 1] * size
            left = column * stride + positions[k, 2] * size
            row[top : top + size, left : left + size] = patches[k]
    return row
