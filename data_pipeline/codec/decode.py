"""Any readable video -> T frames by timestamp, scaled to the working size.

Two passes: packets are listed once without decoding (their timestamps are the clip's true time
line), T of them are chosen at even times, and one decoding pass keeps only those frames, already
scaled. Memory is T working-size frames whatever the length; time is one full decode. Errors are
never concealed: damaged bytes reject the input.

Shape legend: T frames, H, W working height and width.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..errors import RejectedInput
from .open_video import InputLimits, open_video

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


def frame_to(height: float, width: float, size: int, patch_size: int, fit: str) -> Framing:
    """Choose the working size of a picture of any shape (pixels already square).

    crop: short side to `size`, centre square of `size` x `size`. area: keep the aspect ratio with
    about `size` ** 2 pixels. Sides are multiples of the patch size. Raises ValueError when `size`
    is no such multiple.
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
    top, left = (scaled_height - out_height) // 2, (scaled_width - out_width) // 2
    return Framing(scaled_height, scaled_width, top, left, out_height, out_width)


@dataclass(frozen=True)
class DecodedVideo:
    """T evenly timed frames of one video and what is known of the source."""

    frames: np.ndarray  # uint8 [T, H, W, 3]
    seconds: np.ndarray  # float64 [T], presentation times
    num_source_frames: int
    codec: str
    source_height: int
    source_width: int


def decode_video(
    path: Path,
    num_frames: int,
    size: int,
    patch_size: int,
    fit: str = "crop",
    limits: InputLimits | None = None,
) -> DecodedVideo:
    """Decode `num_frames` frames at even timestamps;
    fewer when the video has fewer, never a repeated one.

    Raises RejectedInput: container, no_video, too_large, decode (damaged), truncated (announced
    frames are missing).
    """
    import av

    limits = limits or InputLimits()
    timeline, numbered = _timeline(path, limits)
    wanted = set(_even_times(timeline, num_frames))
    # opened again instead of seeking back, which is inexact in streams without an index
    container, stream = open_video(path, limits)
    try:
        stream.codec_context.options = {"err_detect": "explode"}
        stream.thread_type = "AUTO"
        frames, times, framing = [], [], None
        for number, frame in enumerate(container.decode(stream)):
            stamp = number if numbered else frame.pts
            if frame.is_corrupt:
                raise RejectedInput("decode", f"{path}: frame {number} is damaged")
            if stamp not in wanted:
                continue
            wanted.discard(stamp)
            framing = framing or _framing_of(frame, stream, size, patch_size, fit)
            frames.append(_picture(frame, framing))
            times.append(
                float(stamp * (1 / (stream.average_rate or 25) if numbered else stream.time_base))
            )
        if wanted:
            raise RejectedInput(
                "truncated",
                f"{path}: {len(wanted)} of {len(wanted) + len(frames)} wanted frames are missing",
            )
    except av.FFmpegError as error:
        raise RejectedInput("decode", f"{path}: decoding stopped: {error.strerror}") from error
    finally:
        container.close()
    order = np.argsort(times, kind="stable")
    context = stream.codec_context
    return DecodedVideo(
        frames=np.stack([frames[i] for i in order]),
        seconds=np.array(times)[order],
        num_source_frames=len(timeline),
        codec=context.name,
        source_height=context.height,
        source_width=context.width,
    )


def _timeline(path: Path, limits: InputLimits) -> tuple[list[int], bool]:
    """Sorted presentation stamps of all packets, and whether they are mere frame numbers because
    the file has no timestamps. Nothing is decoded.
    """
    import av

    stamps, count = [], 0
    container, stream = open_video(path, limits)
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            count += 1
            if count > limits.max_frames:
                raise RejectedInput("too_large", f"{path} has more than {limits.max_frames} frames")
            if packet.pts is not None and not packet.is_discard:
                stamps.append(packet.pts)
    except av.FFmpegError as error:
        raise RejectedInput("decode", f"{path}: reading stopped: {error.strerror}") from error
    finally:
        container.close()
    if count == 0:
        raise RejectedInput("truncated", f"{path} announces a video stream but holds no packet")
    numbered = not stamps
    return (list(range(count)) if numbered else sorted(set(stamps))), numbered


def _even_times(timeline: list[int], num_frames: int) -> list[int]:
    """The stamps nearest to `num_frames` even times between the first and the last."""
    if len(timeline) <= num_frames:
        return timeline
    stamps = np.array(timeline)
    targets = np.linspace(stamps[0], stamps[-1], num_frames)
    right = np.searchsorted(stamps, targets).clip(1, len(stamps) - 1)
    nearest = np.where(targets - stamps[right - 1] <= stamps[right] - targets, right - 1, right)
    for i in range(1, num_frames):  # very uneven time lines: keep the choice strictly increasing
        nearest[i] = max(nearest[i], nearest[i - 1] + 1)
    overflow = np.arange(len(stamps) - num_frames, len(stamps))
    return [int(stamp) for stamp in stamps[np.minimum(nearest, overflow)]]


def _framing_of(frame, stream, size, patch_size, fit) -> Framing:
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    height, width = float(frame.height), frame.width * float(aspect or 1)
    if frame.rotation % 180:
        height, width = width, height
    return frame_to(height, width, size, patch_size, fit)


def _picture(frame, framing: Framing) -> np.ndarray:
    """Scaled, upright, cut RGB picture of one decoded frame."""
    turned = frame.rotation % 180 != 0
    height, width = (framing.width, framing.height) if turned else (framing.height, framing.width)
    rgb = frame.reformat(
        width=width, height=height, format="rgb24", interpolation="AREA"
    ).to_ndarray()
    return np.ascontiguousarray(framing.cut(np.rot90(rgb, k=round(frame.rotation / 90) % 4)))
