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

from ..errors import RejectedInput
from .framing import framing_of, picture_of
from .open_video import InputLimits
from .pictures import DamagedVideo, open_pictures
from .timeline import (
    DEFAULT_RATE,
    MAX_REORDERED,
    Timeline,
    count_pictures,
    even_numbers,
    read_timeline,
)

# pictures at the head of a video by which its timeline is checked before any is left undecoded, and
# packets that hold them whatever their order
NUM_CHECKED = 2 * MAX_REORDERED
NUM_FIRST_PACKETS = NUM_CHECKED + MAX_REORDERED


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
    thorough: bool = True,
) -> DecodedVideo:
    """Decode `num_frames` frames at even timestamps;
    fewer when the video has fewer, never a repeated one. `num_frames` may also be a function from
    the number of frames of the video to the numbers of those that are wanted.

    With `salvage`, a damaged video is cut to its whole GOPs before the damage. A `watcher` may
    `prepare(stream)`, which begins a pass, and `see(number, frame, framing, is_chosen)` every
    frame. Without `thorough`, pictures that are not wanted and that no other is predicted from are
    left undecoded where that is possible: the same frames sooner, but damage in others may go
    unnoticed. Raises RejectedInput: container, no_video, too_large, decode (damaged), truncated
    (announced frames are missing), timestamps (several at one time, or running backwards), varying
    (picture size changes), rotation (no quarter turn), hdr.
    """
    limits = limits or InputLimits()
    framed = dict(size=size, patch_size=patch_size, fit=fit, place=place)
    timeline = read_timeline(path, limits, salvage)
    if not timeline.is_certain:
        timeline = count_pictures(path, limits, timeline, salvage)
    while True:  # once, and again for pictures that have to be counted, and for damage cut off
        # damage is looked for in every picture where what is before it shall be kept
        skips = not (thorough or salvage or timeline.is_counted)
        choice = _Choice(timeline, num_frames, skips=skips)
        try:
            video = _decode(path, choice, limits, framed, watcher)
        except _AnotherTime:
            timeline = count_pictures(path, limits, timeline, salvage)
        except DamagedVideo as damage:
            timeline = timeline.before_damage(damage.num_good)
            if not salvage or not timeline.stamps:
                raise
        else:
            break
    notes = (*video.notes, *timeline.notes)
    if timeline.num_cut:
        count = len(timeline.stamps)
        notes += (f"salvaged {count} of {count + timeline.num_cut} frames",)
    return replace(video, notes=notes)


class _Choice:
    """The wanted pictures of a timeline, and which of its pictures a decoded frame is."""

    def __init__(self, timeline: Timeline, num_frames, skips: bool):
        """skips: whether pictures that are not wanted may be left undecoded."""
        self.timeline = timeline
        stamps = timeline.stamps
        if callable(num_frames):
            self.wanted = {int(number) for number in num_frames(len(stamps))}
        else:
            self.wanted = set(even_numbers(stamps, num_frames))
        self._skips = skips
        self._number_at = {stamp: number for number, stamp in enumerate(stamps)} if skips else {}
        self._wanted_stamps = {stamps[number] for number in self.wanted}
        self._num_packets = 0

    def is_needed(self, packet) -> bool:
        """Whether a packet must be decoded even if nothing is predicted from it: its picture is
        wanted, or among the first, by which the timeline is checked."""
        self._num_packets += 1
        is_first = self._num_packets <= NUM_FIRST_PACKETS
        return not self._skips or is_first or packet.pts in self._wanted_stamps

    def number_after(self, last: int, frame) -> int:
        """Number of the picture in a frame that came out of the decoder after picture `last`.

        Raises _AnotherTime where the frame's own stamp is not the one that the timeline expects.
        """
        number = last + 1
        if self.timeline.is_counted:
            return number
        if self._skips and last + 1 >= NUM_CHECKED:
            number = self._number_at.get(frame.pts, -1)
        stamps = self.timeline.stamps
        if not last < number < len(stamps) or frame.pts != stamps[number]:
            raise _AnotherTime
        return number


def _decode(path: Path, choice: _Choice, limits, framed: dict, watcher) -> DecodedVideo:
    """The chosen pictures of a timeline. Raises _AnotherTime where it is not the video's."""
    timeline = choice.timeline
    frames: list[np.ndarray] = []
    numbers: list[int] = []
    first = framing = None
    number = -1
    # opened again instead of seeking back, which is inexact in streams without an index
    with open_pictures(
        path,
        limits,
        from_key=timeline.has_keys,
        prepare=None if watcher is None else watcher.prepare,
        is_needed=choice.is_needed,
    ) as (stream, pictures):
        unit = stream.time_base
        if timeline.is_numbered:
            unit = 1 / (stream.average_rate or DEFAULT_RATE)
        for frame in pictures:
            number = choice.number_after(number, frame)
            first = first or frame
            framing = framing or framing_of(path, frame, stream, **framed)
            if watcher is not None:
                watcher.see(number, frame, framing, number in choice.wanted)
            if number in choice.wanted:
                frames.append(picture_of(frame, framing))
                numbers.append(number)
                if len(numbers) == len(choice.wanted):
                    break
    if len(numbers) < len(choice.wanted) and timeline.is_counted:
        count = len(timeline.stamps)
        raise RejectedInput("changed", f"{path} gave {count} pictures at first, then fewer")
    if len(numbers) < len(choice.wanted):
        raise _AnotherTime
    return DecodedVideo(
        frames=np.stack(frames),
        seconds=np.array([float(timeline.stamps[number] * unit) for number in numbers]),
        num_source_frames=len(timeline.stamps),
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
