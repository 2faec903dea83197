"""The pictures of a video in the order in which they are shown, as its decoder hands them out.

A decoder puts B-frames back into the order of showing before it hands them out, so this order needs
no timestamps; codec/timeline.py says when each picture is shown. Errors are never concealed: bytes
that are damaged end the iteration with DamagedVideo.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import RejectedInput
from .open_video import InputLimits, open_video

HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # ITU-T H.273 table 3
# Containers of which libavformat gives only stamps of decoding, and makes presentation stamps up by
# guessing how many B-frames there are.
WITHOUT_PRESENTATION_TIMES = ("avi", "asf")
MAX_REFERENCES = 16  # pictures that an H.264 decoder may predict from (ITU-T H.264 A.3.1)


class DamagedVideo(RejectedInput):
    """A stream that breaks while it is decoded, after `num_good` whole pictures."""

    def __init__(self, reason: str, detail: str, num_good: int):
        super().__init__(reason, detail)
        self.num_good = num_good


class _Incomplete(Exception):
    """A packet of which its container has lost bytes."""


@contextlib.contextmanager
def open_pictures(
    path: Path,
    limits: InputLimits,
    from_key: bool = True,
    prepare: Callable | None = None,
    is_needed: Callable | None = None,
):
    """Gives (stream, iterator of its decoded frames in the order of showing); closes the file.

    from_key: begin at the first packet that is marked as a key frame, since a recording may start
    inside a GOP. `prepare(stream)` is called before the first packet. `is_needed(packet)` may say
    that a picture need not be decoded, if no other is predicted from it; where that cannot be known
    (can_skip), it is not asked. Raises what open_video raises; the iterator raises DamagedVideo
    (decode), and RejectedInput: varying (the picture size changes), hdr.
    """
    container, stream = open_video(path, limits)
    stream.codec_context.options = {"err_detect": "explode"}
    stream.thread_type = "NONE"  # the packer runs a process per core; threads would only compete
    if prepare is not None:
        prepare(stream)
    try:
        needed = is_needed if can_skip(container, stream) else None
        yield stream, _checked(path, _decoded(container, stream, from_key, needed))
    finally:
        container.close()


def demux(container, stream=None) -> Iterator:
    """Packets of a container, or of one of its streams, in the order of decoding; an empty one at
    the end of each stream. Where the container has no presentation stamps, they are the decoding
    stamps: the slots in which pictures are shown, though not each packet's own picture.
    """
    is_made_up = container.format.name in WITHOUT_PRESENTATION_TIMES
    for packet in container.demux() if stream is None else container.demux(stream):
        if is_made_up:
            packet.pts = packet.dts
        yield packet


def is_before_start(container, pts: int | None) -> bool:
    """Whether a picture lies before the start of an MP4's or MOV's presentation, which is zero:
    an edit list leaves it out. libavformat marks such packets itself, but not in fragments."""
    return "mp4" in container.format.name and pts is not None and pts < 0


class RecordingStart:
    """Follows the packets at the head of a recording, in the order of decoding, and tells those
    that cannot be decoded because the recording began too late: inside a GOP, or in an open GOP.
    """

    EARLY = "before the first key frame"
    LEADING = "decoded after it, shown before it"
    WHOLE = "all others"

    def __init__(self):
        self.key = None  # the first packet that is marked as a key frame
        self._is_over = False

    def part_of(self, packet) -> str:
        """The part that the next packet belongs to.

        Leading pictures may be predicted from missing ones. They come before all others of their
        GOP, so a stamp that falls back later is none of theirs.
        """
        if self.key is None and packet.is_keyframe:
            self.key = packet
        if self.key is None:
            return self.EARLY
        if self._is_over or packet is self.key or None in (packet.pts, self.key.pts):
            return self.WHOLE
        self._is_over = packet.pts > self.key.pts
        return self.WHOLE if self._is_over else self.LEADING


def can_skip(container, stream) -> bool:
    """Whether pictures can be left undecoded: H.264 marks those that no other is predicted from,
    and these containers say of each packet when its picture is shown.
    """
    is_timed = any(name in container.format.name for name in ("mp4", "matroska"))
    return is_timed and stream.codec_context.name == "h264"


def _decoded(container, stream, from_key: bool, is_needed: Callable | None) -> Iterator:
    """Frames of all packets that can be decoded, and are needed.

    Of leading pictures that lack a reference, most decoders show nothing. The H.264 decoder
    predicts them from whatever it has, and an H.264 stream that starts whole has none.
    """
    start = RecordingStart()
    is_h264 = stream.codec_context.name == "h264"
    num_since_key = 0
    begins_late = False
    for packet in demux(container, stream):
        part = start.part_of(packet)
        if from_key and (part == start.EARLY or (is_h264 and part == start.LEADING)):
            continue
        if packet is start.key:
            begins_late = is_h264 and not _is_idr(stream, packet)
        may_miss_references = begins_late and 0 < num_since_key <= MAX_REFERENCES
        num_since_key += 1
        if is_needed is not None:
            stream.codec_context.skip_frame = "DEFAULT" if is_needed(packet) else "NONREF"
        frames = _decode_first(packet) if may_miss_references else _decode(packet)
        for frame in frames:
            if not is_before_start(container, frame.pts):
                yield frame


def _decode(packet) -> list:
    """Frames that a packet brings out of the decoder. Raises FFmpegError for damaged bytes, and
    _Incomplete where the container has noticed them: a decoder would show something in their place.
    """
    if packet.is_corrupt:
        raise _Incomplete
    return packet.decode()


def _decode_first(packet) -> list:
    """The same for the first packets of a recording that begins inside an H.264 stream.

    They may tell the decoder to forget references that it never had (memory management control
    operations, ITU-T H.264 8.2.5.4). It decodes such a picture whole, hands it out with the next
    packets, and reports an error that is none. Only its message tells it from damage.
    """
    import av
    import av.logging

    level = av.logging.get_level()
    skips = av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    messages: list = []
    try:
        with av.logging.Capture() as messages:
            return _decode(packet)
    except av.FFmpegError:
        texts = [text for _, _, text in messages]
        if not texts or not all(text.startswith("mmco: ") for text in texts):
            raise
        return []
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)


def _is_idr(stream, packet) -> bool:
    """Whether an H.264 key frame lets decoding begin without anything before it: one of its NAL
    units is of type 5 (ITU-T H.264 table 7-1). Units follow start codes, or their lengths where the
    stream's header says so (ISO/IEC 14496-15, 5.3.3.1)."""
    data = bytes(packet)
    header = bytes(stream.codec_context.extradata or b"")
    if header[:1] != b"\x01":
        return any(unit[0] & 0x1F == 5 for unit in data.split(b"\0\0\1")[1:] if unit)
    size = (header[4] & 3) + 1
    offset = 0
    while offset + size < len(data):
        if data[offset + size] & 0x1F == 5:
            return True
        offset += size + int.from_bytes(data[offset : offset + size], "big")
    return False


def _checked(path: Path, frames: Iterator) -> Iterator:
    """The same frames, each checked against the first one; errors become DamagedVideo."""
    import av

    first = None
    num_good = 0
    try:
        for frame in frames:
            first = first or frame
            _check(path, frame, first, num_good)
            yield frame
            num_good += 1
    except (av.FFmpegError, _Incomplete) as error:
        cause = "bytes are missing" if isinstance(error, _Incomplete) else error.strerror
        detail = f"{path}: decoding stopped: {cause} (--salvage keeps what is before)"
        raise DamagedVideo("decode", detail, num_good) from error


def _check(path: Path, frame, first, number: int) -> None:
    if frame.is_corrupt:
        raise DamagedVideo("decode", f"{path}: frame {number} is damaged", number)
    if (frame.width, frame.height) != (first.width, first.height):
        raise RejectedInput(
            "varying",
            f"{path}: frame {number} is {frame.width}x{frame.height}, the first one was "
            f"{first.width}x{first.height}: cut the video where it changes",
        )
    if frame.color_trc in HDR_TRANSFERS:
        raise RejectedInput(
            "hdr",
            f"{path} has {HDR_TRANSFERS[frame.color_trc]} brightness: tone-map it to standard "
            "range first",
        )
