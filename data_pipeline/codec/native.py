"""The source's own motion vectors instead of the canonical stream's, for H.264 and MPEG-4 part 2.

Cheaper by one encode and decode, but the vectors are what the source's encoder chose: they refer to
its reference frames, at its frame rate, in its picture. So that clips stay comparable,

    velocity      = vector / frames between the frame and its reference   (pixels per source frame)
    motion        = velocity * source frames since the frame shown before
    residual      = |luma - prediction from the last reference frame by the past vectors|

FFmpeg tells whether a vector points into the past or the future, not to which frame; the reference
is taken to be the nearest I- or P-frame on that side, which holds for one reference frame without
B-pyramids and is an estimate otherwise. Blocks without a vector stand still. I-frames are the
source's own among the chosen frames, and the first one.

Shape legend: T frames, H, W working size.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import RejectedInput
from .decode import Framing, decode_video, picture_of
from .decompose import MOTION_CELL, CodecClip, cell_means, frame_times, rasterise, vectors_of
from .motion_compensation import predict_luma

NATIVE_CODECS = ("h264", "mpeg4")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
MAX_QUARTER_PELS = 4 * 1024


@dataclass
class _Seen:
    """A chosen frame as it passed by."""

    number: int
    is_i_frame: bool
    past: np.ndarray  # [H/8, W/8, 2] vectors into the past, pixels of the working picture
    future: np.ndarray
    anchor: int  # number of the last reference frame
    residual_from: np.ndarray | None  # its luma


@dataclass
class _Watcher:
    """Looks at every decoded frame: remembers reference frames, reads vectors of chosen ones."""

    path: Path
    anchors: list[int] = field(default_factory=list)
    seen: list[_Seen] = field(default_factory=list)
    anchor_luma: np.ndarray | None = None

    def prepare(self, stream) -> None:
        """Ask the decoder for vectors; RejectedInput for a codec that exports none."""
        from av.codec.context import Flags2

        if stream.codec_context.name not in NATIVE_CODECS:
            raise RejectedInput(
                "no_motion_vectors",
                f"{self.path} is {stream.codec_context.name}, which exports no vectors: leave out "
                "--vectors native",
            )
        stream.codec_context.flags2 |= Flags2.export_mvs

    def see(self, number: int, frame, framing: Framing, is_chosen: bool) -> None:
        """One frame in the order of showing."""
        from av.video.frame import PictureType

        if is_chosen:
            past, future = (_working_field(frame, framing, sign) for sign in (-1, 1))
            anchor = self.anchors[-1] if self.anchors else number
            intra = frame.pict_type == PictureType.I or not self.anchors
            self.seen.append(_Seen(number, intra, past, future, anchor, self.anchor_luma))
        if frame.pict_type != PictureType.B:
            self.anchors.append(number)
            self.anchor_luma = _luma(picture_of(frame, framing))


def decompose_native(
    path: Path,
    num_frames: int = 64,
    size: int = 224,
    patch_size: int = 16,
    fit: str = "crop",
    limits=None,
    salvage: bool = False,
) -> CodecClip:
    """Codec view of a video by its own vectors; arguments and errors as decompose_video, and
    `no_motion_vectors`.
    """
    watcher = _Watcher(path)
    video = decode_video(path, num_frames, size, patch_size, fit, limits, salvage, watcher)
    frames, seen = video.frames, watcher.seen[-len(video.frames) :]
    count, height, width = frames.shape[:3]
    luma = np.stack([_luma(picture) for picture in frames])
    cells = seen[0].past.shape
    motion = np.zeros((count, *cells), np.float32)
    residual = np.zeros((count, height, width), np.uint8)
    change = np.zeros((count, *cells[:2]), np.float32)
    for t in range(1, count):
        change[t] = cell_means(np.abs(luma[t].astype(np.int16) - luma[t - 1]))
        if seen[t].is_i_frame:
            continue
        gap = seen[t].number - seen[t - 1].number
        motion[t] = _velocity(seen[t], watcher.anchors) * gap
        quarters = np.clip(np.rint(4 * seen[t].past), -MAX_QUARTER_PELS, MAX_QUARTER_PELS)
        prediction = predict_luma(seen[t].residual_from, quarters.astype(np.int32), MOTION_CELL)
        residual[t] = np.abs(luma[t].astype(np.int16) - prediction).astype(np.uint8)
    is_i_frame = np.array([frame.is_i_frame or t == 0 for t, frame in enumerate(seen)])
    return CodecClip(
        frames=frames,
        is_i_frame=is_i_frame,
        motion=motion,
        residual=residual,
        change=change,
        times=frame_times(count),
        seconds=video.seconds,
        num_source_frames=video.num_source_frames,
        codec=video.codec,
        notes=(*video.notes, "native vectors"),
    )


def _velocity(seen: _Seen, anchors: list[int]) -> np.ndarray:
    """Pixels per source frame [H/8, W/8, 2], from past vectors, else from future ones."""
    later = anchors[np.searchsorted(anchors, seen.number, side="right") :][:1]
    past = -seen.past / max(seen.number - seen.anchor, 1)
    future = seen.future / max((later[0] if later else seen.number) - seen.number, 1)
    return np.where(np.any(seen.past != 0, axis=-1, keepdims=True), past, future)


def _working_field(frame, framing: Framing, sign: int) -> np.ndarray:
    """Vectors on one side of time, [H/8, W/8, 2] in pixels of the upright working picture."""
    vectors = vectors_of(frame)
    turns = round(frame.rotation / 90) % 4
    height, width = framing.height, framing.width
    if turns % 2:
        height, width = width, height
    if len(vectors):
        vectors = vectors[np.sign(vectors["source"]) == sign]
    cells = rasterise(vectors, frame.height, frame.width) / 4.0
    rows = np.arange(height) * frame.height // height // MOTION_CELL
    columns = np.arange(width) * frame.width // width // MOTION_CELL
    field_ = cells[rows[:, None], columns] * (width / frame.width, height / frame.height)
    for _ in range(turns):  # counterclockwise: right becomes up
        field_ = np.rot90(field_)
        field_ = np.stack([field_[..., 1], -field_[..., 0]], axis=-1)
    half = MOTION_CELL // 2
    cut = framing.cut(field_)
    pad = [(0, -side % MOTION_CELL) for side in cut.shape[:2]]
    return np.pad(cut, (*pad, (0, 0)), mode="edge")[half::MOTION_CELL, half::MOTION_CELL]


def _luma(picture: np.ndarray) -> np.ndarray:
    return np.rint(picture @ LUMA).astype(np.uint8)
