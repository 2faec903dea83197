"""The frames of a video in presentation order, as its decoder outputs them.

A decoder puts B-frames back into presentation order before it outputs them, so this order needs no
timestamps; codec/timeline.py knows when each frame is shown. Errors are never concealed: damaged
bytes end the iteration with DamagedVideo.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RejectedInput
from .open_video import InputLimits, open_video

if TYPE_CHECKING:
    import av

HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # ITU-T H.273 table 3
# Containers that store only decoding timestamps. libavformat invents presentation timestamps for
# them by guessing how many B-frames there are.
WITHOUT_PRESENTATION_TIMES = ("avi", "asf")
MAX_REFERENCES = 16  # frames that an H.264 decoder may predict from (ITU-T H.264 A.3.1)
# Start code of an MPEG-4 picture (ISO/IEC 14496-2 table 6-3); the two bits behind it are its type,
# 2 for a B-frame (table 6-20).
PICTURE_START = b"\0\0\1\xb6"
B_PICTURE = 2
# Bytes of a dummy at most: its start code, at most three of type and time, and stuffing.
DUMMY_BYTES = 8


class DamagedVideo(RejectedInput):
    """A stream that breaks while it is decoded, after `num_good` whole frames."""

    def __init__(self, reason: str, detail: str, num_good: int):
        super().__init__(reason, detail)
        self.num_good = num_good


class _Incomplete(Exception):
    """A packet of which its container has lost bytes."""


@contextlib.contextmanager
def open_frames(
    path: Path,
    limits: InputLimits,
    from_key: bool = True,
    prepare: "Callable[[av.VideoStream], None] | None" = None,
    is_needed: "Callable[[av.Packet], bool] | None" = None,
    watch_packet: "Callable[[av.Packet], None] | None" = None,
) -> "Iterator[tuple[av.VideoStream, Iterator[av.VideoFrame]]]":
    """Gives (stream, iterator of its decoded frames in presentation order); closes the file.

    from_key: begin at the first packet that is marked as a key frame, since a recording may start
    inside a GOP. `prepare(stream)` is called before the first packet. A frame for whose packet
    `is_needed` is False is left undecoded if no other frame is predicted from it; where the stream
    does not show that, everything is decoded. `watch_packet` sees packets in decoding order, of
    H.264 in containers that store when each one's frame is shown. Raises what open_video raises;
    the iterator raises DamagedVideo (decode), and RejectedInput: varying (the frame size changes),
    hdr.
    """
    container, stream = open_video(path, limits)
    context = stream.codec_context
    # by default FFmpeg conceals damage: it would show a frame in which something else stands
    context.options = {"err_detect": "explode"}
    context.thread_type = "NONE"  # the packer runs a process per core; threads would only compete
    with container:
        if prepare is not None:
            prepare(stream)
        # H.264 marks frames that no other is predicted from, and these containers store for each
        # packet when its frame is shown
        is_timed = any(name in container.format.name for name in ("mp4", "matroska"))
        can_skip = is_timed and context.name == "h264"
        decoded = _decode_all(
            container=container,
            stream=stream,
            from_key=from_key,
            is_needed=is_needed if can_skip else None,
            watch_packet=watch_packet if can_skip else None,
        )
        yield stream, _check_all(path, decoded)


def demux(
    container: "av.container.InputContainer", stream: "av.VideoStream | None" = None
) -> "Iterator[av.Packet]":
    """Packets of a container, or of one of its streams, in decoding order; an empty one at the end
    of each stream.

    Where the container has no presentation timestamps, `pts` is the decoding timestamp: together
    they are the times at which frames are shown, though not each packet's own frame.
    """
    packets: Iterator[av.Packet]
    packets = container.demux() if stream is None else container.demux(stream)
    for packet in packets:
        if container.format.name in WITHOUT_PRESENTATION_TIMES:
            packet.pts = packet.dts
        yield packet


def is_before_start(container: "av.container.InputContainer", pts: int | None) -> bool:
    """Whether a frame lies before the start of an MP4's or MOV's presentation, which is zero: an
    edit list leaves it out. libavformat marks such packets itself, but not in fragments."""
    return "mp4" in container.format.name and pts is not None and pts < 0


class RecordingStart:
    """Follows the packets at the head of a recording, in decoding order, and finds those that
    cannot be decoded because the recording began too late: inside a GOP, or in an open GOP.
    """

    EARLY = "before the first key frame"
    LEADING = "decoded after it, shown before it"
    WHOLE = "all others"

    def __init__(self) -> None:
        self.key: av.Packet | None = None  # the first packet that is marked as a key frame
        self._is_over = False

    def part_of(self, packet: "av.Packet") -> str:
        """The part that the next packet belongs to.

        Leading frames may be predicted from missing ones. They come before all others of their GOP,
        so a later frame with an earlier timestamp is none of theirs.
        """
        if self.key is None and packet.is_keyframe:
            self.key = packet
        if self.key is None:
            return self.EARLY
        if self._is_over or packet is self.key or packet.pts is None or self.key.pts is None:
            return self.WHOLE
        self._is_over = packet.pts > self.key.pts
        return self.WHOLE if self._is_over else self.LEADING


def _decode_all(
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    from_key: bool,
    is_needed: "Callable[[av.Packet], bool] | None",
    watch_packet: "Callable[[av.Packet], None] | None",
) -> "Iterator[av.VideoFrame]":
    """Frames of all packets that can be decoded, and are needed.

    Most decoders output nothing for leading frames that lack a reference. The H.264 decoder
    predicts them from whatever it has, so for H.264 they are dropped here.
    """
    start = RecordingStart()
    is_h264 = stream.codec_context.name == "h264"
    num_since_key = 0
    begins_late = False
    packets = demux(container, stream)
    if stream.codec_context.name == "mpeg4":
        packets = _unpack(packets)
    for packet in packets:
        part = start.part_of(packet)
        if from_key and (part == start.EARLY or (is_h264 and part == start.LEADING)):
            continue
        if packet is start.key:
            # a key frame that is no IDR frame: the recording was cut out of a longer stream
            begins_late = is_h264 and not _is_idr(stream, packet)
        may_miss_references = begins_late and 0 < num_since_key <= MAX_REFERENCES
        num_since_key += 1
        if watch_packet is not None:
            watch_packet(packet)
        if is_needed is not None:
            stream.codec_context.skip_frame = "DEFAULT" if is_needed(packet) else "NONREF"
        for frame in _decode(packet, may_miss_references):
            if not is_before_start(container, frame.pts):
                yield frame


def _unpack(packets: "Iterator[av.Packet]") -> "Iterator[av.Packet]":
    """Packets of one picture each, of MPEG-4 video in decoding order.

    In a packed bitstream (DivX and Xvid in AVI) a B-frame lies in the packet of the frame before
    it, and a dummy stands where it would be: its timestamp is given to the B-frame. libavcodec
    unpacks too, but mixes up pictures where a dummy is missing. Programs that cut AVI leave a
    packet of no bytes there, which libavformat passes over.
    """
    waiting: av.Packet | None = None  # a B-frame for which no dummy came yet
    for packet in packets:
        data = bytes(packet)
        first = data.find(PICTURE_START)
        second = data.find(PICTURE_START, first + 1) if first >= 0 else -1
        if waiting is not None and first >= 0 > second:
            is_b_frame = _picture_type(data, first) == B_PICTURE
            if is_b_frame or len(data) <= DUMMY_BYTES:
                yield _part(packet, bytes(waiting))
                # of several B-frames each has its place one packet later
                waiting = _part(packet, data, num_later=1) if is_b_frame else None
                continue
        if waiting is not None:
            yield waiting
            waiting = None
        if second >= 0 and _picture_type(data, second) == B_PICTURE:
            waiting = _part(packet, data[second:], num_later=1)
            packet = _part(packet, data[:second])
        yield packet


def _picture_type(data: bytes, start: int) -> int:
    """Type of the MPEG-4 picture whose start code is at `start`; -1 where the bytes end with it."""
    behind = start + len(PICTURE_START)
    return data[behind] >> 6 if behind < len(data) else -1


def _part(packet: "av.Packet", data: bytes, num_later: int = 0) -> "av.Packet":
    """A packet of other bytes in the place of one, or `num_later` frames later."""
    import av

    # not av.Packet(data), which lends bytes without the padding that decoders read behind them
    part = av.Packet(len(data))
    part.update(data)
    part.stream = packet.stream
    part.time_base = packet.time_base
    part.is_keyframe = packet.is_keyframe and num_later == 0
    delay = num_later * (packet.duration or 0)
    if packet.pts is not None:
        part.pts = packet.pts + delay
    if packet.dts is not None:
        part.dts = packet.dts + delay
    return part


def _decode(packet: "av.Packet", may_miss_references: bool) -> "list[av.VideoFrame]":
    """Frames that a packet brings out of the decoder.

    Raises FFmpegError for damaged bytes, and _Incomplete where the container has noticed them: a
    decoder would show something else instead.

    The first packets of a recording that begins inside an H.264 stream may command the decoder to
    drop references that it never had (memory management control operations, ITU-T H.264 8.2.5.4).
    It decodes such a frame whole, outputs it with the next packets, and reports an error that is
    none. Only the message in its log distinguishes that from damage.
    """
    import av
    import av.logging

    if packet.is_corrupt:
        raise _Incomplete
    if not may_miss_references:
        return packet.decode()
    level = av.logging.get_level()
    skips = av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    logged: list[tuple[int, str, str]] = []
    try:
        with av.logging.Capture() as logged:
            return packet.decode()
    except av.FFmpegError:
        if logged and all(message.startswith("mmco: ") for _, _, message in logged):
            return []
        raise
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)


def _is_idr(stream: "av.VideoStream", packet: "av.Packet") -> bool:
    """Whether decoding can begin at an H.264 key frame without anything before it: one of its NAL
    units is of type 5 (ITU-T H.264 table 7-1)."""
    return any(first & 0x1F == 5 for first in _nal_first_bytes(stream, packet))


def is_reference(stream: "av.VideoStream", packet: "av.Packet") -> bool:
    """Whether other frames may be predicted from an H.264 packet's: one of its slices (NAL units of
    type 1 or 5) has a `nal_ref_idc` (ITU-T H.264 7.4.1)."""
    firsts = _nal_first_bytes(stream, packet)
    return any(first & 0x1F in (1, 5) and first >> 5 & 3 for first in firsts)


def _nal_first_bytes(stream: "av.VideoStream", packet: "av.Packet") -> list[int]:
    """The first byte of each NAL unit of an H.264 packet. Units follow start codes, or their
    lengths where the stream's header states so (ISO/IEC 14496-15, 5.3.3.1)."""
    data = bytes(packet)
    header = bytes(stream.codec_context.extradata or b"")
    if header[:1] != b"\x01":
        # what stands before the first start code is no unit
        units = data.split(b"\0\0\1")[1:]
        return [unit[0] for unit in units if unit]
    size = (header[4] & 3) + 1
    offset = 0
    first_bytes = []
    while offset + size < len(data):
        first_bytes.append(data[offset + size])
        offset += size + int.from_bytes(data[offset : offset + size], "big")
    return first_bytes


def _check_all(path: Path, frames: "Iterator[av.VideoFrame]") -> "Iterator[av.VideoFrame]":
    """The same frames, each compared with the first one; errors become DamagedVideo."""
    import av

    first = None
    num_good = 0
    try:
        for frame in frames:
            first = first or frame
            if frame.is_corrupt:
                raise DamagedVideo("decode", f"{path}: frame {num_good} is damaged", num_good)
            if (frame.width, frame.height) != (first.width, first.height):
                raise RejectedInput(
                    "varying",
                    f"{path}: frame {num_good} is {frame.width}x{frame.height}, the first one was "
                    f"{first.width}x{first.height}: cut the video where it changes",
                )
            if frame.color_trc in HDR_TRANSFERS:
                raise RejectedInput(
                    "hdr",
                    f"{path} has {HDR_TRANSFERS[frame.color_trc]} brightness: tone-map it to "
                    "standard range first",
                )
            yield frame
            num_good += 1
    except (av.FFmpegError, _Incomplete) as error:
        cause = "bytes are missing" if isinstance(error, _Incomplete) else error.strerror
        detail = f"{path}: decoding stopped: {cause} (--salvage keeps what is before)"
        raise DamagedVideo("decode", detail, num_good) from error
