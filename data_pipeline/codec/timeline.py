"""When the frames of a video are shown, and which of them are chosen.

Header frame counts, average rates and durations are wrong or missing. The packets' own presentation
timestamps mostly are right, and they are read without decoding: some milliseconds per thousand
packets. Where they turn out not to be the frames' times (packets that show nothing, fields in
packets of their own, containers without presentation timestamps), the frames are counted by
decoding once.

PTS and DTS are presentation and decoding timestamps, integers in the stream's time base.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RejectedInput
from .frames import DamagedVideo, RecordingStart, demux, is_before_start, open_frames
from .open_video import InputLimits, announced_seconds, open_video

if TYPE_CHECKING:
    import av

# A video is truncated when more than MISSING_SHARE of its announced duration and more than
# MISSING_SECONDS are missing. Durations are rounded, and the last frame's is often left out of
# them: both bounds are choices, far above that and far below a lost tail that matters.
MISSING_SHARE = 0.1
MISSING_SECONDS = 0.5
# Containers without a header, whose duration libavformat estimates, and ASF: of a file that was cut
# it takes no duration from the header, and of a whole one it adds the start of the latest stream.
WITHOUT_DURATION = ("mpegts", "mpeg", "asf")
# Containers that store DTS, which rise all through a recording.
WITH_DECODING_TIMES = ("mpegts", "mpeg", "flv")
# Frames that a decoder holds back at most to put B-frames in order (H.264 A.3.1, HEVC A.4.2).
MAX_REORDERED = 16
# Frames by which times of a program stream may fall inside a recording: a stamp may time a packet
# of several pictures, and libavformat gives it to another one of the same run of B-frames. A fall
# of 4 was seen with runs of 5; where recordings were joined, times fall by the length of the first.
MAX_DISPLACED = 4
DEFAULT_RATE = 25  # frames per second of a file that has neither times nor a rate
VP8_SHOWN = 0x10  # RFC 6386 section 9.1: bit of a frame's first byte
JOINED = "were recordings joined without remuxing? Remux it, or cut it there"


@dataclass(frozen=True)
class Timeline:
    """Presentation timestamps of the frames, in presentation order.

    pts             int [T], never falling
    key_pts         those of key frames, hidden ones included
    has_keys        whether any packet is marked as a key frame
    is_certain      whether every packet has a time of its own that is its frame's; else the frames
                    must be counted
    is_counted      whether the frames were counted by decoding, so that the i-th PTS is that of the
                    i-th frame, whatever the frame itself states
    is_decoding_order   whether PTS are copies of DTS, which frames get in presentation order
    is_numbered     whether PTS are mere frame indices because the file has no times
    num_cut         frames that were cut off with what follows damage
    notes           short facts for the sample's metadata
    """

    pts: list[int]
    key_pts: list[int]
    has_keys: bool = True
    is_certain: bool = True
    is_counted: bool = False
    is_decoding_order: bool = False
    is_numbered: bool = False
    num_cut: int = 0
    notes: tuple[str, ...] = ()

    def before_damage(self, num_good: int) -> "Timeline":
        """The timeline without the GOP in which damage follows `num_good` good frames, and without
        all that comes after it."""
        good = self.pts[:num_good]
        starts = [key for key in self.key_pts if good and key <= good[-1]]
        last_start = max(starts, default=None)
        whole = [] if last_start is None else [time for time in good if time < last_start]
        return replace(self, pts=whole, num_cut=len(self.pts) - len(whole) + self.num_cut)


@dataclass
class _Packets:
    """What one pass over a container's packets found.

    early, shown   PTS of packets before the first key frame, and of those that follow it and are to
                   be shown; None for a packet without one
    keys           PTS of key frames, hidden ones included
    end            latest end of any packet, in seconds
    end_byte       where the last packet of any stream ends in the file
    last_dts, last_byte   DTS and first byte of the packet before
    is_decoding_order     whether PTS are copies of DTS
    is_edited      whether packets are left out, or read again: an edit list does both
    num_discarded    packets that libavformat marks as outside the edit list
    num_before_start   packets before the start that it failed to mark
    is_joined      whether a DTS falls
    """

    container: "av.container.InputContainer"
    stream: "av.VideoStream"
    early: list[int | None] = field(default_factory=list)
    shown: list[int | None] = field(default_factory=list)
    keys: list[int | None] = field(default_factory=list)
    end: float = 0.0
    end_byte: int = 0
    last_dts: int | None = None
    last_byte: int = 0
    is_decoding_order: bool = True
    is_edited: bool = False
    num_discarded: int = 0
    num_before_start: int = 0
    is_joined: bool = False
    start: RecordingStart = field(default_factory=RecordingStart)

    def add(self, packet: "av.Packet") -> None:
        """Note one packet of any stream, in decoding order."""
        if packet.pts is not None and packet.time_base:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            self.end = max(self.end, end)
        if packet.pos is not None:
            self.end_byte = max(self.end_byte, packet.pos + packet.size)
        if packet.stream_index == self.stream.index:
            self._add_video(packet)

    def _add_video(self, packet: "av.Packet") -> None:
        if packet.is_keyframe:
            self.keys.append(packet.pts)
        self.is_decoding_order &= packet.pts == packet.dts
        if packet.dts is not None:
            # by more than half a frame, since some writers round timestamps
            is_shared = self.container.format.name == "mpeg"  # a stamp by several pictures
            tolerance = (packet.duration or 0) * (MAX_DISPLACED if is_shared else 0.5)
            self.is_joined |= self.last_dts is not None and packet.dts < self.last_dts - tolerance
            self.last_dts = packet.dts
        if packet.pos is not None:
            self.is_edited |= packet.is_discard or packet.pos < self.last_byte
            self.last_byte = packet.pos
        part = self.start.part_of(packet)
        is_vp8 = self.stream.codec_context.name == "vp8"
        if part == RecordingStart.EARLY:
            self.early.append(packet.pts)
        elif part == RecordingStart.LEADING:
            pass  # where a decoder does output it after all, the frames are counted
        elif packet.is_discard:
            self.num_discarded += 1
        elif is_before_start(self.container, packet.pts):
            self.num_before_start += 1
        elif is_vp8 and not bytes(packet)[0] & VP8_SHOWN:
            pass  # only there to predict others from
        else:
            self.shown.append(packet.pts)

    def check(self, path: Path, limits: InputLimits) -> None:
        """Raise RejectedInput for what is wrong with a container that was read to its end."""
        names = self.container.format.name.split(",")
        announced = announced_seconds(self.container)
        start = float(self.container.start_time or 0) / 1e6  # AV_TIME_BASE: microseconds
        missing = announced - (self.end - start)
        is_estimated = not set(WITHOUT_DURATION).isdisjoint(names)
        if not is_estimated and missing > max(MISSING_SECONDS, MISSING_SHARE * announced):
            raise RejectedInput(
                "truncated",
                f"{path}: {missing:.1f} of the announced {announced:.1f} s are missing: fetch the "
                "file again, or pack with --salvage",
            )
        size = path.stat().st_size
        tail = size - self.end_byte
        problem = None
        if self.is_joined and not set(WITH_DECODING_TIMES).isdisjoint(names):
            problem = f"times jump back: {JOINED}"
        elif "flv" in names and tail > MISSING_SHARE * size:
            problem = f"{tail} of its {size} bytes follow the end of the recording: {JOINED}"
        elif self.num_discarded and self.num_before_start:  # MPEG-1, whose packets are split anew
            problem = "its edit list cannot be followed: remux it without one"
        elif "mp4" in names and self.is_edited and _has_several_segments(path, limits):
            problem = (
                "its edit list has several segments, whose times libavformat does not tell: "
                "re-encode it"
            )
        if problem is not None:
            raise RejectedInput("timestamps", f"{path}: {problem}")


def read_timeline(path: Path, limits: InputLimits, salvage: bool = False) -> Timeline:
    """Timeline of the best video stream by its packets.

    Raises RejectedInput: decode (the container breaks off), truncated (no packet, or much less than
    the announced duration), timestamps (joined recordings, an edit list of several segments),
    too_large. With `salvage` a timeline that breaks off is cut to its whole GOPs instead.
    """
    import av

    problem = None
    container, stream = open_video(path, limits)
    packets = _Packets(container, stream)
    with container:
        try:
            for packet in demux(container):
                if packet.size:  # else it marks the end of a stream
                    packets.add(packet)
                if len(packets.early) + len(packets.shown) > limits.max_frames:
                    detail = f"{path} has more than {limits.max_frames} frames"
                    raise RejectedInput("too_large", detail)
            packets.check(path, limits)
        except av.FFmpegError as error:
            problem = RejectedInput("decode", f"{path}: reading stopped: {error.strerror}")
        except RejectedInput as error:
            if error.reason == "too_large":
                raise
            problem = error
    # some containers mark no packet as a key frame: then decoding begins with the first one
    shown = packets.shown if packets.keys else packets.early
    if not shown:
        raise problem or RejectedInput(
            "truncated", f"{path} announces a video stream but holds no packet to show"
        )
    # without B-frames, DTS are the frames' own times
    is_decoding_order = packets.is_decoding_order and stream.codec_context.has_b_frames
    pts = {time for time in shown if time is not None}
    timeline = Timeline(
        pts=sorted(pts),
        key_pts=[key for key in packets.keys if key is not None],
        has_keys=len(packets.keys) > 0,
        is_certain=len(pts) == len(shown) and not is_decoding_order,
        is_decoding_order=is_decoding_order,
    )
    if problem is not None:
        timeline = timeline.before_damage(len(timeline.pts))
        # only damage is cut off: a joint or an edit list is not
        if not salvage or problem.reason == "timestamps" or not timeline.pts:
            raise problem
    return timeline


def _has_several_segments(path: Path, limits: InputLimits) -> bool:
    """Whether the edit list of an MP4 or MOV shows several parts of its media; costs two passes
    over the index.

    libavformat follows a list of one segment exactly, also behind empty ones. Of several segments
    it gives wrong times where there are B-frames, and wrong frames where an empty one lies between.
    One part is moved in time as a whole, so that all its packets move by the same distance.
    """
    media = dict(_pts_by_byte(path, limits, follow_edits=False))
    shown = _pts_by_byte(path, limits, follow_edits=True)
    moved = {pts - media[byte] for byte, pts in shown if byte in media}
    return len(moved) > 1


def _pts_by_byte(path: Path, limits: InputLimits, follow_edits: bool) -> list[tuple[int, int]]:
    """(first byte in the file, PTS) of every packet that is to be shown; an edit list may show one
    twice."""
    container, stream = open_video(path, limits, follow_edits=follow_edits)
    with container:
        return [
            (packet.pos, packet.pts)
            for packet in container.demux(stream)
            if packet.size
            and packet.pos is not None
            and packet.pts is not None
            and not packet.is_discard
        ]


def count_frames(path: Path, timeline: Timeline, limits: InputLimits, salvage: bool) -> Timeline:
    """Timeline of the frames that leave the decoder; costs one decoding.

    `timeline` is the packets'. Raises RejectedInput: decode (damaged), truncated (the frames end
    long before the packets), timestamps (which jump back), and what open_frames raises. With
    `salvage` it is cut to the whole GOPs before damage.
    """
    pts: list[int | None] = []
    keys: list[int] = []
    damage = None
    with open_frames(path, limits, from_key=timeline.has_keys) as (stream, frames):
        unit = stream.time_base or Fraction(1, DEFAULT_RATE)
        step = float(1 / (stream.average_rate or DEFAULT_RATE) / unit)
        can_sort = timeline.is_decoding_order or stream.container.format.name.startswith("mov")
        max_fall = MAX_DISPLACED * step if stream.container.format.name == "mpeg" else 0.0
        try:
            for index, frame in enumerate(frames):
                pts.append(frame.pts)
                if frame.key_frame:
                    keys.append(index)
        except DamagedVideo as error:
            damage = error
            if not salvage or not pts:
                raise
    if not pts:
        raise RejectedInput("truncated", f"{path}: none of its packets gives a picture")
    counted = _ordered(path, pts, keys=keys, step=step, can_sort=can_sort, max_fall=max_fall)
    counted = replace(counted, num_cut=timeline.num_cut)
    if damage is not None:
        counted = counted.before_damage(len(pts))
        if not counted.pts:
            raise damage
    elif timeline.pts and not counted.is_numbered:
        _check_end(path, last=counted.pts[-1], announced=timeline.pts, unit=unit)
    return counted


def _check_end(path: Path, last: int, announced: list[int], unit: Fraction) -> None:
    """Reject where frames end at the PTS `last`, long before the packets' do."""
    missing = float((announced[-1] - last) * unit)
    length = float((announced[-1] - announced[0]) * unit)
    if missing > max(MISSING_SECONDS, MISSING_SHARE * length):
        raise RejectedInput(
            "truncated", f"{path}: the packets of its last {missing:.1f} s give no picture"
        )


