"""What clusters are made of: directions of motion told apart, vectors centred and reduced."""

import numpy as np
import pytest

from data_pipeline.clustering.descriptor import DIRECTIONS, WEIGHTS, codec_descriptor
from data_pipeline.clustering.pipeline import fit_projection

GREY = np.full((16, 16, 3), 128, np.uint8)


@pytest.mark.parametrize("direction", range(DIRECTIONS))
def test_an_object_falls_into_the_direction_that_it_moves_in(direction):
    """Eighths of a turn from the right over down (y grows downwards)."""
    angle = 2 * np.pi * direction / DIRECTIONS
    motion = np.zeros((6, 8, 8, 3))
    motion[:, 2:5, 2:5, :2] = 3 * np.array([np.cos(angle), np.sin(angle)])
    histogram = codec_descriptor(motion, GREY)[:DIRECTIONS]
    assert histogram.argmax() == direction
    assert histogram.sum() == pytest.approx(histogram[direction])


@pytest.mark.parametrize("spin", [1, -1])
def test_turning_left_and_right_and_spreading_are_three_things(spin):
    y, x = np.mgrid[:8, :8] - 3.5
    inside = (np.hypot(x, y) < 3)[None, ..., None]
    turning = np.zeros((6, 8, 8, 3))
    turning[..., :2] = spin * np.stack([-y, x], axis=-1) * inside
    swirl = codec_descriptor(turning, GREY)[DIRECTIONS : DIRECTIONS + 2] / WEIGHTS["swirl"]
    assert swirl[0] * spin > 0.8 and abs(swirl[1]) < 0.2
    spreading = np.zeros((6, 8, 8, 3))
    spreading[..., :2] = spin * np.stack([x, y], axis=-1) * inside
    swirl = codec_descriptor(spreading, GREY)[DIRECTIONS : DIRECTIONS + 2] / WEIGHTS["swirl"]
    assert swirl[1] * spin > 0.8 and abs(swirl[0]) < 0.2


def test_a_projection_centres_and_keeps_the_directions_of_most_variance():
    rng = np.random.default_rng(0)
    spread = np.array([0.1, 5.0, 0.2, 2.0])
    raw = (100 + spread * rng.standard_normal((500, 4))).astype(np.float32)
    projection = fit_projection(raw, dims=2)
    np.testing.assert_allclose(np.abs(projection.components).round(1), np.eye(4)[[1, 3]])
    np.testing.assert_allclose(projection.mean, raw.mean(axis=0), rtol=1e-6)
    centred = raw - raw.mean(axis=0, dtype=np.float64)
    reduced = centred @ projection.components.T
    wanted = reduced / np.linalg.norm(reduced, axis=1, keepdims=True)
    np.testing.assert_allclose(projection(raw), wanted, rtol=0, atol=1e-4)
    whole = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(fit_projection(raw)(raw), whole, rtol=0, atol=1e-4)
