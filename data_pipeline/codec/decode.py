"""Any readable video -> T frames by timestamp, scaled to the working size.

Two passes: packets are listed once without decoding (codec/timeline.py), T of them are chosen at
even times, and one decoding pass keeps only those frames, already scaled. Memory is T working-size
frames whatever the length; time is one full decode. Errors are never concealed: damaged bytes
reject the input, or with `salvage` cut it before the damage.

Pictures come out upright (display rotation), with square pixels (sample aspect), in full-range RGB
by the stream's own colour matrix and range; where a stream does not name its matrix, BT.709 is
taken for 720 lines and more and BT.601 below, as players do.

Shape legend: T frames, H, W working height and width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..errors import RejectedInput
from .open_video import InputLimits, open_video
from .timeline import Timeline, even_times, read_timeline

HD_LINES = 720
MAX_BLOWN_UP = 64  # times the working square that a scaled frame may fill
MATRIX_UNNAMED, MATRIX_BT709 = 2, 1  # ITU-T H.273 table 4
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # ITU-T H.273 table 3
FITS = ("crop", "area")


@dataclass(frozen=True)
class Framing:
    """Where the working picture lies: scale to (height, width), then cut the box."""

    height: int
    width: int
    top: int
    left: int
    out_height: int
    out_width: int

    def cut(self, picture: np.ndarray) -> np.ndarray:
        """The working picture [out_height, out_width, 3] of a scaled one."""
        return picture[
            self.top : self.top + self.out_height, self.left : self.left + self.out_width
        ]

    def scale(self, picture: np.ndarray) -> np.ndarray:
        """The working picture of one of any size, uint8 [H, W, 3], bicubic. Only what is kept is
        scaled: a thin strip blown up whole would not fit the memory."""
        from PIL import Image

        across, down = picture.shape[1] / self.width, picture.shape[0] / self.height
        left, top = self.left * across, self.top * down
        box = (left, top, left + self.out_width * across, top + self.out_height * down)
        size = (self.out_width, self.out_height)
        kept = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC, box=box)
        return np.asarray(kept)


def frame_to(
    height: float, width: float, size: int, patch_size: int, fit: str, place: float = 0.5
) -> Framing:
    """Choose the working size of a picture of any shape (pixels already square).

    crop: short side to `size`, a square of `size` x `size`, at `place` of the long side (0 its
    start, 0.5 the middle, 1 its end). area: keep the aspect ratio with about `size` ** 2 pixels.
    Sides are multiples of the patch size. Raises ValueError when `size` is no such multiple.
    """
    if size % patch_size or size % 2:
        raise ValueError(f"size {size} must be even and a multiple of the patch size {patch_size}")
    if fit == "crop":
        scale = size / min(height, width)
        out_height = out_width = size
    elif fit == "area":
        scale = size / (height * width) ** 0.5
        step = patch_size if patch_size % 2 == 0 else 2 * patch_size
        out_height, out_width = (
            max(step, round(side * scale / step) * step) for side in (height, width)
        )
        scale = max(out_height / height, out_width / width)
    else:
        raise ValueError(f"fit is {fit!r}; choose one of {', '.join(FITS)}")
    scaled_height = max(out_height, round(height * scale))
    scaled_width = max(out_width, round(width * scale))
    top, left = int(place * (scaled_height - out_height)), int(place * (scaled_width - out_width))
    return Framing(scaled_height, scaled_width, top, left, out_height, out_width)


@dataclass(frozen=True)
class DecodedVideo:
    """T evenly timed frames of one video and what is known of the source. `notes` are short facts
    for the sample's metadata: interlaced, rotated, salvaged.
    """

    frames: np.ndarray  # uint8 [T, H, W, 3]
    seconds: np.ndarray  # float64 [T], presentation times
    num_source_frames: int
    codec: str
    source_height: int
    source_width: int
    notes: tuple[str, ...] = ()


class _Damaged(RejectedInput):
    """A stream that breaks in decoding; `last_good` is the stamp of the last whole frame."""

    def __init__(self, reason: str, detail: str, last_good: int | None):
        super().__init__(reason, detail)
        self.last_good = last_good


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
) -> DecodedVideo:
    """Decode `num_frames` frames at even timestamps;
    fewer when the video has fewer, never a repeated one. `num_frames` may also be a function from
    the number of frames of the video to the numbers of those that are wanted.

    With `salvage`, a damaged video is cut to its whole GOPs before the damage. A `watcher` may
    `prepare(stream)` and `see(number, frame, framing, is_chosen)` every frame. Raises
    RejectedInput: container, no_video, too_large, decode (damaged), truncated (announced frames are
    missing), varying (picture size changes), rotation (no quarter turn), hdr.
    """
    limits = limits or InputLimits()
    timeline = read_timeline(path, limits, salvage)
    framed = dict(size=size, patch_size=patch_size, fit=fit, place=place)
    try:
        video = _decode(path, timeline, num_frames, limits, framed, watcher)
    except _Damaged as damage:
        whole = timeline.before_damage(damage.last_good) if salvage else None
        if whole is None or not whole.stamps:
            raise
        video = _decode(path, whole, num_frames, limits, framed, watcher)
        kept = f"salvaged {len(whole.stamps)} of {len(timeline.stamps)} frames"
        return replace(video, notes=(*video.notes, kept))
    if timeline.is_cut:
        video = replace(video, notes=(*video.notes, f"salvaged {len(timeline.stamps)} frames"))
    return video


def _decode(
    path: Path, timeline: Timeline, num_frames, limits, framed: dict, watcher
) -> DecodedVideo:
    import av

    if callable(num_frames):
        wanted = {timeline.stamps[int(i)] for i in num_frames(len(timeline.stamps))}
    else:
        wanted = set(even_times(timeline.stamps, num_frames))
    # opened again instead of seeking back, which is inexact in streams without an index
    container, stream = open_video(path, limits)
    stream.codec_context.options = {"err_detect": "explode"}
    stream.thread_type = "NONE"  # the packer runs a process per core; threads would only compete
    if watcher is not None:
        watcher.prepare(stream)
    unit = 1 / (stream.average_rate or 25) if timeline.is_numbered else stream.time_base
    frames, times, first, framing, last_good = [], [], None, None, None
    try:
        for number, frame in enumerate(_frames(container, stream, timeline)):
            stamp = number if timeline.is_numbered else frame.pts
            first = first or frame
            _check_frame(path, frame, first, number, last_good)
            last_good = stamp if stamp is not None else last_good
            framing = framing or _framing_of(path, frame, stream, **framed)
            if watcher is not None:
                watcher.see(number, frame, framing, stamp in wanted)
            if stamp not in wanted:
                continue
            wanted.discard(stamp)
            frames.append(picture_of(frame, framing))
            times.append(float(stamp * unit))
            if not wanted:
                break
    except av.FFmpegError as error:
        detail = f"{path}: decoding stopped: {error.strerror} (--salvage keeps what is before)"
        raise _Damaged("decode", detail, last_good) from error
    finally:
        container.close()
    if wanted:
        missing = f"{len(wanted)} of {len(wanted) + len(frames)} wanted frames are missing"
        raise _Damaged("truncated", f"{path}: {missing}", last_good)
    order = np.argsort(times, kind="stable")
    return DecodedVideo(
        frames=np.stack([frames[i] for i in order]),
        seconds=np.array(times)[order],
        num_source_frames=len(timeline.stamps),
        codec=stream.codec_context.name,
        source_height=first.height,
        source_width=first.width,
        notes=_notes(first),
    )


def _frames(container, stream, timeline: Timeline):
    """Decoded frames from the first key frame on: a recording may start inside a GOP."""
    started = timeline.is_numbered or not timeline.key_stamps
    for packet in container.demux(stream):
        started = started or packet.is_keyframe
        if started:
            yield from packet.decode()


def _check_frame(path: Path, frame, first, number: int, last_good) -> None:
    if frame.is_corrupt:
        raise _Damaged("decode", f"{path}: frame {number} is damaged", last_good)
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


def _notes(frame) -> tuple[str, ...]:
    interlaced = ("interlaced",) if frame.interlaced_frame else ()
    return (*interlaced, *((f"rotated {frame.rotation:.0f}",) if frame.rotation else ()))


def _framing_of(path: Path, frame, stream, size, patch_size, fit, place) -> Framing:
    if abs(frame.rotation / 90 - round(frame.rotation / 90)) > 0.01 or _is_mirrored(frame):
        turned = "mirrored" if _is_mirrored(frame) else f"turned by {frame.rotation:.0f} degrees"
        raise RejectedInput(
            "rotation",
            f"{path} is to be shown {turned}: only quarter turns are read, re-encode it upright",
        )
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    height, width = float(frame.height), frame.width * float(aspect or 1)
    if frame.rotation % 180:
        height, width = width, height
    framing = frame_to(height, width, size, patch_size, fit, place)
    if framing.height * framing.width > MAX_BLOWN_UP * size**2:
        raise RejectedInput(
            "too_large",
            f"{path} is a strip of {frame.width}x{frame.height}: scaled to {size} px it would be "
            f"{framing.width}x{framing.height}: crop it first",
        )
    return framing


def _is_mirrored(frame) -> bool:
    """Whether the display matrix (nine 32-bit numbers, row by row) turns left into right."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
    return a * d - b * c < 0


def picture_of(frame, framing: Framing) -> np.ndarray:
    """Scaled, upright, cut RGB picture of one decoded frame; of an interlaced one its first field,
    since two fields are two moments.
    """
    if frame.colorspace == MATRIX_UNNAMED and frame.height >= HD_LINES:
        frame.colorspace = MATRIX_BT709
    turned = frame.rotation % 180 != 0
    height, width = (framing.width, framing.height) if turned else (framing.height, framing.width)
    if frame.interlaced_frame:
        from PIL import Image

        field = Image.fromarray(frame.to_ndarray(format="rgb24")[::2])
        rgb = np.asarray(field.resize((width, height), Image.Resampling.BOX))
    else:
        rgb = frame.reformat(
            width=width, height=height, format="rgb24", interpolation="AREA"
        ).to_ndarray()
    return np.ascontiguousarray(framing.cut(np.rot90(rgb, k=round(frame.rotation / 90) % 4)))
