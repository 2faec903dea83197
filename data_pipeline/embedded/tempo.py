"""A labelled set of real footage whose class is what was done to its time axis.

Six classes, made from any videos: forward, reversed, double speed, a freeze of five frames, a jump
cut, and three foreign frames. Each window of 128 consecutive source frames gives one clip of 64
frames for every class, so the content does not tell the class, and labels are exact by
construction (`frame_order`). Position and length of the change are drawn once for a window.

A source video is on one side only, and foreign frames come from another source of the same side.
Sides follow from a hash of the file's content, or the caller names them. What the footage itself
would make ambiguous is left out and counted: windows in which nothing moves, where forward equals
reversed, and windows with a freeze or a cut of their own. Reversed footage of motion that looks the
same both ways (a pendulum) is not recognised.

The layout is that of clips.py. `events.jsonl` holds for each clip: `source` and `first`, the video
and the first frame of its window; `at` and `skip`, the draws (of all classes of the window);
`foreign_source` and `foreign_first`, empty and -1 but for foreign frames; and `event`, the frames
[first, last] of the clip in which the change shows: all of them for a direction or a speed.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_factory.command_line.plain_text import printable, show

from ..codec.open_video import is_video
from ..errors import MissingData, RejectedInput
from ..random import counter_rng
from ..shards.inputs import Input
from .clips import Clip, list_clips, missing_clips, start_set, write_clip, write_lists
from .sources import Source, SourcePool

GENERATOR_VERSION = 1  # moves when the same arguments and videos give other clips
CLASSES = ("forward", "reversed", "double_speed", "freeze", "jump_cut", "foreign_frames")
NUM_FRAMES = 64  # of a clip
WINDOW = 2 * NUM_FRAMES  # source frames of a group of clips: double speed takes every second one
FROZEN = 5  # clip frames that show one source frame
FOREIGN = 3
SKIPS = (16, 64)  # source frames that a jump cut leaves out
EDGE = 8  # clip frames before a change and after it, at least

VAL_SHARE = 0.3  # of the sources, by hash
MIN_SOURCES = 2  # of a side: foreign frames need another one

# Mean absolute differences of neighbouring frames, in grey levels. Real clips of people and of
# hand-held cameras have 2 to 10, of a resting camera and scene below 0.3.
STATIC = 0.5  # mean over the 64 frames of the forward clip
STILL = 0.05  # of a repeated frame, re-encoded
MAX_STILL = 2  # such frames in a row; a freeze adds four
CUT = 20.0  # and CUT_FACTOR times the median of the window
CUT_FACTOR = 4.0
USABLE = "usable"
REASONS = {
    "static": "in which nothing moves",
    "still": "with a freeze of their own",
    "cut": "with a cut of their own",
}

Report = Callable[[str], object]  # takes one line at a time


def frame_order(name: str, at: int, skip: int) -> np.ndarray:
    """Which frames a clip of a class shows, int64 [64]: 0 to 127 are those of the window, 128 to
    130 the foreign ones.

    at: first frame of the clip that a freeze repeats, a jump cut shows after its jump, or a foreign
    frame replaces. skip: frames of the window that a jump cut leaves out.
    """
    order = np.arange(NUM_FRAMES)
    if name == "reversed":
        order = order[::-1]
    elif name == "double_speed":
        order = 2 * order
    elif name == "freeze":
        # the footage goes on where it stopped: nothing is left out, as by a jump
        order = np.maximum(np.minimum(order, at), order - (FROZEN - 1))
    elif name == "jump_cut":
        order = np.where(order < at, order, order + skip)
    elif name == "foreign_frames":
        order[at : at + FOREIGN] = WINDOW + np.arange(FOREIGN)
    return order


def event_frames(name: str, at: int) -> list[int]:
    """First and last frame of a clip that show what its class is; the whole clip where it is a
    speed or a direction."""
    last = {"freeze": at + FROZEN - 1, "jump_cut": at, "foreign_frames": at + FOREIGN - 1}
    if name in last:
        # a jump shows between two frames
        return [at - 1 if name == "jump_cut" else at, last[name]]
    return [0, NUM_FRAMES - 1]


@dataclass(frozen=True)
class Group:
    """A window of a source, and the clips that are made of it: one per class, with the same draws.

    `foreign` is the source of the three foreign frames, which begin at `foreign_first`.
    """

    clips: tuple[Clip, ...]
    source: Source
    first: int
    at: int
    skip: int
    foreign: Source
    foreign_first: int

    def row(self, clip: Clip) -> dict:
        """What events.jsonl states of one of the clips."""
        name = CLASSES[clip.label]
        is_foreign = name == "foreign_frames"
        return {
            "source": self.source.name,
            "first": self.first,
            "at": self.at,
            "skip": self.skip,
            "foreign_source": self.foreign.name if is_foreign else "",
            "foreign_first": self.foreign_first if is_foreign else -1,
            "event": event_frames(name, at=self.at),
        }

    def frames(self, clip: Clip, window: np.ndarray, foreign: np.ndarray) -> np.ndarray:
        """Frames of one of the clips, uint8 [64, S, S, 3], of the window's and the foreign ones."""
        order = frame_order(CLASSES[clip.label], at=self.at, skip=self.skip)
        return np.concatenate([window, foreign])[order]


