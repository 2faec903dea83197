"""When the pictures of a video are shown.

Header frame counts, average rates and durations lie or are missing. The packets' own presentation
times mostly do not, and they are read without decoding: some milliseconds per thousand packets.
Where they turn out not to be the pictures' times (packets that show nothing, fields in packets of
their own, containers without presentation times), the pictures are counted by decoding once.

Stamps are integers in the stream's time base.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..errors import RejectedInput
from .edit_lists import has_several_segments
from .open_video import InputLimits, announced_seconds, open_video
from .pictures import (
    DamagedVideo,
    RecordingStart,
    demux,
    is_before_start,
    open_pictures,
)

# Of what is announced: beyond both it is truncated. Durations are rounded, and the last picture's
# is often left out of them.
MISSING_SHARE = 0.1
MISSING_SECONDS = 0.5
# Containers without a header, whose duration libavformat estimates.
WITHOUT_DURATION = ("mpegts", "mpeg")
# Containers that store stamps of decoding, which rise all through a recording.
WITH_DECODING_STAMPS = ("mpegts", "mpeg", "flv")
# Pictures that a decoder holds back at most to put B-frames in order (H.264 A.3.1, HEVC A.4.2).
MAX_REORDERED = 16
DEFAULT_RATE = 25  # frames per second of a file that has neither times nor a rate
VP8_SHOWN = 0x10  # RFC 6386 section 9.1: bit of a frame's first byte


@dataclass(frozen=True)
class Timeline:
    """Presentation stamps of the pictures, in the order of showing.

    stamps          int [n], never falling
    key_stamps      those of key frames, hidden ones included
    has_keys        whether any packet is marked as a key frame
    is_certain      whether every packet has a time of its own that is its picture's; else the
                    pictures must be counted
    is_counted      whether the pictures were counted by decoding, so that the i-th stamp is that of
                    the i-th picture, whatever the picture itself says
    is_slots        whether stamps are those of decoding, to be handed out in the order of showing
    is_numbered     whether the stamps are mere picture numbers because the file has no times
    num_cut         pictures that were cut off with what follows damage
    notes           short facts for the sample's metadata
    """

    stamps: list[int]
    key_stamps: list[int]
    has_keys: bool = True
    is_certain: bool = True
    is_counted: bool = False
    is_slots: bool = False
    is_numbered: bool = False
    num_cut: int = 0
    notes: tuple[str, ...] = ()

    def before_damage(self, num_good: int) -> "Timeline":
        """The timeline without the GOP in which damage follows `num_good` good pictures, and
        without all that comes after it."""
        good = self.stamps[:num_good]
        starts = [key for key in self.key_stamps if good and key <= good[-1]]
        whole = [stamp for stamp in good if starts and stamp < max(starts)]
        return replace(self, stamps=whole, num_cut=len(self.stamps) - len(whole) + self.num_cut)


@dataclass
class _Packets:
    """What one pass over a container's packets found.

    early, shown   stamps of packets before the first key frame, and of those that follow it and are
                   to be shown; None for a packet without a stamp
    keys           stamps of key frames, hidden ones included
    end            latest end of any packet, in seconds
    end_byte       where the last packet of any stream ends in the file
    last_decoding, last_byte   decoding stamp and first byte of the packet before
    is_slots       whether presentation stamps are those of decoding
    is_edited      whether packets are left out, or read again: an edit list does both
    num_discarded, num_before_start   packets that libavformat leaves out, and that it should have
    is_joined      whether a decoding stamp falls
    """

    early: list[int | None] = field(default_factory=list)
    shown: list[int | None] = field(default_factory=list)
    keys: list[int | None] = field(default_factory=list)
    end: float = 0.0
    end_byte: int = 0
    last_decoding: int | None = None
    last_byte: int = 0
    is_slots: bool = True
    is_edited: bool = False
    num_discarded: int = 0
    num_before_start: int = 0
    is_joined: bool = False
    problem: RejectedInput | None = None


def read_timeline(path: Path, limits: InputLimits, salvage: bool = False) -> Timeline:
    """Timeline of the best video stream by its packets.

    Raises RejectedInput: decode (the container breaks off), truncated (no packet, or much less than
    the announced duration), timestamps (joined recordings, an edit list of several segments),
    too_large. With `salvage` a timeline that breaks off is cut to its whole GOPs instead.
    """
    found = _list_packets(path, limits)
    # some containers mark no packet as a key frame: then decoding begins with the first one
    shown = found.shown if found.keys else found.early
    if not shown:
        raise found.problem or RejectedInput(
            "truncated", f"{path} announces a video stream but holds no packet to show"
        )
    stamps = {stamp for stamp in shown if stamp is not None}
    timeline = Timeline(
        stamps=sorted(stamps),
        key_stamps=[key for key in found.keys if key is not None],
        has_keys=len(found.keys) > 0,
        is_certain=len(stamps) == len(shown) and not found.is_slots,
        is_slots=found.is_slots,
    )
    if found.problem is not None:
        timeline = timeline.before_damage(len(timeline.stamps))
        is_damage = found.problem.reason in ("decode", "truncated")
        if not salvage or not is_damage or not timeline.stamps:
            raise found.problem
    return timeline


def _list_packets(path: Path, limits: InputLimits) -> _Packets:
    import av

    found = _Packets()
    start = RecordingStart()
    container, stream = open_video(path, limits)
    try:
        for packet in demux(container):
            if packet.size == 0:  # the end of a stream
                continue
            if packet.pts is not None and packet.time_base:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                found.end = max(found.end, end)
            if packet.pos is not None:
                found.end_byte = max(found.end_byte, packet.pos + packet.size)
            if packet.stream_index == stream.index:
                _note(found, start, packet, container, stream)
            if len(found.early) + len(found.shown) > limits.max_frames:
                raise RejectedInput("too_large", f"{path} has more than {limits.max_frames} frames")
        found.problem = _problem(path, container, found, limits)
    except av.FFmpegError as error:
        found.problem = RejectedInput("decode", f"{path}: reading stopped: {error.strerror}")
    finally:
        container.close()
    # without B-frames, slots are the pictures' own times
    can_reorder = stream.codec_context.has_b_frames
    found.is_slots = found.is_slots and bool(can_reorder)
    return found


def _note(found: _Packets, start: RecordingStart, packet, container, stream) -> None:
    """Note one packet of the video stream, in the order of decoding."""
    if packet.is_keyframe:
        found.keys.append(packet.pts)
    found.is_slots = found.is_slots and packet.pts == packet.dts
    if packet.dts is not None:
        last = packet.dts if found.last_decoding is None else found.last_decoding
        # by more than half a picture, since some writers round stamps
        found.is_joined |= packet.dts < last - (packet.duration or 0) / 2
        found.last_decoding = packet.dts
    if packet.pos is not None:
        found.is_edited |= packet.is_discard or packet.pos < found.last_byte
        found.last_byte = packet.pos
    part = start.part_of(packet)
    if part == start.EARLY:
        found.early.append(packet.pts)
    elif part == start.LEADING:
        pass  # where a decoder does show it after all, the pictures are counted
    elif packet.is_discard:
        found.num_discarded += 1
    elif is_before_start(container, packet.pts):
        found.num_before_start += 1
    elif _is_vp8_reference(stream, packet):
        pass  # only there to predict others from
    else:
        found.shown.append(packet.pts)


def _is_vp8_reference(stream, packet) -> bool:
    return stream.codec_context.name == "vp8" and not bytes(packet)[0] & VP8_SHOWN


def _problem(path: Path, container, found: _Packets, limits: InputLimits) -> RejectedInput | None:
    """What is wrong with a container that was read to its end."""
    names = container.format.name.split(",")
    announced = announced_seconds(container)
    start = float(container.start_time or 0) / 1e6  # AV_TIME_BASE: microseconds
    missing = announced - (found.end - start)
    is_estimated = any(name in names for name in WITHOUT_DURATION)
    if not is_estimated and missing > max(MISSING_SECONDS, MISSING_SHARE * announced):
        detail = f"{missing:.1f} of the announced {announced:.1f} s are missing: fetch the file "
        return RejectedInput("truncated", f"{path}: {detail}again, or pack with --salvage")
    if found.is_joined and any(name in names for name in WITH_DECODING_STAMPS):
        return RejectedInput("timestamps", f"{path}: times jump back: {JOINED}")
    size = path.stat().st_size
    if "flv" in names and size - found.end_byte > MISSING_SHARE * size:
        detail = f"{size - found.end_byte} of its {size} bytes follow the end of the recording"
        return RejectedInput("timestamps", f"{path}: {detail}: {JOINED}")
    if found.num_discarded and found.num_before_start:  # MPEG-1, whose packets are split anew
        detail = "its edit list cannot be followed: remux it without one"
        return RejectedInput("timestamps", f"{path}: {detail}")
    if "mp4" in names and found.is_edited and has_several_segments(path, limits):
        return RejectedInput(
            "timestamps",
            f"{path}: its edit list has several segments, whose times libavformat does not tell: "
            "re-encode it",
        )
    return None


JOINED = "were recordings joined without remuxing? Remux it, or cut it there"


def count_pictures(path: Path, limits: InputLimits, timeline: Timeline, salvage: bool) -> Timeline:
    """Timeline of the pictures that leave the decoder; costs one decoding.

    `timeline` is what the packets said. Raises RejectedInput: decode (damaged), truncated (the
    pictures end long before the packets), timestamps (stamps that jump back), and what
    open_pictures raises. With `salvage` it is cut to the whole GOPs before damage.
    """
    stamps: list[int | None] = []
    key_numbers: list[int] = []
    damage = None
    try:
        with open_pictures(path, limits, from_key=timeline.has_keys) as (stream, pictures):
            unit = stream.time_base
            step = float(1 / (stream.average_rate or DEFAULT_RATE) / unit)
            can_sort = timeline.is_slots or stream.container.format.name.startswith("mov")
            for number, frame in enumerate(pictures):
                stamps.append(frame.pts)
                if frame.key_frame:
                    key_numbers.append(number)
    except DamagedVideo as error:
        damage = error
        if not salvage or not stamps:
            raise
    if not stamps:
        raise RejectedInput("truncated", f"{path}: none of its packets gives a picture")
    counted = _ordered(path, stamps, key_numbers, step=step, can_sort=can_sort)
    counted = replace(counted, num_cut=timeline.num_cut)
    if damage is not None:
        counted = counted.before_damage(len(stamps))
        if not counted.stamps:
            raise damage
    elif timeline.stamps and not counted.is_numbered:
        _check_end(path, counted.stamps[-1], timeline.stamps, unit)
    return counted


def _check_end(path: Path, last: int, announced: list[int], unit: Fraction) -> None:
    """Reject where pictures end at the stamp `last`, long before the packets' stamps do."""
    missing = float((announced[-1] - last) * unit)
    length = float((announced[-1] - announced[0]) * unit)
    if missing > max(MISSING_SECONDS, MISSING_SHARE * length):
        raise RejectedInput(
            "truncated", f"{path}: the packets of its last {missing:.1f} s give no picture"
        )


