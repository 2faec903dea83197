"""What the drawn sets share: camera paths, a smooth background, textured shapes, small discs.

Everything is drawn on a float32 canvas [T, S, S, 3] with values 0 to 1, and wraps around at its
borders; `to_bytes` turns it into frames. All functions that take a generator draw from it in a
fixed order: another order gives other clips, and needs another version of every set.

Shape legend: T frames, S side of the square frame in pixels.
"""

import math
from dataclasses import dataclass

import numpy as np

SCALE_RANGE = (0.6, 1.6)  # of the shape's nominal size
TEXTURE = 64  # texels of a side; divisible by the 8 blocks of colour
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.65, 0.20, 0.80),
    "white": (0.92, 0.92, 0.92),
}
OUTLINES = {3: "triangle", 4: "cross", 5: "star"}  # what so many corners look like
DEPTHS = {3: 0.20, 4: 0.70, 5: 0.40}  # of the notches between them, as a share of the radius


@dataclass(frozen=True)
class Appearance:
    """What the moving shape looks like: a name of COLOURS, around which its texture varies, and a
    number of corners of OUTLINES.
    """

    colour: str
    corners: int

    def __post_init__(self) -> None:
        for name, choices in (("colour", COLOURS), ("corners", OUTLINES)):
            value = getattr(self, name)
            if value not in choices:
                names = ", ".join(map(str, choices))
                raise ValueError(f"{name} is {value!r}; choose one of {names}")


def shake_of(rng: np.random.Generator, jitter: float, frames: int) -> np.ndarray:
    """Path of a shaking camera, float32 [T, 2] in pixels (x, y): a random walk about zero whose
    steps have the standard deviation `jitter`."""
    steps = rng.normal(0, jitter, (frames, 2))
    shake = np.cumsum(steps, axis=0)
    return (shake - shake.mean(axis=0)).astype(np.float32)


def to_bytes(canvas: np.ndarray) -> np.ndarray:
    """Frames uint8 [T, S, S, 3] of a canvas; values beyond 0 to 1 are clipped."""
    return (np.clip(canvas, 0, 1) * 255).astype(np.uint8)


@dataclass
class Pose:
    """Per frame: centre (x, y) in sides of the frame, size factor, angle in radians; float32 [T]
    each."""

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    angle: np.ndarray


def random_pose(rng: np.random.Generator, frames: int) -> Pose:
    """A pose that rests at a random place, size and angle."""
    low, high = SCALE_RANGE
    # the order of the draws decides the clips
    return Pose(
        x=np.full(frames, rng.uniform(), np.float32),
        y=np.full(frames, rng.uniform(), np.float32),
        scale=np.full(frames, low * (high / low) ** rng.uniform(), np.float32),
        angle=np.full(frames, rng.uniform(0, 2 * math.pi), np.float32),
    )


class Shape:
    """A random textured outline: radius as a function of the angle, colours on a small texture.

    `radius` is the range of the nominal radius in sides of the frame, `brightness` that of the
    texture's channels. An appearance fixes corners and colour, and is applied after the draws.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        radius: tuple[float, float],
        size: int,
        brightness: tuple[float, float],
        appearance: Appearance | None = None,
    ):
        self.radius = rng.uniform(*radius) * size
        self.corners = int(rng.integers(2, 6))
        self.depth = rng.uniform(0.1, 0.35)
        blocks = rng.uniform(*brightness, (8, 8, 3)).astype(np.float32)
        if appearance is not None:
            # after the draws: what is drawn later stays the same
            self.corners = appearance.corners
            self.depth = DEPTHS[appearance.corners]
            spread = blocks - sum(brightness) / 2
            blocks = np.array(COLOURS[appearance.colour], np.float32) + 0.6 * spread
        block = np.ones((TEXTURE // 8, TEXTURE // 8, 1), np.float32)
        self.texture = np.kron(blocks, block)

    def paint(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Colour [..., 3] and softness of the edge [...] at shape coordinates in nominal pixels."""
        distance = np.hypot(x, y)
        angle = np.arctan2(y, x)
        notch = 0.5 + 0.5 * np.cos(self.corners * angle)  # 0 at a corner, 1 halfway to the next
        outline = self.radius * (1 - self.depth * notch)
        alpha = np.clip(outline - distance + 0.5, 0, 1)  # the edge is one pixel wide
        scale = TEXTURE / (2 * self.radius)
        u = np.clip((x + self.radius) * scale, 0, TEXTURE - 1)
        v = np.clip((y + self.radius) * scale, 0, TEXTURE - 1)
        colour = self.texture[v.astype(np.int32), u.astype(np.int32)]
        return colour, alpha


