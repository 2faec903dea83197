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
# containers that store when a packet is to be decoded, but not when its picture is to be shown;
# libavformat makes presentation stamps up for them by guessing how many B-frames there are
WITHOUT_PRESENTATION_TIMES = ("avi", "asf")
# pictures that a decoder holds at most to put B-frames in order and to predict from (H.264: 16)
MAX_REORDERED = 16


class DamagedVideo(RejectedInput):
    """A stream that breaks while it is decoded, after `num_good` whole pictures."""

    def __init__(self, reason: str, detail: str, num_good: int):
        super().__init__(reason, detail)
        self.num_good = num_good


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


class RecordingStart:
    """Tells which packets at the head of a recording, in the order of decoding, cannot be decoded
    because the recording began too late: inside a GOP, or inside an open GOP.
    """

    def __init__(self):
        self._key = None
        self._is_over = False

    def is_early(self, packet) -> bool:
        """Whether a packet comes before the first key frame. Asked for every packet, once."""
        if self._key is None and packet.is_keyframe:
            self._key = packet
        return self._key is None

    def is_key(self, packet) -> bool:
        """Whether a packet is the first key frame."""
        return packet is self._key

    def is_leading(self, packet) -> bool:
        """Whether a packet leads the first key frame: decoded after it, shown before it, predicted
        from pictures that may be missing. Leading packets come before all others of their GOP, so a
        stamp that falls back later is none of them.
        """
        if self._is_over or packet is self._key or None in (packet.pts, self._key.pts):
            return False
        self._is_over = packet.pts > self._key.pts
        return not self._is_over


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
    num_lenient = 0
    for packet in demux(container, stream):
        if from_key and start.is_early(packet):
            continue
        if from_key and is_h264 and start.is_leading(packet):
            continue
        if start.is_key(packet) and is_h264 and not _is_idr(stream, packet):
            num_lenient = 1 + MAX_REORDERED
        if is_needed is not None:
            stream.codec_context.skip_frame = "DEFAULT" if is_needed(packet) else "NONREF"
        yield from _decode_packet(packet, num_lenient > 0)
        num_lenient -= 1


def _decode_packet(packet, is_lenient: bool) -> list:
    """Frames that a packet brings out of the decoder.

    The first pictures of a recording that begins inside an H.264 stream may tell the decoder to
    forget references that it never had. It decodes them whole and then reports an error, which is
    none; they come out with the next packets.
    """
    import av

    try:
        return packet.decode()
    except av.FFmpegError:
        if not is_lenient:
            raise
        return []


def _is_idr(stream, packet) -> bool:
    """Whether an H.264 key frame lets decoding begin without anything before it: one of its NAL
    units is of type 5 (ITU-T H.264 table 7-1). Units follow start codes, or their lengths where the
    stream's header says so (ISO/IEC 14496-15, 5.3.3.1)."""
    data = bytes(packet)
    header = bytes(stream.codec_context.extradata or b"")
    if header[:1] != b"\x01":
        return any(unit[0] & 0x1F == 5 for unit in data.split(b"\0\0\1")[1:] if unit)
    size = (header[4] & 3) + 1
    place = 0
    while place + size < len(data):
        if data[place + size] & 0x1F == 5:
            return True
        place += size + int.from_bytes(data[place : place + size], "big")
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
    except av.FFmpegError as error:
        detail = f"{path}: decoding stopped: {error.strerror} (--salvage keeps what is before)"
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
