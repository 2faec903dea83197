"""Quarter-pel prediction against the standard, sample by sample (ITU-T H.264, 8.4.2.2.1)."""

import numpy as np
import pytest

from data_pipeline.codec.motion_compensation import predict_luma

HEIGHT, WIDTH, CELL = 16, 24, 8


def picture() -> np.ndarray:
    """Noise with edges, so that the filter overshoots and samples are clipped."""
    rng = np.random.default_rng(0)
    plane = rng.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    plane[4:9, 6:12] = 255
    plane[4:9, 12:18] = 0
    return plane


class Samples:
    """Names of the standard: G at (x, y), b and h half way to the right and down, j both."""

    def __init__(self, plane: np.ndarray):
        self._plane = plane.astype(int)

    def whole(self, x: int, y: int) -> int:
        return self._plane[min(max(y, 0), HEIGHT - 1), min(max(x, 0), WIDTH - 1)]

    def _b1(self, x: int, y: int) -> int:
        taps = zip((1, -5, 20, 20, -5, 1), range(-2, 4), strict=True)
        return sum(weight * self.whole(x + i, y) for weight, i in taps)

    def _h1(self, x: int, y: int) -> int:
        taps = zip((1, -5, 20, 20, -5, 1), range(-2, 4), strict=True)
        return sum(weight * self.whole(x, y + i) for weight, i in taps)

    def b(self, x: int, y: int) -> int:
        return min(max((self._b1(x, y) + 16) >> 5, 0), 255)

    def h(self, x: int, y: int) -> int:
        return min(max((self._h1(x, y) + 16) >> 5, 0), 255)

    def j(self, x: int, y: int) -> int:
        taps = zip((1, -5, 20, 20, -5, 1), range(-2, 4), strict=True)
        total = sum(weight * self._b1(x, y + i) for weight, i in taps)
        return min(max((total + 512) >> 10, 0), 255)

    def at(self, quarter_x: int, quarter_y: int) -> int:
        """The sample at quarter-pel coordinates, as table 8-12 averages it."""
        x, y = quarter_x >> 2, quarter_y >> 2
        g, b, h, j = self.whole(x, y), self.b(x, y), self.h(x, y), self.j(x, y)
        right, below = self.whole(x + 1, y), self.whole(x, y + 1)  # H and M
        m, s = self.h(x + 1, y), self.b(x, y + 1)
        pairs = {
            (0, 0): (g, g), (1, 0): (g, b), (2, 0): (b, b), (3, 0): (b, right),
            (0, 1): (g, h), (1, 1): (b, h), (2, 1): (b, j), (3, 1): (b, m),
            (0, 2): (h, h), (1, 2): (h, j), (2, 2): (j, j), (3, 2): (j, m),
            (0, 3): (h, below), (1, 3): (h, s), (2, 3): (j, s), (3, 3): (s, m),
        }  # fmt: skip
        one, two = pairs[quarter_x & 3, quarter_y & 3]
        return (one + two + 1) >> 1


@pytest.mark.parametrize("vector_y", [-13, -6, 0, 3])
@pytest.mark.parametrize("vector_x", [-7, 0, 1, 6])
def test_prediction_is_that_of_the_standard(vector_x, vector_y):
    """Every cell has a vector of its own, so that all sixteen places between samples occur."""
    rows, columns = HEIGHT // CELL, WIDTH // CELL
    vectors = np.zeros((rows, columns, 2), np.int32)
    vectors[..., 0] = vector_x + np.arange(rows * columns).reshape(rows, columns)
    vectors[..., 1] = vector_y + np.arange(columns)
    plane = picture()
    samples = Samples(plane)
    wanted = np.array(
        [
            [
                samples.at(4 * x + vectors[y // CELL, x // CELL, 0],
                           4 * y + vectors[y // CELL, x // CELL, 1])
                for x in range(WIDTH)
            ]
            for y in range(HEIGHT)
        ]
    )  # fmt: skip
    assert np.array_equal(predict_luma(plane, vectors, CELL), wanted)
