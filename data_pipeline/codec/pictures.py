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
):
    """Gives (stream, iterator of its decoded frames in the order of showing); closes the file.

    from_key: begin at the first packet that is marked as a key frame, since a recording may start
    inside a GOP. `prepare(stream)` is called before the first packet. Raises what open_video
    raises; the iterator raises DamagedVideo (decode), and RejectedInput: varying (the picture size
    changes), hdr.
    """
    container, stream = open_video(path, limits)
    stream.codec_context.options = {"err_detect": "explode"}
    stream.thread_type = "NONE"  # the packer runs a process per core; threads would only compete
    if prepare is not None:
        prepare(stream)
    try:
        yield stream, _checked(path, _decoded(container, stream, from_key))
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

    def is_leading(self, packet) -> bool:
        """Whether a packet leads the first key frame: decoded after it, shown before it, predicted
        from pictures that may be missing. Leading packets come before all others of their GOP, so a
        stamp that falls back later is none of them.
        """
        if self._is_over or packet is self._key or None in (packet.pts, self._key.pts):
            return False
        self._is_over = packet.pts > self._key.pts
        return not self._is_over


def _decoded(container, stream, from_key: bool) -> Iterator:
    """Frames of all packets that can be decoded.

    Of leading pictures that lack a reference, most decoders show nothing. The H.264 decoder
    predicts them from whatever it has, and an H.264 stream that starts whole has none.
    """
    start = RecordingStart()
    is_h264 = stream.codec_context.name == "h264"
    for packet in demux(container, stream):
        if from_key and start.is_early(packet):
            continue
        if from_key and is_h264 and start.is_leading(packet):
            continue
        yield from packet.decode()


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
