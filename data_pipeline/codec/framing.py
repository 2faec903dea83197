"""What is read of a video, and how a working frame is cut out of a source frame of any shape.

Frames come out upright (display rotation), with square pixels (sample aspect), in full-range RGB by
the stream's own colour matrix and range; where a stream does not name its matrix, BT.709 is taken
for 720 lines and more and BT.601 below, as players do.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from ..errors import RejectedInput
from .content import Content
from .open_video import InputLimits

if TYPE_CHECKING:
    import av

HD_LINES = 720  # from here on a stream without a colour matrix is taken for BT.709
# A long strip whose short side is scaled to the square may have so many times the square's pixels:
# 3.2 million at 224 px, 10 MB as RGB.
MAX_SCALED_SQUARES = 64
MATRIX_UNNAMED = 2  # ITU-T H.273 table 4
MATRIX_BT709 = 1
FITS = ("crop", "area", "pad")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a setting has one of these values."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class Framing:
    """Which frames of a video are read, and which pixels of them.

    num_frames     at even times over the whole video; a shorter video gives the frames it has
    by_index       the frames at even indices, truncated, instead of even times: as published
    within         instead of `num_frames`: one frame in each of len(within) equal segments of the
                   video, at this share of the segment, 0 to 1 (timeline.segment_frames)
    size           side of the working square in pixels, even and a multiple of `patch_size`
    fit            crop: the short side is scaled to `size`, and a square cut out of the long one;
                   area: the aspect ratio stays, with about `size` ** 2 pixels;
                   pad: the long side is scaled to `size`, and the short one padded with black on
                   both sides to a square
    crop_position  crop: where the square lies on the long side: 0 its start, 0.5 the middle, 1 its
                   end
    salvage        cut a damaged video to its whole GOPs before the damage, instead of rejecting it
    """

    num_frames: int = 64
    size: int = 224
    patch_size: int = 16
    fit: str = "crop"
    crop_position: float = 0.5
    by_index: bool = False
    within: tuple[float, ...] = ()
    limits: InputLimits = InputLimits()
    salvage: bool = False

    def __post_init__(self) -> None:
        if self.size % self.patch_size or self.size % 2:
            raise ValueError(
                f"size {self.size} must be even and a multiple of the patch size {self.patch_size}"
            )
        check_choice("fit", self.fit, choices=FITS)


@dataclass(frozen=True)
class Crop:
    """Where the working frame lies: scale to (height, width), then cut the box. A box that begins
    before the scaled frame (negative `top` or `left`) is padded with black there, and behind it."""

    height: int
    width: int
    top: int
    left: int
    out_height: int
    out_width: int
    frames_are_fields: bool = False  # each decoded frame is one field already (HEVC)

    @property
    def content(self) -> Content:
        """The part of the working frame that is not padding."""
        return Content(
            top=max(-self.top, 0),
            left=max(-self.left, 0),
            bottom=min(self.height - self.top, self.out_height),
            right=min(self.width - self.left, self.out_width),
        )

    def cut(self, scaled: np.ndarray) -> np.ndarray:
        """The working frame [out_height, out_width, ...] of a scaled one; padding is 0."""
        bottom = self.top + self.out_height
        right = self.left + self.out_width
        return self._padded(scaled[max(self.top, 0) : bottom, max(self.left, 0) : right])

    def scale(self, image: np.ndarray) -> np.ndarray:
        """The working frame of an image of any size, uint8 [H, W, 3], bicubic; of a map, float32
        [H, W], by the mean of what lies under a pixel. Only the box is scaled: a thin strip scaled
        as a whole would not fit into memory."""
        from PIL import Image

        # source pixels per scaled one
        step_x = image.shape[1] / self.width
        step_y = image.shape[0] / self.height
        content = self.content
        out_height = content.bottom - content.top
        out_width = content.right - content.left
        left = max(self.left, 0) * step_x
        top = max(self.top, 0) * step_y
        # a box that reaches one rounding beyond the image is refused
        right = min(left + out_width * step_x, image.shape[1])
        bottom = min(top + out_height * step_y, image.shape[0])
        is_map = image.ndim == 2
        scaled = Image.fromarray(image).resize(
            size=(out_width, out_height),
            resample=Image.Resampling.BOX if is_map else Image.Resampling.BICUBIC,
            box=(left, top, right, bottom),
        )
        return self._padded(np.asarray(scaled))

    def _padded(self, content: np.ndarray) -> np.ndarray:
        if content.shape[:2] == (self.out_height, self.out_width):
            return content
        box = self.content
        frame = np.zeros((self.out_height, self.out_width, *content.shape[2:]), content.dtype)
        frame[box.top : box.bottom, box.left : box.right] = content
        return frame


def crop_of(height: float, width: float, framing: Framing, frames_are_fields: bool = False) -> Crop:
    """Choose the working size and box of frames of any shape (pixels already square).

    Sides of the box are multiples of the patch size, and even in pixels.
    """
    size = framing.size
    if framing.fit == "pad":
        scale = size / max(height, width)
        scaled_height = max(1, round(height * scale))
        scaled_width = max(1, round(width * scale))
        return Crop(
            height=scaled_height,
            width=scaled_width,
            # half of what is missing lies before the content, and what is odd behind it
            top=-((size - scaled_height) // 2),
            left=-((size - scaled_width) // 2),
            out_height=size,
            out_width=size,
            frames_are_fields=frames_are_fields,
        )
    if framing.fit == "crop":
        scale = size / min(height, width)
        out_height = size
        out_width = size
    else:
        scale = size / (height * width) ** 0.5
        # a working side must be even for 4:2:0 chroma
        step = framing.patch_size if framing.patch_size % 2 == 0 else 2 * framing.patch_size
        out_height = max(step, round(height * scale / step) * step)
        out_width = max(step, round(width * scale / step) * step)
        scale = max(out_height / height, out_width / width)
    scaled_height = max(out_height, round(height * scale))
    scaled_width = max(out_width, round(width * scale))
    return Crop(
        height=scaled_height,
        width=scaled_width,
        top=int(framing.crop_position * (scaled_height - out_height)),
        left=int(framing.crop_position * (scaled_width - out_width)),
        out_height=out_height,
        out_width=out_width,
        frames_are_fields=frames_are_fields,
    )


def crop_of_stream(
    path: Path,
    frame: "av.VideoFrame",
    stream: "av.VideoStream",
    framing: Framing,
) -> Crop:
    """Crop of a stream by its first decoded frame: rotation and sample aspect applied.

    Raises RejectedInput: rotation (mirrored, or no quarter turn), too_large (a strip).
    """
    quarters = frame.rotation / 90
    is_mirrored = _is_mirrored(frame)
    if abs(quarters - round(quarters)) > 0.01 or is_mirrored:
        turned = "mirrored" if is_mirrored else f"turned by {frame.rotation:.0f} degrees"
        raise RejectedInput(
            "rotation",
            f"{path} is to be shown {turned}: only quarter turns are read, re-encode it upright",
        )
    # HEVC codes the fields of interlaced video as frames of their own, of half the height
    frames_are_fields = frame.interlaced_frame and stream.codec_context.name == "hevc"
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    height = float(2 * frame.height if frames_are_fields else frame.height)
    width = frame.width * float(aspect)
    if frame.rotation % 180 != 0:
        height, width = width, height
    crop = crop_of(height, width, framing=framing, frames_are_fields=frames_are_fields)
    if crop.height * crop.width > MAX_SCALED_SQUARES * framing.size**2:
        raise RejectedInput(
            "too_large",
            f"{path} is a strip of {frame.width}x{frame.height}: scaled to {framing.size} px it "
            f"would be {crop.width}x{crop.height}: crop it first",
        )
    whole = crop.content.whole_patches(
        height=crop.out_height, width=crop.out_width, patch_size=framing.patch_size
    )
    if not whole.any():
        raise RejectedInput(
            "too_large",
            f"{path} is a strip of {frame.width}x{frame.height}: padded to {framing.size} px none "
            f"of its patches of {framing.patch_size} px would be without padding: crop it first",
        )
    return crop


def _is_mirrored(frame: "av.VideoFrame") -> bool:
    """Whether the display matrix (nine 32-bit numbers, row by row) swaps left and right: then the
    determinant of its upper left 2 x 2 block is negative."""
    matrix = cast("bytes | None", frame.side_data.get("DISPLAYMATRIX"))
    if matrix is None:
        return False
    # as floats: products of two such numbers do not fit 32 bits
    numbers = np.frombuffer(matrix, np.int32).astype(float)
    a, b, _, c, d = numbers[:5]
    return a * d - b * c < 0


def working_frame(frame: "av.VideoFrame", crop: Crop) -> np.ndarray:
    """Scaled, upright, cut RGB frame uint8 [out_height, out_width, 3] of a decoded one; of an
    interlaced one its first field in time, since two fields are two moments.
    """
    turns = round(frame.rotation / 90) % 4
    height = crop.height
    width = crop.width
    if turns % 2:  # scaled as stored, turned afterwards
        height, width = width, height
    lines = 2 * frame.height if crop.frames_are_fields else frame.height
    if frame.colorspace == MATRIX_UNNAMED and lines >= HD_LINES:
        frame.colorspace = MATRIX_BT709
    shown = frame
    if frame.interlaced_frame and not crop.frames_are_fields:
        shown = _first_field(frame)
    scaled = shown.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
    return np.ascontiguousarray(crop.cut(np.rot90(scaled.to_ndarray(), k=turns)))


def _first_field(frame: "av.VideoFrame") -> "av.VideoFrame":
    """The field of an interlaced frame that is shown first, a frame of half the height.

    A filter takes it, because PyAV does not expose which of the two comes first and FFmpeg's frame
    knows.
    """
    import av.filter

    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base,
    )
    graph.link_nodes(source, graph.add("separatefields"), graph.add("buffersink")).configure()
    graph.push(frame)
    return cast("av.VideoFrame", graph.pull())  # a graph of a video source outputs video frames
