"""A small labelled set of real H.264 clips whose class is the motion, and nothing but the motion.

Eight classes: move left, right, up, down, turn clockwise, counterclockwise, grow, shrink. A
textured shape moves over a smooth background while the camera shakes; texture, shape, colours,
place, size, angle and speed are random. Places wrap around, sizes run through a saw-tooth of random
phase and angles start anywhere, so at every instant all classes show the same distribution of
pictures: no single frame shows the class. Cost: about 0.04 s per 112 px clip of 64 frames. The
layout is that of clips.py.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..random import counter_rng
from .clips import list_clips, start_set, write_lists, write_missing
from .drawing import (
    SCALE_RANGE,
    Appearance,
    Pose,
    Shape,
    background,
    draw_shape,
    random_pose,
    shake_of,
    to_bytes,
)

GENERATOR_VERSION = 1  # moves when the same arguments give other clips
CLASSES = ("left", "right", "up", "down", "clockwise", "counterclockwise", "grow", "shrink")


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
    shake = shake_of(rng, jitter=level.jitter, frames=frames)
    canvas = background(rng, size=size, contrast=level.contrast, shake=shake)
    for _ in range(level.clutter):
        pose = random_pose(rng, frames)
        shape = Shape(rng, radius=level.radius, size=size, brightness=(0.3, 0.9))
        draw_shape(canvas, shape=shape, pose=pose, shake=shake)
    pose = random_pose(rng, frames)
    shape = Shape(
        rng,
        radius=level.radius,
        size=size,
        brightness=(0.5, 1.0),
        appearance=appearance,
    )
    pose = move(pose, motion=CLASSES[label], rng=rng, time=time, size=size)
    draw_shape(canvas, shape=shape, pose=pose, shake=shake)
    return to_bytes(canvas)


def move(pose: Pose, motion: str, rng: np.random.Generator, time: np.ndarray, size: int) -> Pose:
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


def write_motion_shapes(
    directory: Path,
    num_train: int,
    num_val: int,
    difficulty: str = "easy",
    size: int = 112,
    seed: int = 0,
    workers: int = 2,
) -> None:
    """Write the set (layout in clips.py), classes in equal shares.
    Files that exist are not written again, so a killed run goes on.
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty is {difficulty!r}; choose one of {', '.join(DIFFICULTIES)}")
    start_set(
        directory,
        settings=[GENERATOR_VERSION, difficulty, size, seed],
        names="generator version, difficulty, size, seed",
    )
    clips = list_clips(num_train=num_train, num_val=num_val, num_classes=len(CLASSES))
    write_lists(directory, clips=clips, classes=CLASSES)
    render = partial(render_clip, seed=seed, difficulty=difficulty, size=size)
    write_missing(directory, clips=clips, render=render, workers=workers)
