"""A labelled set of real H.264 clips whose class is told by one short, small event alone.

Eight classes: a disc that darts left, right, up or down; a red flash and then a blue one elsewhere,
or blue and then red; one blink, or two. An event takes 3 to 32 of 64 frames, and its disc has a
radius of 2 to 8 pixels; before and after, nothing tells the class. Coordinates are those of the
picture, also where the camera pans.

No single frame tells the class: in every class, at most one disc is shown, red as often as blue,
and at a place of the same distribution (`_Places`). Classes differ only in how many of an event's
frames are dark: none, or a quarter in the middle of two blinks, or the middle frame of an order of
odd duration. Three frames are the shortest event because two blinks need a dark frame between lit
ones; with the same durations for all classes, the duration does not tell the class either.

Draws (counter_rng) are functions of seed and index, never of the label: an index gives the same
scene, place, start, radius and colour under every label. Duration and scene are drawn once for
eight consecutive indices, so each class meets each of them equally often.

The layout is that of clips.py; `events.jsonl` holds each clip's `Event`. Cost: see
docs/evaluation.md.

Shape legend: T frames, S side of the frame in pixels, K tokens.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..random import counter_rng
from .clips import list_clips, read_events, start_set, write_lists, write_missing
from .drawing import Shape, background, draw_disc, draw_shape, random_pose, shake_of, to_bytes

GENERATOR_VERSION = 1  # moves when the same arguments give other clips
CLASSES = (
    "dart_left",
    "dart_right",
    "dart_up",
    "dart_down",
    "red_then_blue",
    "blue_then_red",
    "one_blink",
    "two_blinks",
)
DIRECTIONS = {
    "dart_left": (-1, 0),
    "dart_right": (1, 0),
    "dart_up": (0, -1),
    "dart_down": (0, 1),
}
NUM_FRAMES = 64
DURATIONS = (3, 4, 8, 16, 32)  # frames of an event
RADII = (2.0, 8.0)  # pixels; drawn evenly on a logarithmic scale
REACH = (0.27, 0.40)  # path of a dart as a share of S: one pixel per frame at the longest duration
MARGIN = 10  # pixels between the border and a disc's centre: the largest disc is whole
MIN_SIZE = 48  # below, margins and paths leave no room for places
SCENES = ("still", "busy", "pan")
# phases of an event's frames
FIRST = 0
SECOND = 1
DARK = -1

RESTING_SHAPES = 2
SHAPE_RADIUS = (0.16, 0.24)  # sides of the frame, as in motion_shapes at medium difficulty
CONTRAST = 0.5
NOISE = 0.008  # of the camera, about two grey levels: no frame repeats another exactly
JITTER = {"still": 0.2, "busy": 0.6, "pan": 0.2}  # camera shake in pixels
PAN_SPEED = (0.5, 1.2)  # pixels per frame
DRIFT_SPEED = (0.6, 1.5)  # pixels per frame of a busy scene's moving shapes, as of motion_shapes
DRIFTING_SHAPES = 2


@dataclass(frozen=True)
class EventFrame:
    """One frame of an event: its index, the disc's centre in pixels, and the phase: FIRST or SECOND
    half, or DARK where no disc is shown between them (x, y are then the place to look at)."""

    t: int
    x: float
    y: float
    phase: int


@dataclass(frozen=True)
class Event:
    """What is known of a clip: class, factors, and all `duration` frames of its event."""

    label: int
    duration: int
    radius: float
    scene: str
    start: int
    colour: str  # of the disc of darts and blinks
    frames: tuple[EventFrame, ...]


@dataclass(frozen=True)
class _Places:
    """Where discs may lie: `centre` float [2] (x, y) in pixels, `reach` pixels.

    A dart's place runs along one axis of a square of side `reach` about the centre, at a random
    place `across` of the other axis; a flash lies at a random place of a square. All those places
    are of one grid with a step per frame of the event, so over the frames of an event all classes
    show a disc at the same distribution of places.
    """

    centre: np.ndarray
    reach: float
    steps: np.ndarray  # int [2], column and row of the grid
    duration: int

    def at(self, column: int, row: int) -> tuple[float, float]:
        """(x, y) of a place of the grid."""
        share = np.array([column, row]) / (self.duration - 1) - 0.5
        x, y = self.centre + share * self.reach
        # as events.jsonl has them
        return round(float(x), 3), round(float(y), 3)

    @property
    def resting(self) -> tuple[float, float]:
        """(x, y) of the place that was drawn."""
        return self.at(int(self.steps[0]), int(self.steps[1]))


def _draw_places(rng: np.random.Generator, size: int, duration: int, reach: float) -> _Places:
    low = MARGIN + reach / 2
    centre = rng.uniform(low, size - low, 2)
    return _Places(
        centre=centre,
        reach=reach,
        steps=rng.integers(0, duration, 2),
        duration=duration,
    )


def scene_of(seed: int, index: int, scene: str) -> str:
    """The scene of a clip: `scene` itself, or one of SCENES for `mixed`."""
    if scene != "mixed":
        return scene
    rng = counter_rng(seed, "brief_events scene", index // len(CLASSES))
    return SCENES[rng.integers(len(SCENES))]


def draw_event(label: int, seed: int, index: int, scene: str = "mixed", size: int = 112) -> Event:
    """The event of a clip; a pure function of its arguments, and without any rendering."""
    block_rng = counter_rng(seed, "brief_events duration", index // len(CLASSES))
    duration = int(block_rng.choice(DURATIONS))
    # one generator for all other draws; they do not depend on the label
    rng = counter_rng(seed, "brief_events event", index)
    start = int(rng.integers(1, NUM_FRAMES - duration))  # a frame before it and one after it
    low, high = RADII
    radius = float(low * (high / low) ** rng.uniform())
    colours = ("red", "blue")
    colour = colours[rng.integers(2)]
    shortest, longest = REACH
    reach = float(rng.uniform(shortest, longest) * size)
    here = _draw_places(rng, size=size, duration=duration, reach=reach)
    there = _draw_places(rng, size=size, duration=duration, reach=reach)
    frames = [
        _event_frame(CLASSES[label], step=step, start=start, here=here, there=there)
        for step in range(duration)
    ]
    return Event(
        label=label,
        duration=duration,
        radius=radius,
        scene=scene_of(seed, index=index, scene=scene),
        start=start,
        colour=colour,
        frames=tuple(frames),
    )


def _event_frame(name: str, step: int, start: int, here: _Places, there: _Places) -> EventFrame:
    """Frame `step` of an event; `there` is the place of an order's second flash."""
    duration = here.duration
    # of an odd duration the first half is the longer one
    phase = FIRST if 2 * step < duration else SECOND
    x, y = here.resting
    if name in DIRECTIONS:
        along_x, along_y = DIRECTIONS[name]
        column, row = here.steps
        if along_x:
            column = step if along_x > 0 else duration - 1 - step
        else:
            row = step if along_y > 0 else duration - 1 - step
        x, y = here.at(int(column), int(row))
    elif name in ("red_then_blue", "blue_then_red"):
        # dark in the middle of an odd duration: else one colour would be shown for longer
        if 2 * step == duration - 1:
            phase = DARK
        elif phase == SECOND:
            x, y = there.resting
    elif name == "two_blinks":
        first_dark = (duration - _dark_frames(duration)) // 2
        if first_dark <= step < duration - first_dark:
            phase = DARK
    return EventFrame(t=start + step, x=x, y=y, phase=phase)