def _ordered(
    path: Path,
    pts: list[int | None],
    keys: list[int],
    step: float,
    can_sort: bool,
    max_fall: float,
) -> Timeline:
    """Timeline of frames with these PTS, in presentation order; `keys` are indices of key frames,
    `step` is the usual distance of two PTS.

    can_sort: whether PTS that fall are DTS, so that the sorted ones are given to the frames in
    order. Elsewhere a decoder outputs frames by their PTS, and one that falls by more than
    `max_fall` begins another recording; those that fall by less are interpolated.
    """
    indices = np.array([index for index, time in enumerate(pts) if time is not None])
    if len(indices) == 0:
        return Timeline(list(range(len(pts))), key_pts=keys, is_counted=True, is_numbered=True)
    times = np.array([time for time in pts if time is not None])
    falls = np.maximum.accumulate(times) - times
    if 0 < falls.max() <= max_fall:
        is_rising = np.diff(np.maximum.accumulate(times), prepend=times[0] - 1) > 0
        indices = indices[is_rising]
        times = times[is_rising]
    order = np.argsort(times, kind="stable")
    moved = np.abs(order - np.arange(len(order))).max()
    if moved > (MAX_REORDERED if can_sort else 0):
        first = indices[int(np.argmin(np.diff(times))) + 1]
        raise RejectedInput("timestamps", f"{path}: times jump back at frame {first}: {JOINED}")
    notes = []
    if moved:
        notes.append("timestamps sorted")
    if len(indices) < len(pts):
        notes.append(f"{len(pts) - len(indices)} timestamps interpolated")
    filled = _filled(indices, times=times[order], count=len(pts), step=step)
    return Timeline(
        pts=filled,
        key_pts=[filled[index] for index in keys],
        is_counted=True,
        notes=tuple(notes),
    )


