"""Where the working picture lies in a source picture of any shape, and how it is taken out.

Pictures come out upright (display rotation), with square pixels (sample aspect), in full-range RGB
by the stream's own colour matrix and range; where a stream does not name its matrix, BT.709 is
taken for 720 lines and more and BT.601 below, as players do.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..errors import RejectedInput

HD_LINES = 720
MAX_BLOWN_UP = 64  # times the working square that a scaled frame may fill
MATRIX_UNNAMED = 2  # ITU-T H.273 table 4
MATRIX_BT709 = 1
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
    frames_are_fields: bool = False  # each decoded frame is one field already (HEVC)

    def cut(self, picture: np.ndarray) -> np.ndarray:
        """The working picture [out_height, out_width, 3] of a scaled one."""
        return picture[
            self.top : self.top + self.out_height, self.left : self.left + self.out_width
        ]

    def scale(self, picture: np.ndarray) -> np.ndarray:
        """The working picture of one of any size, uint8 [H, W, 3], bicubic. Only what is kept is
        scaled: a thin strip blown up whole would not fit the memory."""
        from PIL import Image

        # source pixels per scaled one
        step_x = picture.shape[1] / self.width
        step_y = picture.shape[0] / self.height
        left = self.left * step_x
        top = self.top * step_y
        box = (left, top, left + self.out_width * step_x, top + self.out_height * step_y)
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
    return Framing(
        height=scaled_height,
        width=scaled_width,
        top=int(place * (scaled_height - out_height)),
        left=int(place * (scaled_width - out_width)),
        out_height=out_height,
        out_width=out_width,
    )


def framing_of(
    path: Path, frame, stream, size: int, patch_size: int, fit: str, place: float
) -> Framing:
    """Framing of a stream by its first decoded frame: rotation and sample aspect applied.

    Raises RejectedInput: rotation (mirrored, or no quarter turn), too_large (a strip).
    """
    if abs(frame.rotation / 90 - round(frame.rotation / 90)) > 0.01 or _is_mirrored(frame):
        turned = "mirrored" if _is_mirrored(frame) else f"turned by {frame.rotation:.0f} degrees"
        raise RejectedInput(
            "rotation",
            f"{path} is to be shown {turned}: only quarter turns are read, re-encode it upright",
        )
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    # HEVC codes the fields of interlaced video as pictures of their own, of half the height
    frames_are_fields = frame.interlaced_frame and stream.codec_context.name == "hevc"
    lines = 2 * frame.height if frames_are_fields else frame.height
    columns = frame.width * float(aspect or 1)
    is_turned = frame.rotation % 180 != 0
    framing = frame_to(
        height=columns if is_turned else float(lines),
        width=float(lines) if is_turned else columns,
        size=size,
        patch_size=patch_size,
        fit=fit,
        place=place,
    )
    framing = replace(framing, frames_are_fields=frames_are_fields)
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
    """Scaled, upright, cut RGB picture uint8 [out_height, out_width, 3] of one decoded frame; of an
    interlaced one its first field in time, since two fields are two moments.
    """
    turns = round(frame.rotation / 90) % 4
    stored = (framing.height, framing.width)  # before the turn
    height, width = stored if turns % 2 == 0 else stored[::-1]
    lines = 2 * frame.height if framing.frames_are_fields else frame.height
    if frame.colorspace == MATRIX_UNNAMED and lines >= HD_LINES:
        frame.colorspace = MATRIX_BT709
    has_two_fields = frame.interlaced_frame and not framing.frames_are_fields
    shown = _first_field(frame) if has_two_fields else frame
    scaled = shown.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
    return np.ascontiguousarray(framing.cut(np.rot90(scaled.to_ndarray(), k=turns)))


def _first_field(frame):
    """The field of an interlaced frame that is shown first, a frame of half the height. A filter
    takes it, because PyAV does not tell which of the two comes first and FFmpeg's frame knows.
    """
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base,
    )
    graph.link_nodes(source, graph.add("separatefields"), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()