def _dark_frames(duration: int) -> int:
    """Frames between two blinks: about a quarter, and as odd as the duration, so that both blinks
    are equally long."""
    return max(2 - duration % 2, duration // 4)


def render_clip(
    label: int, seed: int, index: int, scene: str = "mixed", size: int = 112
) -> np.ndarray:
    """One clip, uint8 [64, size, size, 3]; a pure function of its arguments."""
    event = draw_event(label, seed=seed, index=index, scene=scene, size=size)
    canvas = _draw_scene(event.scene, seed=seed, index=index, size=size)
    for frame in event.frames:
        if frame.phase != DARK:
            colour = event_colour(event, frame)
            draw_disc(canvas[frame.t], (frame.x, frame.y), radius=event.radius, colour=colour)
    return to_bytes(canvas)


def event_colour(event: Event, frame: EventFrame) -> str:
    """Name of the colour that a lit frame of an event shows."""
    if CLASSES[event.label] == "red_then_blue":
        return "red" if frame.phase == FIRST else "blue"
    if CLASSES[event.label] == "blue_then_red":
        return "blue" if frame.phase == FIRST else "red"
    return event.colour


def _draw_scene(scene: str, seed: int, index: int, size: int) -> np.ndarray:
    """What all classes show of an index: float32 [64, S, S, 3]."""
    rng = counter_rng(seed, "brief_events picture", index)
    time = np.arange(NUM_FRAMES, dtype=np.float32)
    path = shake_of(rng, jitter=JITTER[scene], frames=NUM_FRAMES)
    if scene == "pan":
        path = path + _straight(rng, speed=PAN_SPEED, time=time)
    canvas = background(rng, size=size, contrast=CONTRAST, shake=path)
    for _ in range(RESTING_SHAPES):
        shape = Shape(rng, radius=SHAPE_RADIUS, size=size, brightness=(0.3, 0.8))
        draw_shape(canvas, shape=shape, pose=random_pose(rng, NUM_FRAMES), shake=path)
    if scene == "busy":
        for _ in range(DRIFTING_SHAPES):
            shape = Shape(rng, radius=SHAPE_RADIUS, size=size, brightness=(0.3, 0.8))
            pose = random_pose(rng, NUM_FRAMES)
            drift = path + _straight(rng, speed=DRIFT_SPEED, time=time)
            draw_shape(canvas, shape=shape, pose=pose, shake=drift)
    canvas += NOISE * rng.standard_normal(canvas.shape, dtype=np.float32)
    return canvas


def _straight(rng: np.random.Generator, speed: tuple[float, float], time: np.ndarray) -> np.ndarray:
    """A straight path in a random direction, float32 [T, 2] in pixels; `speed` in pixels per
    frame."""
    angle = rng.uniform(0, 2 * np.pi)
    slowest, fastest = speed
    step = rng.uniform(slowest, fastest) * np.array([np.cos(angle), np.sin(angle)])
    return time[:, None] * step.astype(np.float32)


def patch_tokens(positions: np.ndarray, side: float) -> np.ndarray:
    """Tokens for `decidable`, float [K, 5], of patches at `positions` [K, 3] (frame, row, column).

    side: of a patch in pixels of the clip; a frame of 32 px cut into 16 px patches has patches of
    56 px where the clip has 112.
    """
    frame, row, column = np.asarray(positions, float).T
    box = [column * side, row * side, (column + 1) * side, (row + 1) * side]
    return np.stack([frame, *box], axis=1)


def seen_frames(event: Event, tokens: np.ndarray) -> list[EventFrame]:
    """The frames of an event that tokens show: those for which a token of the same frame holds the
    disc's centre, or in the dark its place. A token's box includes its left and top border."""
    tokens = np.asarray(tokens, float).reshape(-1, 5)
    time, left, top, right, bottom = tokens.T
    seen = []
    for frame in event.frames:
        in_columns = (left <= frame.x) & (frame.x < right)
        in_rows = (top <= frame.y) & (frame.y < bottom)
        if ((time == frame.t) & in_columns & in_rows).any():
            seen.append(frame)
    return seen


def decidable(event: Event, tokens: np.ndarray) -> bool:
    """Whether tokens show what it takes to tell an event's class from the others.

    tokens: [K, 5], per token the index of its frame and its box (left, top, right, bottom) in
    pixels of the clip. A token that spans several frames is given once per frame.

    A dart needs two of its frames; an order of flashes one frame of either flash; one blink one
    frame of either half; two blinks one frame of either and a dark one between them. This is
    geometry: it does not say whether an encoder could tell the class from these tokens, and single
    frames between those that are seen are taken for what they seem to be.
    """
    seen = seen_frames(event, tokens)
    if CLASSES[event.label] in DIRECTIONS:
        return len(seen) >= 2
    phases = {frame.phase for frame in seen}
    needed = {FIRST, SECOND}
    if CLASSES[event.label] == "two_blinks":
        needed.add(DARK)
    return needed <= phases


def load_events(directory: Path) -> dict[str, Event]:
    """The event of each clip of a written set, by the clip's name in the lists."""
    events = {}
    fields = {"duration": int, "radius": float, "scene": str, "start": int, "frames": list}
    for row in read_events(directory, fields={**fields, "colour": str}):
        name = row.pop("file")
        frames = tuple(EventFrame(*frame) for frame in row.pop("frames"))
        events[name] = Event(frames=frames, **row)
    return events


def _row(event: Event) -> dict:
    """An event for events.jsonl; each frame is [t, x, y, phase]."""
    frames = [[frame.t, frame.x, frame.y, frame.phase] for frame in event.frames]
    return {**asdict(event), "frames": frames}


def write_brief_events(
    directory: Path,
    num_train: int,
    num_val: int,
    scene: str = "mixed",
    size: int = 112,
    seed: int = 0,
    workers: int = 2,
) -> None:
    """Write the set, classes in equal shares.
    Files that exist are not written again, so a killed run goes on.
    """
    choices = ("mixed", *SCENES)
    if scene not in choices:
        raise ValueError(f"scene is {scene!r}; choose one of {', '.join(choices)}")
    if size < MIN_SIZE or size % 2:
        raise ValueError(f"size is {size}; it must be even and at least {MIN_SIZE}")
    start_set(
        directory,
        settings=[GENERATOR_VERSION, scene, size, seed],
        names="generator version, scene, size, seed",
    )
    clips = list_clips(num_train=num_train, num_val=num_val, num_classes=len(CLASSES))
    events = {}
    for clip in clips:
        event = draw_event(clip.label, seed=seed, index=clip.index, scene=scene, size=size)
        events[clip.name] = _row(event)
    write_lists(directory, clips=clips, classes=CLASSES, events=events)
    render = partial(render_clip, seed=seed, scene=scene, size=size)
    write_missing(directory, clips=clips, render=render, workers=workers)