def _ordered(
    path: Path, stamps: list[int | None], key_numbers: list[int], step: float, can_sort: bool
) -> Timeline:
    """Timeline of pictures with these stamps, in the order of showing; `step` is the usual distance
    of two, in stamps.

    can_sort: whether stamps that fall are those of decoding, so that the sorted ones are handed out
    in order. Elsewhere a decoder hands pictures out by their stamps, and a stamp that falls begins
    another recording.
    """
    known = np.array([number for number, stamp in enumerate(stamps) if stamp is not None])
    if len(known) == 0:
        numbers = list(range(len(stamps)))
        return Timeline(numbers, key_numbers, is_counted=True, is_numbered=True)
    values = np.array([stamp for stamp in stamps if stamp is not None])
    order = np.argsort(values, kind="stable")
    moved = np.abs(order - np.arange(len(order))).max()
    if moved > (MAX_REORDERED if can_sort else 0):
        first = int(np.argmin(np.diff(values))) + 1
        raise RejectedInput(
            "timestamps", f"{path}: times jump back at frame {known[first]}: {JOINED}"
        )
    notes = []
    if moved:
        notes.append("timestamps sorted")
    if len(known) < len(stamps):
        notes.append(f"{len(stamps) - len(known)} timestamps interpolated")
    filled = _filled(known, values[order], len(stamps), step)
    keys = [filled[number] for number in key_numbers]
    return Timeline(filled, keys, is_counted=True, notes=tuple(notes))


