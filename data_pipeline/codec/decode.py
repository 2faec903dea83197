"""Any readable video -> T frames by timestamp, scaled to the working size.

Two passes, unless the timeline proves wrong: the timeline knows when frames are shown
(codec/timeline.py), T of them are chosen, and one decoding pass keeps only those, already scaled
(codec/framing.py). The i-th frame out of the decoder is the i-th of the timeline; where a frame's
own timestamp contradicts that, the frames are counted by decoding once more. Memory is T
working-size frames whatever the length; time is one full decode. Errors are never concealed:
damaged bytes reject the input, or with `salvage` cut it before the damage.

Shape legend: T frames, H, W working height and width.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RejectedInput
from .content import Content
from .frames import DamagedVideo, open_frames
from .framing import Crop, Framing, crop_of_stream, working_frame
from .timeline import (
    DEFAULT_RATE,
    MAX_REORDERED,
    Timeline,
    count_frames,
    even_frames,
    indexed_frames,
    read_timeline,
    segment_frames,
)

if TYPE_CHECKING:
    import av

    from .native import VectorWatcher

# Frames at the head of a video by which its timeline is checked before any is left undecoded: twice
# what a decoder may reorder. So many packets hold them, whatever their order.
NUM_CHECKED = 2 * MAX_REORDERED
NUM_FIRST_PACKETS = NUM_CHECKED + MAX_REORDERED


@dataclass(frozen=True)
class DecodedVideo:
    """T frames of one video and facts about the source. `notes` are short entries for the sample's
    metadata: interlaced, rotated, salvaged, timestamps sorted.
    """

    frames: np.ndarray  # uint8 [T, H, W, 3]
    indices: np.ndarray  # int64 [T], rising: which of the source's frames they are
    seconds: np.ndarray  # float64 [T], presentation times
    num_source_frames: int
    codec: str
    content: Content  # the part of every frame that is not padding
    notes: tuple[str, ...] = ()


class _TimelineMismatch(Exception):
    """A frame is shown at another time than the timeline has for it."""


def decode_video(
    path: Path,
    framing: Framing,
    watcher: "VectorWatcher | None" = None,
    thorough: bool = True,
) -> DecodedVideo:
    """Decode the frames that `framing` asks for; none of them twice.

    A `watcher` sees every frame of a pass. Without `thorough`, frames that are not wanted and that
    no other is predicted from are left undecoded where that is possible: the same frames sooner,
    but damage in others may go unnoticed.
    Raises RejectedInput: container, no_video, too_large, decode (damaged), truncated (announced
    frames are missing), timestamps (several at one time, or running backwards), varying (the frame
    size changes), rotation (no quarter turn), hdr, changed (fewer frames at a second reading).
    """
    timeline = read_timeline(path, framing.limits, salvage=framing.salvage)
    is_usable = timeline.is_certain
    while True:  # once, and again for frames that have to be counted, and for damage cut off
        if not is_usable:
            timeline = count_frames(
                path,
                timeline=timeline,
                limits=framing.limits,
                salvage=framing.salvage,
            )
            is_usable = True
        # salvage: the frames before damage are used, so damage is looked for in every frame
        skips = not (thorough or framing.salvage or timeline.is_counted)
        choice = _Choice(timeline, framing, skips=skips)
        try:
            video = _decode(path, choice, framing=framing, watcher=watcher)
        except _TimelineMismatch:
            is_usable = False
        except DamagedVideo as damage:
            timeline = timeline.before_damage(damage.num_good)
            if not framing.salvage or not timeline.pts:
                raise
        else:
            break
    notes = video.notes + timeline.notes
    if timeline.num_cut:
        count = len(timeline.pts)
        notes += (f"salvaged {count} of {count + timeline.num_cut} frames",)
    return replace(video, notes=notes)


class _Choice:
    """The wanted frames of a timeline, and which of its frames a decoded one is."""

    def __init__(self, timeline: Timeline, framing: Framing, skips: bool):
        """skips: whether frames that are not wanted may be left undecoded."""
        self.timeline = timeline
        pts = timeline.pts
        if framing.within:
            self.wanted = set(segment_frames(len(pts), framing.within).tolist())
        elif framing.by_index:
            self.wanted = set(indexed_frames(len(pts), framing.num_frames))
        else:
            self.wanted = set(even_frames(pts, framing.num_frames))
        self._skips = skips
        self._index_at = {time: index for index, time in enumerate(pts)} if skips else {}
        self._wanted_pts = {pts[index] for index in self.wanted}
        self._num_packets = 0

    def is_needed(self, packet: "av.Packet") -> bool:
        """Whether a packet must be decoded even if nothing is predicted from it: its frame is
        wanted, or among the first, by which the timeline is checked."""
        self._num_packets += 1
        is_first = self._num_packets <= NUM_FIRST_PACKETS
        return not self._skips or is_first or packet.pts in self._wanted_pts

    def index_after(self, last: int, frame: "av.VideoFrame") -> int:
        """Index of a frame that came out of the decoder after frame `last`.

        Raises _TimelineMismatch where its own timestamp is not the one that the timeline expects.
        """
        index = last + 1
        if self.timeline.is_counted:
            return index
        if self._skips and index >= NUM_CHECKED:
            # frames in between may be undecoded: only the timestamp identifies this one
            index = -1 if frame.pts is None else self._index_at.get(frame.pts, -1)
        pts = self.timeline.pts
        if not last < index < len(pts) or frame.pts != pts[index]:
            raise _TimelineMismatch
        return index


def _decode(
    path: Path,
    choice: _Choice,
    framing: Framing,
    watcher: "VectorWatcher | None",
) -> DecodedVideo:
    """The chosen frames of a timeline. Raises _TimelineMismatch where it is not the video's."""
    timeline = choice.timeline
    frames: list[np.ndarray] = []
    indices: list[int] = []
    notes: tuple[str, ...] = ()
    crop: Crop | None = None
    index = -1
    # opened again instead of seeking back, which is inexact in streams without an index
    with open_frames(
        path,
        limits=framing.limits,
        from_key=timeline.has_keys,
        prepare=None if watcher is None else watcher.prepare,
        is_needed=choice.is_needed,
        watch_packet=None if watcher is None else watcher.see_packet,
    ) as (stream, decoded):
        unit = Fraction(stream.time_base or 0)
        if timeline.is_numbered:
            unit = 1 / Fraction(stream.average_rate or DEFAULT_RATE)
        for frame in decoded:
            index = choice.index_after(index, frame)
            if crop is None:
                crop = crop_of_stream(path, frame, stream=stream, framing=framing)
                notes = _notes(frame)
            is_chosen = index in choice.wanted
            if watcher is not None:
                watcher.see(index, frame, crop=crop, is_chosen=is_chosen)
            if is_chosen:
                frames.append(working_frame(frame, crop))
                indices.append(index)
                if len(indices) == len(choice.wanted):
                    break
    if crop is None or len(indices) < len(choice.wanted):
        if not timeline.is_counted:
            raise _TimelineMismatch
        count = len(timeline.pts)
        raise RejectedInput("changed", f"{path} gave {count} pictures at first, then fewer")
    return DecodedVideo(
        frames=np.stack(frames),
        indices=np.array(indices),
        seconds=np.array([float(timeline.pts[index] * unit) for index in indices]),
        num_source_frames=len(timeline.pts),
        codec=stream.codec_context.name,
        content=crop.content,
        notes=notes,
    )


def _notes(frame: "av.VideoFrame") -> tuple[str, ...]:
    """What is unusual about a video, by its first frame."""
    interlaced = ("interlaced",) if frame.interlaced_frame else ()
    rotated = (f"rotated {frame.rotation:.0f}",) if frame.rotation else ()
    return interlaced + rotated
