"""When the pictures of a video are shown.

Header frame counts, average rates and durations lie or are missing. The packets' own presentation
times mostly do not, and they are read without decoding: some milliseconds per thousand packets.
Where they turn out not to be the pictures' times (packets that show nothing, fields in packets of
their own, containers without presentation times), the pictures are counted by decoding once.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..errors import RejectedInput
from .open_video import InputLimits, open_video
from .pictures import MAX_REORDERED, DamagedVideo, RecordingStart, demux, open_pictures

# of an announced duration: beyond both it is truncated
MISSING_SHARE = 0.1
MISSING_SECONDS = 0.5
DURATION_FROM_ZERO = ("matroska", "asf")  # other containers count it from the first packet on
REPEATED_SHARE = 0.1
DEFAULT_RATE = 25  # frames per second of a file that has neither times nor a rate
VP8_SHOWN = 0x10  # RFC 6386 section 9.1: bit of a frame's first byte


@dataclass(frozen=True)
class Timeline:
    """Presentation stamps of the pictures, in the order of showing.

    stamps          int [n], rising, in the stream's time base
    key_stamps      those of key frames, hidden ones included
    has_keys        whether any packet is marked as a key frame
    is_certain      whether every packet has a time of its own; else the pictures must be counted
    is_counted      whether the pictures were counted by decoding, so that the i-th stamp is that of
                    the i-th picture, whatever the picture itself says
    is_numbered     whether the stamps are mere picture numbers because the file has no times
    is_cut          whether what follows damage was cut off
    notes           short facts for the sample's metadata
    """

    stamps: list[int]
    key_stamps: list[int]
    has_keys: bool = True
    is_certain: bool = True
    is_counted: bool = False
    is_numbered: bool = False
    is_cut: bool = False
    notes: tuple[str, ...] = ()

    def before_damage(self, num_good: int) -> "Timeline":
        """The whole GOPs that end before the last of `num_good` good pictures' own."""
        good = self.stamps[:num_good]
        starts = [key for key in self.key_stamps if good and key <= good[-1]]
        cut = max(starts, default=None)
        whole = [stamp for stamp in good if cut is not None and stamp < cut]
        return replace(self, stamps=whole, is_cut=True)


@dataclass
class _Packets:
    """What one pass over a container's packets found.

    early, shown   stamps of packets before the first key frame, and of those that follow it and are
                   to be shown; None for a packet without a stamp
    keys           stamps of key frames, hidden ones included
    num_discarded  packets that an edit list leaves out
    end            latest end of any packet, in seconds
    """

    early: list[int | None]
    shown: list[int | None]
    keys: list[int | None]
    num_discarded: int = 0
    end: float = 0.0
    problem: RejectedInput | None = None


