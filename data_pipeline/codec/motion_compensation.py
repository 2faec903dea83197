"""Quarter-pel motion compensation of a luma plane, as ITU-T H.264 section 8.4.2.2.1 defines it.

FFmpeg exports the vectors of a stream but not the prediction they make, so it is rebuilt here:
half-pel samples by the six-tap filter (1, -5, 20, 20, -5, 1) / 32, quarter-pel samples by averaging
the two nearest of those. Beyond the border the edge repeats. Cost: five filter passes and four
gathers per frame.
"""

import numpy as np

TAPS = (1, -5, 20, 20, -5, 1)
PAD = 8  # the filter reaches 3 samples out; farther out all samples of an edge are equal


def predict_luma(reference: np.ndarray, vectors: np.ndarray, cell: int) -> np.ndarray:
    """Prediction int16 [H, W] of a frame from the one before.

    reference: uint8 [H, W]; vectors: int32 [H/cell, W/cell, 2], quarter pixels (x, y) from the
    block to its source.
    """
    height, width = reference.shape
    plane = _half_pel_plane(reference)
    per_pixel = np.repeat(np.repeat(vectors, cell, axis=0), cell, axis=1)[:height, :width]
    x = np.arange(width)[None, :] * 4 + per_pixel[..., 0]
    y = np.arange(height)[:, None] * 4 + per_pixel[..., 1]
    x = np.clip(x + 4 * PAD, 0, 4 * (width + 2 * PAD - 1))
    y = np.clip(y + 4 * PAD, 0, 4 * (height + 2 * PAD - 1))
    left, top, odd_x, odd_y = x >> 1, y >> 1, x & 1, y & 1
    # a sample between two half-pel positions is the mean of the two; when both coordinates lie
    # between, the pair is the diagonal whose ends are half-pel in one direction only
    anti = odd_x & odd_y & ((left + top) & 1 ^ 1)
    first = plane[top + anti, left]
    second = plane[top + (odd_y ^ anti), left + odd_x]
    return (first + second + 1) >> 1


def _half_pel_plane(reference: np.ndarray) -> np.ndarray:
    """int16 [2(H+2 PAD), 2(W+2 PAD)]: even indices are whole samples, odd ones half-pel samples."""
    padded = np.pad(reference, PAD, mode="edge").astype(np.int32)
    horizontal, vertical = _six_tap(padded, 1), _six_tap(padded, 0)
    plane = np.empty((2 * padded.shape[0], 2 * padded.shape[1]), np.int16)
    plane[::2, ::2] = padded
    plane[::2, 1::2] = np.clip((horizontal + 16) >> 5, 0, 255)
    plane[1::2, ::2] = np.clip((vertical + 16) >> 5, 0, 255)
    plane[1::2, 1::2] = np.clip((_six_tap(horizontal, 0) + 512) >> 10, 0, 255)
    return plane


def _six_tap(samples: np.ndarray, axis: int) -> np.ndarray:
    """Unscaled filter output halfway between sample i and i + 1 along an axis, edges repeated."""
    width = [(0, 0), (0, 0)]
    width[axis] = (2, 3)
    wide = np.pad(samples, width, mode="edge")
    length = samples.shape[axis]
    return sum(tap * np.take(wide, range(i, i + length), axis=axis) for i, tap in enumerate(TAPS))