def draw_shape(canvas: np.ndarray, shape: Shape, pose: Pose, shake: np.ndarray) -> None:
    """Blend a shape into float32 canvas [T, S, S, 3], wrapping around the borders;
    only its bounding box is touched.
    """
    size = canvas.shape[1]
    for t in range(len(canvas)):
        # at most half the frame: a wider box would wrap around onto itself
        radius = int(shape.radius * pose.scale[t])
        reach = min(radius + 2, size // 2)
        centre_x = float(pose.x[t] * size + shake[t, 0])
        centre_y = float(pose.y[t] * size + shake[t, 1])
        middle_column = math.floor(centre_x)
        middle_row = math.floor(centre_y)
        columns = np.arange(middle_column - reach, middle_column + reach)
        rows = np.arange(middle_row - reach, middle_row + reach)
        from_centre_x = (columns - centre_x).astype(np.float32)
        from_centre_y = (rows - centre_y).astype(np.float32)
        dx = from_centre_x[None, :] / pose.scale[t]
        dy = from_centre_y[:, None] / pose.scale[t]
        cos = math.cos(pose.angle[t])
        sin = math.sin(pose.angle[t])
        # pixels are turned back into the shape's own coordinates
        x = cos * dx + sin * dy
        y = cos * dy - sin * dx
        colour, alpha = shape.paint(x, y)
        box = np.ix_(rows % size, columns % size)
        alpha = alpha[..., None]
        behind = canvas[t][box]
        canvas[t][box] = behind * (1 - alpha) + colour * alpha


def background(
    rng: np.random.Generator, size: int, contrast: float, shake: np.ndarray
) -> np.ndarray:
    """Smooth periodic texture moved by the camera, float32 [T, S, S, 3]."""
    waves = 3 + int(7 * contrast)
    # white noise without its high frequencies: smooth, and periodic, so it can be rolled
    frequency = np.abs(np.fft.fftfreq(size, 1 / size))
    higher = np.maximum(frequency[:, None], frequency[None, :])
    low = higher <= waves
    real = rng.normal(size=(3, size, size))
    imaginary = rng.normal(size=(3, size, size))
    spectrum = (real + 1j * imaginary) * low
    texture = np.fft.ifft2(spectrum).real
    standard = (texture - texture.mean()) / texture.std()
    brightness = rng.uniform(0.15, 0.35)  # below the moving shape, 0.5 to 1
    texture = standard * 0.12 * contrast + brightness
    texture = texture.transpose(1, 2, 0).astype(np.float32)
    whole = np.rint(shake).astype(int)  # in whole pixels a roll loses nothing
    moved = [np.roll(texture, (dy, dx), axis=(0, 1)) for dx, dy in whole]
    return np.stack(moved)


def draw_disc(frame: np.ndarray, centre: tuple[float, float], radius: float, colour: str) -> None:
    """Blend a disc of one of COLOURS into one float32 frame [S, S, 3], with an edge one pixel wide.
    `centre` is (x, y) in pixels, pixel centres lying at whole numbers. It does not wrap around."""
    rows = np.arange(frame.shape[0], dtype=np.float32)[:, None]
    columns = np.arange(frame.shape[1], dtype=np.float32)[None, :]
    distance = np.hypot(columns - centre[0], rows - centre[1])
    alpha = np.clip(radius - distance + 0.5, 0, 1)[..., None]
    frame *= 1 - alpha
    frame += alpha * np.array(COLOURS[colour], np.float32)