def read_timeline(path: Path, limits: InputLimits, salvage: bool = False) -> Timeline:
    """Timeline of the best video stream by its packets.

    Raises RejectedInput: decode (the container breaks off), truncated (no packet, or much less than
    the announced duration), too_large. With `salvage` a timeline that breaks off is cut to its
    whole GOPs instead.
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
        is_certain=len(stamps) == len(shown),
    )
    if found.problem is not None:
        timeline = timeline.before_damage(len(timeline.stamps))
        if not salvage or not timeline.stamps:
            raise found.problem
    return timeline


def _list_packets(path: Path, limits: InputLimits) -> _Packets:
    import av

    found = _Packets(early=[], shown=[], keys=[])
    start = RecordingStart()
    container, stream = open_video(path, limits)
    try:
        for packet in demux(container):
            if packet.size == 0:  # the end of a stream
                continue
            if packet.pts is not None and packet.time_base:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                found.end = max(found.end, end)
            if packet.stream_index == stream.index:
                _note(found, start, packet, stream)
            if len(found.early) + len(found.shown) > limits.max_frames:
                raise RejectedInput("too_large", f"{path} has more than {limits.max_frames} frames")
        found.problem = _truncation(path, container, found.end) or _shifted_edit(path, found)
    except av.FFmpegError as error:
        found.problem = RejectedInput("decode", f"{path}: reading stopped: {error.strerror}")
    finally:
        container.close()
    return found


def _note(found: _Packets, start: RecordingStart, packet, stream) -> None:
    """Note one packet of the video stream, in the order of decoding."""
    if packet.is_keyframe:
        found.keys.append(packet.pts)
    if start.is_early(packet):
        found.early.append(packet.pts)
    elif start.is_leading(packet):
        pass  # where a decoder does show it after all, the pictures are counted
    elif packet.is_discard:
        found.num_discarded += 1
    elif _is_vp8_reference(stream, packet):
        pass  # only there to predict others from
    else:
        found.shown.append(packet.pts)


def _is_vp8_reference(stream, packet) -> bool:
    return stream.codec_context.name == "vp8" and not bytes(packet)[0] & VP8_SHOWN


def _truncation(path: Path, container, end: float) -> RejectedInput | None:
    """What is wrong with a container whose packets end at `end` seconds, long before its announced
    duration does."""
    import av

    announced = (container.duration or 0) / av.time_base
    start = (container.start_time or 0) / av.time_base
    from_zero = start > 0 and any(name in container.format.name for name in DURATION_FROM_ZERO)
    missing = announced - (end if from_zero else end - start)
    length = announced - start if from_zero else announced
    if missing <= max(MISSING_SECONDS, MISSING_SHARE * length):
        return None
    return RejectedInput(
        "truncated",
        f"{path}: {missing:.1f} of the announced {announced:.1f} s are missing: fetch the file "
        "again, or pack with --salvage",
    )


def _shifted_edit(path: Path, found: _Packets) -> RejectedInput | None:
    """What is wrong with an edit list that leaves out other packets than it names: libavformat
    does so where it splits packets anew (MPEG-1 in MP4). What is shown begins at zero then."""
    shown = [stamp for stamp in found.shown if stamp is not None]
    if not found.num_discarded or not shown or min(shown) >= 0:
        return None
    return RejectedInput(
        "timestamps", f"{path}: its edit list cannot be followed: remux it without one"
    )


def count_pictures(path: Path, limits: InputLimits, timeline: Timeline, salvage: bool) -> Timeline:
    """Timeline of the pictures that leave the decoder; costs one decoding.

    `timeline` is what the packets said. Raises RejectedInput: decode (damaged), truncated (the
    pictures end long before the packets), timestamps (many pictures at one time, or stamps that
    jump back), and what open_pictures raises. With `salvage` it is cut to the whole GOPs before
    damage.
    """
    stamps: list[int | None] = []
    key_numbers: list[int] = []
    damage = None
    try:
        with open_pictures(path, limits, from_key=timeline.has_keys) as (stream, pictures):
            unit = stream.time_base
            step = float(1 / (stream.average_rate or DEFAULT_RATE) / unit)
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
    counted = _ordered(path, stamps, key_numbers, step)
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


def _ordered(path: Path, stamps: list[int | None], key_numbers: list[int], step: float) -> Timeline:
    """Timeline of pictures with these stamps, in the order of showing; `step` is the usual distance
    of two. Where stamps run backwards, they are those of decoding (AVI): the sorted ones are handed
    out in order.
    """
    known = np.array([number for number, stamp in enumerate(stamps) if stamp is not None])
    if len(known) == 0:
        numbers = list(range(len(stamps)))
        return Timeline(numbers, key_numbers, is_counted=True, is_numbered=True)
    values = np.array([stamp for stamp in stamps if stamp is not None])
    order = np.argsort(values, kind="stable")
    moved = np.abs(order - np.arange(len(order))).max()
    if moved > MAX_REORDERED:  # further than any decoder would reorder
        first = int(np.argmin(np.diff(values))) + 1
        raise RejectedInput(
            "timestamps",
            f"{path}: times jump back at frame {known[first]}: were recordings joined without "
            "remuxing? Remux it, or cut it there",
        )
    repeated = len(values) - len(set(values.tolist()))
    if repeated > REPEATED_SHARE * len(values):
        raise RejectedInput(
            "timestamps",
            f"{path}: {repeated} of {len(values)} frames repeat another one's time: were files "
            "joined without remuxing?",
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