def judge_windows(changes: np.ndarray) -> np.ndarray:
    """For each first frame of a window whether it can be used: an array of USABLE and keys of
    REASONS, empty for fewer than WINDOW frames. changes: float32 [frames] (Source.changes)."""
    count = len(changes) - WINDOW + 1
    if count <= 0:
        return np.array([], dtype=str)
    # inside a window the change to the frame before it does not count
    inner = np.lib.stride_tricks.sliding_window_view(changes[1:], WINDOW - 1)[:count]
    is_still = inner < STILL
    runs = np.lib.stride_tricks.sliding_window_view(is_still, MAX_STILL + 1, axis=1)
    has_freeze = np.any(runs.all(axis=2), axis=1)
    largest = inner.max(axis=1)
    has_cut = (largest > CUT) & (largest > CUT_FACTOR * np.median(inner, axis=1))
    is_static = inner[:, : NUM_FRAMES - 1].mean(axis=1) < STATIC
    # the first that holds is the one that is counted
    conditions = [is_static, has_freeze, has_cut]
    return np.select(conditions, list(REASONS), default=USABLE)


def usable_sources(
    inputs: Sequence[Input], pool: SourcePool, report: Report
) -> list[tuple[Source, np.ndarray]]:
    """The sources that hold usable windows, with the windows' first frames. What is left out is
    reported: damaged videos as by `pack`, copies, short videos, and windows by reason."""
    found: dict[str, tuple[Source, np.ndarray]] = {}
    for item, source in zip(inputs, pool.survey(inputs), strict=True):
        name = printable(item.source)
        if isinstance(source, RejectedInput):
            # named as the user named it, not by this machine's folders
            detail = source.detail.replace(item.location, item.source)
            report(f"rejected {name}: {source.reason}: {printable(detail)}")
            continue
        if source.sha256 in found:
            report(f"left out {name}: it is a copy of {printable(found[source.sha256][0].name)}")
            continue
        if len(source) < WINDOW:
            report(f"left out {name}: it has {len(source)} frames, a window takes {WINDOW}")
            continue
        verdicts = judge_windows(source.changes)
        firsts = np.flatnonzero(verdicts == USABLE)
        counts = Counter(verdicts.tolist())
        reasons = [f"{counts[key]} {text}" for key, text in REASONS.items() if counts[key]]
        if reasons:
            report(
                f"{name}: {counts[USABLE]} of {len(verdicts)} windows are usable; left out are "
                f"{', '.join(reasons)}"
            )
        if len(firsts):
            found[source.sha256] = (source, firsts)
    return list(found.values())