def _filled(indices: np.ndarray, times: np.ndarray, count: int, step: float) -> list[int]:
    """PTS of all `count` frames: the frames `indices` have rising `times`, others lie evenly
    between their neighbours; before the first and behind the last they are `step` apart."""
    frames = np.arange(count)
    filled = np.interp(frames, indices, times)
    filled += step * np.minimum(frames - indices[0], 0)
    filled += step * np.maximum(frames - indices[-1], 0)
    return [int(time) for time in np.rint(filled)]


def even_frames(pts: list[int], num_frames: int) -> list[int]:
    """Indices of the frames nearest to `num_frames` even times between the first and the last; all
    of them when there are no more.
    """
    if len(pts) <= num_frames:
        return list(range(len(pts)))
    times = np.array(pts)
    targets = np.linspace(times[0], times[-1], num_frames)
    right = np.searchsorted(times, targets).clip(1, len(times) - 1)
    is_left_nearer = targets - times[right - 1] <= times[right] - targets
    nearest = np.where(is_left_nearer, right - 1, right)
    # where frames lie very unevenly, several targets may have the same nearest one: the choice is
    # made strictly increasing, first forwards, then from the end
    for i in range(1, num_frames):
        nearest[i] = max(nearest[i], nearest[i - 1] + 1)
    latest = np.arange(len(times) - num_frames, len(times))
    return np.minimum(nearest, latest).tolist()


def indexed_frames(total: int, num_frames: int) -> list[int]:
    """Indices of `num_frames` frames at even indices of a video of `total`, truncated to integers,
    as the published tools take them; a shorter video gives each frame once."""
    even = np.linspace(0, total - 1, num_frames)
    return np.unique(even.astype(int)).tolist()


def segment_frames(total: int, within: tuple[float, ...]) -> np.ndarray:
    """Indices int64 [n] of one frame from each of n = len(within) equal segments of a clip of
    `total` frames: within[i], from 0 to 1, is the position inside segment i. Those of a short clip
    repeat.

    Segments are (total - 1) / len(within) frames long, as published: the middles of 8 segments of
    64 frames are 3, 11, 19, ...
    """
    count = len(within)
    in_segments = np.arange(count) + np.array(within)
    return (in_segments * (total - 1) / count).astype(np.int64)
