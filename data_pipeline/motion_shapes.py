"""A small labelled set of real H.264 clips whose class is the motion, and nothing but the motion.

Eight classes: move left, right, up, down, turn clockwise, counterclockwise, grow, shrink. A
textured shape moves over a smooth background while the camera shakes; texture, shape, colours,
place, size, angle and speed are random. Places wrap around, sizes run through a saw-tooth of random
phase and angles start anywhere, so at every instant all classes show the same distribution of
pictures: no single frame shows the class. Cost: about 0.04 s per 112 px clip of 64 frames. Layout
written, as every labelled set here:

    DIR/clips/train_00000.mp4 ...   DIR/train.csv  DIR/val.csv    (lines: relative path,label)
    DIR/classes.txt   DIR/settings.json
"""

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from model_factory.files import DamagedFile, parse_json, read_json, write_atomically, write_json

from .random import counter_rng
from .stop import leave_to_parent

GENERATOR_VERSION = 1  # moves when the same arguments give other clips
CLASSES = ("left", "right", "up", "down", "clockwise", "counterclockwise", "grow", "shrink")
SCALE_RANGE = (0.6, 1.6)  # of the shape's nominal size; grow and shrink sweep it
TEXTURE = 64  # texels of a side; divisible by the 8 blocks of colour
VAL_INDEX = 1 << 24  # of the first validation clip: no index is in both splits


@dataclass(frozen=True)
class Difficulty:
    """Nuisance of a set: `jitter` camera shake in pixels, `clutter` number of resting shapes,
    `contrast` of the background (0..1), `radius` of the shape as a share of the frame.
    """

    jitter: float
    clutter: int
    contrast: float
    radius: tuple[float, float]


DIFFICULTIES = {
    "easy": Difficulty(jitter=0.4, clutter=0, contrast=0.25, radius=(0.20, 0.28)),
    "medium": Difficulty(jitter=1.0, clutter=2, contrast=0.5, radius=(0.16, 0.24)),
    "hard": Difficulty(jitter=2.0, clutter=6, contrast=1.0, radius=(0.10, 0.18)),
}
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


def render_clip(
    label: int,
    seed: int,
    index: int,
    difficulty: str,
    size: int = 112,
    frames: int = 64,
    appearance: Appearance | None = None,
) -> np.ndarray:
    """One clip, uint8 [frames, size, size, 3]; a pure function of its arguments. An appearance
    changes the shape's looks and nothing else; without one they are random.
    """
    level = DIFFICULTIES[difficulty]
    rng = counter_rng(seed, "motion_shapes", index)
    # all draws of a clip come from this generator: another order of them gives other clips, and
    # needs another GENERATOR_VERSION
    time = np.arange(frames, dtype=np.float32)
    steps = rng.normal(0, level.jitter, (frames, 2))
    # the camera's path: a random walk about zero
    shake = np.cumsum(steps, axis=0)
    shake = (shake - shake.mean(axis=0)).astype(np.float32)
    canvas = _background(rng, size=size, contrast=level.contrast, shake=shake)
    for _ in range(level.clutter):
        pose = _random_pose(rng, frames)
        shape = _Shape(rng, level=level, size=size, brightness=(0.3, 0.9))
        _draw(canvas, shape=shape, pose=pose, shake=shake)
    pose = _random_pose(rng, frames)
    shape = _Shape(rng, level=level, size=size, brightness=(0.5, 1.0), appearance=appearance)
    pose = _move(pose, motion=CLASSES[label], rng=rng, time=time, size=size)
    _draw(canvas, shape=shape, pose=pose, shake=shake)
    return (np.clip(canvas, 0, 1) * 255).astype(np.uint8)


@dataclass
class _Pose:
    """Per frame: centre (x, y) in sides of the frame, size factor, angle in radians; float32 [T]
    each."""

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    angle: np.ndarray


def _random_pose(rng: np.random.Generator, frames: int) -> _Pose:
    low, high = SCALE_RANGE
    # the order of the draws decides the clips
    return _Pose(
        x=np.full(frames, rng.uniform(), np.float32),
        y=np.full(frames, rng.uniform(), np.float32),
        scale=np.full(frames, low * (high / low) ** rng.uniform(), np.float32),
        angle=np.full(frames, rng.uniform(0, 2 * math.pi), np.float32),
    )