def split_by_hash(sources: Sequence[Source]) -> tuple[list[Source], list[Source]]:
    """(training, validation) sources; MissingData where there are too few for two sides.

    The sources of the lowest hashes validate, VAL_SHARE of all and at least MIN_SOURCES: neither
    names nor the order of arguments matter.
    """
    if len(sources) < 2 * MIN_SOURCES:
        names = ", ".join(printable(source.name) for source in sources) or "none"
        raise MissingData(
            f"tempo needs {2 * MIN_SOURCES} usable videos, {MIN_SOURCES} to train on and "
            f"{MIN_SOURCES} to validate on, each of {WINDOW} frames or more in which something "
            f"moves; usable here: {names}"
        )
    ordered = sorted(sources, key=lambda source: source.sha256)
    count = max(MIN_SOURCES, round(VAL_SHARE * len(ordered)))
    return ordered[count:], ordered[:count]


def plan_groups(
    clips: Sequence[Clip],
    sources: Sequence[tuple[Source, np.ndarray]],
    seed: int,
) -> Iterator[Group]:
    """Windows and draws of one side's clips, which are whole groups of six. Sources take turns and
    no window is taken twice, though windows of one source overlap.

    ValueError where there are more groups than windows.
    """
    ordered = sorted(sources, key=lambda pair: pair[0].sha256)
    waiting = []
    for source, firsts in ordered:
        rng = counter_rng(seed, "tempo windows", int(source.sha256[:8], 16))
        waiting.append((source, rng.permutation(firsts).tolist()))
    num_groups = len(clips) // len(CLASSES)
    windows = sum(len(firsts) for _, firsts in ordered)
    if num_groups > windows:
        raise ValueError(
            f"the videos of split {clips[0].split} hold {windows} usable windows, "
            f"{len(clips)} clips take {num_groups}: ask for fewer clips, or give more videos"
        )
    for number in range(num_groups):
        own = clips[number * len(CLASSES) : (number + 1) * len(CLASSES)]
        source, firsts = waiting.pop(0)
        first = firsts.pop()
        if firsts:
            waiting.append((source, firsts))
        rng = counter_rng(seed, "tempo group", own[0].index // len(CLASSES))
        at = int(rng.integers(EDGE, NUM_FRAMES - EDGE - FROZEN + 1))
        skip = int(rng.integers(SKIPS[0], SKIPS[1] + 1))
        others = [other for other, _ in ordered if other is not source]
        foreign = others[rng.integers(len(others))]
        yield Group(
            clips=tuple(own),
            source=source,
            first=first,
            at=at,
            skip=skip,
            foreign=foreign,
            foreign_first=int(rng.integers(len(foreign) - FOREIGN + 1)),
        )


def _videos(inputs: Sequence[Input], report: Report) -> list[Input]:
    """The local videos of a list of inputs. ValueError for remote ones."""
    for item in inputs:
        if item.is_remote:
            raise ValueError(f"{item.location} is remote: tempo reads local videos")
    others = [item for item in inputs if not is_video(Path(item.location))]
    if others:
        first = printable(others[0].source)
        report(f"{len(others)} inputs are no videos by name and are left out, {first} first")
    return [item for item in inputs if item not in others]


def _check(num_train: int, num_val: int, size: int) -> None:
    for flag, count in (("--num-train", num_train), ("--num-val", num_val)):
        if count < 1 or count % len(CLASSES):
            raise ValueError(
                f"{flag} {count} is no multiple of {len(CLASSES)}: each window gives one clip of "
                "every class"
            )
    if size < 16 or size % 2:
        raise ValueError(f"size is {size}; it must be even and at least 16")


@dataclass(frozen=True)
class _Sides:
    """Sources of both splits with the first frames of their usable windows."""

    train: list[tuple[Source, np.ndarray]]
    val: list[tuple[Source, np.ndarray]]

    @property
    def digest(self) -> str:
        """Identity of the footage and of its split."""
        lines = [
            [split, source.name, source.sha256]
            for split, side in (("train", self.train), ("val", self.val))
            for source, _ in sorted(side, key=lambda pair: pair[0].name)
        ]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def _sides(
    inputs: Sequence[Input],
    val_inputs: Sequence[Input] | None,
    pool: SourcePool,
    report: Report,
) -> _Sides:
    """Survey all videos and split them. Raises MissingData for too few usable ones."""
    if val_inputs is not None:
        # a folder may hold the videos that are named to validate on
        named = {os.path.abspath(item.location) for item in val_inputs}
        inputs = [item for item in inputs if os.path.abspath(item.location) not in named]
    found = usable_sources([*inputs, *(val_inputs or ())], pool=pool, report=report)
    if val_inputs is not None:
        validating = {item.location for item in val_inputs}
        train = [pair for pair in found if pair[0].location not in validating]
        val = [pair for pair in found if pair[0].location in validating]
        for side, name in ((train, "training"), (val, "validation")):
            if len(side) < MIN_SOURCES:
                raise MissingData(
                    f"{len(side)} usable {name} videos: tempo needs {MIN_SOURCES} on either side, "
                    "since foreign frames come from another one"
                )
        return _Sides(train, val)
    to_train, _ = split_by_hash([source for source, _ in found])
    hashes = {source.sha256 for source in to_train}
    return _Sides(
        train=[pair for pair in found if pair[0].sha256 in hashes],
        val=[pair for pair in found if pair[0].sha256 not in hashes],
    )


def write_tempo(
    directory: Path,
    inputs: Sequence[Input],
    num_train: int,
    num_val: int,
    val_inputs: Sequence[Input] | None = None,
    size: int = 112,
    seed: int = 0,
    workers: int = 2,
    report: Report = show,
) -> None:
    """Write the set from videos; `num_train` and `num_val` are multiples of six.

    val_inputs: videos of the validation side; without them a hash splits `inputs`. Files that exist
    are not written again, so a killed run goes on. Raises MissingData for too few usable videos,
    ValueError for counts that cannot be and for a folder of other settings or other videos.
    """
    _check(num_train, num_val=num_val, size=size)
    # before hours of reading: an output that cannot be written is named at once
    (directory / "clips").mkdir(parents=True, exist_ok=True)
    videos = _videos(inputs, report)
    val_videos = None if val_inputs is None else _videos(val_inputs, report)
    with SourcePool(size, num_workers=workers) as pool:
        sides = _sides(videos, val_inputs=val_videos, pool=pool, report=report)
        start_set(
            directory,
            settings=[GENERATOR_VERSION, size, seed, sides.digest],
            names="generator version, size, seed, digest of the videos and their split",
        )
        clips = list_clips(num_train=num_train, num_val=num_val, num_classes=len(CLASSES))
        groups: list[Group] = []
        for split, side in (("train", sides.train), ("val", sides.val)):
            own = [clip for clip in clips if clip.split == split]
            groups += plan_groups(own, sources=side, seed=seed)
        events = {clip.name: group.row(clip) for group in groups for clip in group.clips}
        write_lists(directory, clips=clips, classes=CLASSES, events=events)

        def write(group: Group) -> None:
            missing = missing_clips(directory, group.clips)
            if missing:
                window = pool.read(group.source, first=group.first, count=WINDOW)
                foreign = pool.read(group.foreign, first=group.foreign_first, count=FOREIGN)
                for clip in missing:
                    write_clip(directory / clip.name, group.frames(clip, window, foreign))

        # the list waits for all, and raises what went wrong
        list(pool.threads.map(write, groups))
        report(
            f"{len(sides.train)} videos to train on, {len(sides.val)} to validate on; "
            f"{len(groups)} windows"
        )
