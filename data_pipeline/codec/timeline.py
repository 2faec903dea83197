"""When the frames of a video are shown: its packets' timestamps, read without decoding.

Header frame counts, average rates and durations lie or are missing; the packets' own presentation
times do not. Cost: one pass over the container, some milliseconds per thousand packets.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import RejectedInput
from .open_video import InputLimits, open_video

MISSING_SHARE, MISSING_SECONDS = 0.1, 0.5  # of an announced duration: beyond both it is truncated
REPEATED_SHARE = 0.1


@dataclass(frozen=True)
class Timeline:
    """Sorted presentation stamps of the video stream, those of them that start a GOP, whether the
    stamps are mere frame numbers because the file has none, and whether it was cut before damage.
    """

    stamps: list[int]
    key_stamps: list[int]
    is_numbered: bool = False
    is_cut: bool = False

    def before_damage(self, last_good: int | None) -> "Timeline":
        """The whole GOPs that end before the last good frame's own."""
        starts = [key for key in self.key_stamps if last_good is not None and key <= last_good]
        cut = max(starts, default=None)
        whole = [stamp for stamp in self.stamps if cut is not None and stamp < cut]
        return replace(self, stamps=whole, is_cut=True)


def read_timeline(path: Path, limits: InputLimits, salvage: bool = False) -> Timeline:
    """Timeline of the best video stream.

    Raises RejectedInput: decode (the container breaks off), truncated (no packet, or much less than
    the announced duration), timestamps (many are equal), too_large. With `salvage` a timeline that
    breaks off is cut to its whole GOPs instead.
    """
    stamps, keys, count, problem = _list_packets(path, limits)
    if count == 0:
        raise RejectedInput("truncated", f"{path} announces a video stream but holds no packet")
    # a recording that starts inside a GOP shows nothing before its first key frame
    shown = {stamp for stamp in stamps if not keys or stamp >= keys[0]}
    timeline = Timeline(sorted(shown), keys)
    if problem is not None:
        timeline = timeline.before_damage(max(stamps, default=None))
        if not salvage or problem.reason == "timestamps" or not timeline.stamps:
            raise problem
    if not stamps:
        return Timeline(list(range(count)), [0], is_numbered=True)
    return timeline


def _list_packets(path: Path, limits: InputLimits):
    """(stamps, stamps of key packets, number of packets, what is wrong with the list)."""
    import av

    stamps: list[int] = []
    keys: list[int] = []
    count, end = 0, 0.0
    container, stream = open_video(path, limits)
    start, announced = ((x or 0) / av.time_base for x in (container.start_time, container.duration))
    try:
        for packet in filter(lambda packet: packet.size > 0, container.demux()):
            if packet.pts is not None and packet.time_base:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index:
                continue
            count += 1
            if count > limits.max_frames:
                raise RejectedInput("too_large", f"{path} has more than {limits.max_frames} frames")
            if packet.pts is not None and not packet.is_discard:
                stamps.append(packet.pts)
                keys += [packet.pts] if packet.is_keyframe else []
    except av.FFmpegError as error:
        detail = f"{path}: reading stopped: {error.strerror}"
        return stamps, keys, count, RejectedInput("decode", detail)
    finally:
        container.close()
    missing = announced - (end - start)
    if missing > max(MISSING_SECONDS, MISSING_SHARE * announced):
        detail = f"{path}: {missing:.1f} of the announced {announced:.1f} s are missing: "
        detail += "fetch the file again, or pack with --salvage"
        return stamps, keys, count, RejectedInput("truncated", detail)
    repeated = len(stamps) - len(set(stamps))
    if repeated > REPEATED_SHARE * len(stamps):
        detail = (
            f"{path}: {repeated} of {len(stamps)} frames repeat another one's time: were files "
        )
        return stamps, keys, count, RejectedInput("timestamps", detail + "joined without remuxing?")
    return stamps, keys, count, None


def even_times(stamps: list[int], num_frames: int) -> list[int]:
    """The stamps nearest to `num_frames` even times between the first and the last; all of them
    when there are no more.
    """
    if len(stamps) <= num_frames:
        return stamps
    known = np.array(stamps)
    targets = np.linspace(known[0], known[-1], num_frames)
    right = np.searchsorted(known, targets).clip(1, len(known) - 1)
    nearest = np.where(targets - known[right - 1] <= known[right] - targets, right - 1, right)
    for i in range(1, num_frames):  # very uneven time lines: keep the choice strictly increasing
        nearest[i] = max(nearest[i], nearest[i - 1] + 1)
    overflow = np.arange(len(known) - num_frames, len(known))
    return [int(stamp) for stamp in known[np.minimum(nearest, overflow)]]