def _move(pose: _Pose, motion: str, rng: np.random.Generator, time: np.ndarray, size: int) -> _Pose:
    """Add the class's motion at a random speed to a resting pose.

    Speeds are such that over half a clip nothing passes half a frame or half a turn, beyond which
    two whole frames would not distinguish one direction from its opposite.
    """
    pixels = rng.uniform(0.6, 1.5) / size * time
    turn = rng.uniform(0.03, 0.08) * time
    sweep = rng.uniform(0.5, 1.0) / len(time) * time
    low, high = SCALE_RANGE
    # sizes on a logarithmic scale, 0 at the smallest and 1 at the largest
    phase = np.log(pose.scale / low) / np.log(high / low)
    if motion in ("left", "right"):
        pose.x = pose.x + (pixels if motion == "right" else -pixels)
    elif motion in ("up", "down"):
        pose.y = pose.y + (pixels if motion == "down" else -pixels)
    elif motion in ("clockwise", "counterclockwise"):
        pose.angle = pose.angle + (turn if motion == "clockwise" else -turn)
    else:
        phase = (phase + (sweep if motion == "grow" else -sweep)) % 1.0
        pose.scale = low * (high / low) ** phase
    return pose


class _Shape:
    """A random textured outline: radius as a function of the angle, colours on a small texture."""

    def __init__(
        self,
        rng: np.random.Generator,
        level: Difficulty,
        size: int,
        brightness: tuple[float, float],
        appearance: Appearance | None = None,
    ):
        self.radius = rng.uniform(*level.radius) * size
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


def _draw(canvas: np.ndarray, shape: _Shape, pose: _Pose, shake: np.ndarray) -> None:
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


def _background(
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


def write_clip(path: Path, frames: np.ndarray, fps: int = 25) -> None:
    """Encode uint8 [T, H, W, 3] as H.264 in mp4; the file appears whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        _encode(temporary, frames=frames, fps=fps)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _encode(path: Path, frames: np.ndarray, fps: int) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        # x264's macroblock tree reads memory it never wrote on small frames: unless it is off, the
        # same frames give different bytes from one call to the next
        stream.options = {"preset": "veryfast", "crf": "16", "x264-params": "mbtree=0"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def check_settings(path: Path, settings: list, names: str) -> None:
    """Clips of two kinds must not mix in one folder: the first run writes its settings to `path`,
    and ValueError ends a later one whose settings differ. `names` is what the message calls them.
    """
    if path.is_file():
        there = _read_settings(path)
        if there != settings:
            raise ValueError(
                f"{path.parent} holds clips of other settings {there} ({names}), "
                f"asked for are {settings}: delete the folder or take another"
            )
    write_json(path, {"settings": settings})


def _read_settings(path: Path) -> list:
    """The settings that a folder was written with: an object with its digest, a bare list by
    versions of before."""
    data = path.read_bytes()
    try:
        if data.startswith(b"["):
            return parse_json(b'{"settings": %s}' % data, str(path))["settings"]
        return read_json(path, {"settings": list})["settings"]
    except DamagedFile as error:
        raise ValueError(f"{error}: delete the folder or take another") from error


def _write_one(path: Path, label: int, index: int, seed: int, difficulty: str, size: int) -> None:
    frames = render_clip(label, seed=seed, index=index, difficulty=difficulty, size=size)
    write_clip(path, frames)


def write_motion_shapes(
    directory: Path,
    num_train: int,
    num_val: int,
    difficulty: str = "easy",
    size: int = 112,
    seed: int = 0,
    workers: int = 2,
) -> None:
    """Write the set (layout above), classes in equal shares.
    Files that exist are not written again, so a killed run goes on.
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty is {difficulty!r}; choose one of {', '.join(DIFFICULTIES)}")
    (directory / "clips").mkdir(parents=True, exist_ok=True)
    check_settings(
        directory / "settings.json",
        settings=[GENERATOR_VERSION, difficulty, size, seed],
        names="generator version, difficulty, size, seed",
    )
    paths = []
    labels = []
    indices = []
    for split, count, first in (("train", num_train, 0), ("val", num_val, VAL_INDEX)):
        lines = []
        for i in range(count):
            name = f"clips/{split}_{i:05d}.mp4"
            label = i % len(CLASSES)
            lines.append(f"{name},{label}\n")
            if not (directory / name).exists():
                paths.append(directory / name)
                labels.append(label)
                indices.append(first + i)
        write_atomically(directory / f"{split}.csv", "".join(lines).encode())
    write_atomically(directory / "classes.txt", ("\n".join(CLASSES) + "\n").encode())
    context = get_context("spawn")
    # label, index and path differ from clip to clip, the rest is the set's
    write_one = partial(_write_one, seed=seed, difficulty=difficulty, size=size)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=leave_to_parent) as pool:
        # the list waits for all, and raises what went wrong in a worker
        list(pool.map(write_one, paths, labels, indices, chunksize=8))
