"""Any readable video -> T frames by timestamp, scaled to the working size.

Two passes: the timeline says when pictures are shown (codec/timeline.py), T of them are chosen at
even times, and one decoding pass keeps only those, already scaled (codec/framing.py). The i-th
picture out of the decoder is the i-th of the timeline; where a picture says otherwise, the pictures
are counted by decoding once more. Memory is T working-size frames whatever the length; time is one
full decode. Errors are never concealed: damaged bytes reject the input, or with `salvage` cut it
before the damage.

Shape legend: T frames, H, W working height and width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .framing import framing_of, picture_of
from .open_video import InputLimits
from .pictures import DamagedVideo, open_pictures
from .timeline import DEFAULT_RATE, Timeline, count_pictures, even_numbers, read_timeline

@dataclass(frozen=True)
class DecodedVideo:
    """T evenly timed frames of one video and what is known of the source. `notes` are short facts
    for the sample's metadata: interlaced, rotated, salvaged, timestamps sorted.
    """

    frames: np.ndarray  # uint8 [T, H, W, 3]
    seconds: np.ndarray  # float64 [T], presentation times
    num_source_frames: int
    codec: str
    source_height: int
    source_width: int
    notes: tuple[str, ...] = ()


class _AnotherTime(Exception):
    """A picture is shown at another time than the timeline says of it."""


def decode_video(
    path: Path,
    num_frames: int | Callable[[int], Iterable[int]],
    size: int,
    patch_size: int,
    fit: str = "crop",
    limits: InputLimits | None = None,
    salvage: bool = False,
    watcher=None,
    place: float = 0.5,
) -> DecodedVideo:
    """Decode `num_frames` frames at even timestamps;
    fewer when the video has fewer, never a repeated one. `num_frames` may also be a function from
    the number of frames of the video to the numbers of those that are wanted.

    With `salvage`, a damaged video is cut to its whole GOPs before the damage. A `watcher` may
    `prepare(stream)`, which begins a pass, and `see(number, frame, framing, is_chosen)` every
    frame. Raises RejectedInput: container, no_video, too_large, decode (damaged), truncated
    (announced frames are missing), timestamps (several at one time, or running backwards), varying
    (picture size changes), rotation (no quarter turn), hdr.
    """
    limits = limits or InputLimits()
    framed = dict(size=size, patch_size=patch_size, fit=fit, place=place)

    def decode(timeline: Timeline) -> DecodedVideo:
        return _decode_whole(path, timeline, num_frames, limits, framed, watcher, salvage)

    timeline = read_timeline(path, limits, salvage)
    if timeline.is_certain:
        try:
            return decode(timeline)
        except _AnotherTime:
            pass
    return decode(count_pictures(path, limits, timeline, salvage))


def _decode_whole(
    path: Path, timeline: Timeline, num_frames, limits, framed: dict, watcher, salvage: bool
) -> DecodedVideo:
    """Decode a timeline, or with `salvage` what of it lies before damage."""
    all_frames = len(timeline.stamps)
    try:
        video = _decode(path, timeline, num_frames, limits, framed, watcher)
    except DamagedVideo as damage:
        timeline = timeline.before_damage(damage.num_good)
        if not salvage or not timeline.stamps:
            raise
        video = _decode(path, timeline, num_frames, limits, framed, watcher)
    notes = (*video.notes, *timeline.notes)
    if timeline.is_cut:
        notes += (f"salvaged {len(timeline.stamps)} of {all_frames} frames",)
    return replace(video, notes=notes)


def _decode(
    path: Path, timeline: Timeline, num_frames, limits, framed: dict, watcher
) -> DecodedVideo:
    """The chosen pictures of a timeline. Raises _AnotherTime where it is not the video's."""
    count = len(timeline.stamps)
    if callable(num_frames):
        wanted = {int(number) for number in num_frames(count)}
    else:
        wanted = set(even_numbers(timeline.stamps, num_frames))
    frames: list[np.ndarray] = []
    numbers = []
    first = framing = None
    prepare = None if watcher is None else watcher.prepare
    # opened again instead of seeking back, which is inexact in streams without an index
    with open_pictures(path, limits, timeline.has_keys, prepare) as (stream, pictures):
        unit = stream.time_base
        if timeline.is_numbered:
            unit = 1 / (stream.average_rate or DEFAULT_RATE)
        for number, frame in enumerate(pictures):
            if not timeline.is_counted and (
                number >= count or frame.pts != timeline.stamps[number]
            ):
                raise _AnotherTime
            first = first or frame
            framing = framing or framing_of(path, frame, stream, **framed)
            if watcher is not None:
                watcher.see(number, frame, framing, number in wanted)
            if number in wanted:
                frames.append(picture_of(frame, framing))
                numbers.append(number)
                if len(numbers) == len(wanted):
                    break
    if len(numbers) < len(wanted):
        assert not timeline.is_counted, f"{path} gave {count} pictures, then fewer"
        raise _AnotherTime
    return DecodedVideo(
        frames=np.stack(frames),
        seconds=np.array([float(timeline.stamps[number] * unit) for number in numbers]),
        num_source_frames=count,
        codec=stream.codec_context.name,
        source_height=first.height,
        source_width=first.width,
        notes=_notes(first),
    )


def _notes(frame) -> tuple[str, ...]:
    notes = []
    if frame.interlaced_frame:
        notes.append("interlaced")
    if frame.rotation:
        notes.append(f"rotated {frame.rotation:.0f}")
    return tuple(notes)