def _filled(known: np.ndarray, values: np.ndarray, count: int, step: float) -> list[int]:
    """Stamps of all `count` pictures: those at the places `known` have rising `values`, others lie
    evenly between their neighbours; before the first and behind the last they are `step` apart."""
    numbers = np.arange(count)
    filled = np.interp(numbers, known, values)
    filled += step * np.minimum(numbers - known[0], 0)
    filled += step * np.maximum(numbers - known[-1], 0)
    return [int(stamp) for stamp in np.rint(filled)]


def even_numbers(stamps: list[int], num_frames: int) -> list[int]:
    """Numbers of the pictures nearest to `num_frames` even times between the first and the last;
    all of them when there are no more.
    """
    if len(stamps) <= num_frames:
        return list(range(len(stamps)))
    known = np.array(stamps)
    targets = np.linspace(known[0], known[-1], num_frames)
    right = np.searchsorted(known, targets).clip(1, len(known) - 1)
    nearest = np.where(targets - known[right - 1] <= known[right] - targets, right - 1, right)
    for i in range(1, num_frames):  # very uneven time lines: keep the choice strictly increasing
        nearest[i] = max(nearest[i], nearest[i - 1] + 1)
    overflow = np.arange(len(known) - num_frames, len(known))
    return [int(number) for number in np.minimum(nearest, overflow)]
