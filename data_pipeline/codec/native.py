"""The source's own motion vectors instead of the canonical stream's, for H.264 and MPEG-4 part 2.

No second encoding, but not cheaper: 1.3 times the canonical mode on two real clips, because of the
reference frames' pictures. The vectors are what the source's encoder chose, at its frame rate, in
its picture. So that clips stay comparable,

    motion    = vector / frames since its reference * frames since the frame shown before
    residual  = |luma - prediction from the last reference frame|

FFmpeg does not say which frame a vector refers to. A P-frame's is taken to be the I- or P-frame
before it; an older one, where the encoder used several, is an error that shows: streams whose
vectors predict hardly better than no vectors at all are refused. A B-frame's own vectors are not
used (direct-mode blocks export nothing): it lies on the way of the P-frame after it, whose vectors
are cut to its share of the time. Blocks without a vector stand still, and so does the last group of
an MPEG-4 stream with B-frames, for which FFmpeg exports none. I-frames are the source's own among
the chosen frames, and the first one.

Shape legend: T frames, H, W working size.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RejectedInput
from .decode import decode_video
from .decompose import MOTION_CELL, CodecClip, cell_means, frame_times, rasterise, vectors_of
from .framing import Framing, picture_of
from .motion_compensation import predict_luma

NATIVE_CODECS = ("h264", "mpeg4")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
MAX_QUARTER_PELS = 4 * 1024
USEFUL_SHARE = 0.9  # of the plain difference: vectors that leave more explain nothing
STILL_DIFFERENCE = 1.0  # luma steps: below, there is nothing to explain


@dataclass
class _Seen:
    """A chosen frame as it passed by."""

    number: int
    is_i_frame: bool
    reference: int  # number of the I- or P-frame before
    reference_luma: np.ndarray | None
    vectors: np.ndarray | None = None  # [H/8, W/8, 2] to the reference, in working pixels


@dataclass
class _Watcher:
    """Looks at every decoded frame: remembers reference frames, reads the vectors of P-frames."""

    path: Path
    seen: list[_Seen] = field(default_factory=list)
    waiting: list[_Seen] = field(default_factory=list)  # B-frames before their P-frame
    anchor: int = 0
    anchor_frame: Any = None
    anchor_luma: np.ndarray | None = None  # of anchor_frame, made when a chosen frame asks for it

    def prepare(self, stream) -> None:
        """Begin a pass: ask the decoder for vectors.

        Raises RejectedInput for a codec that exports none.
        """
        from av.codec.context import Flags2

        if stream.codec_context.name not in NATIVE_CODECS:
            raise RejectedInput(
                "no_motion_vectors",
                f"{self.path} is {stream.codec_context.name}, which exports no vectors: leave out "
                "--vectors native",
            )
        stream.codec_context.flags2 |= Flags2.export_mvs
        self.seen = []
        self.waiting = []
        self.anchor = 0
        self.anchor_frame = self.anchor_luma = None

    def see(self, number: int, frame, framing: Framing, is_chosen: bool) -> None:
        """One frame in the order of showing."""
        from av.video.frame import PictureType

        if is_chosen:
            if self.anchor_luma is None and self.anchor_frame is not None:
                self.anchor_luma = _luma(picture_of(self.anchor_frame, framing))
            intra = frame.pict_type == PictureType.I or self.anchor_luma is None
            chosen = _Seen(number, intra, self.anchor, self.anchor_luma)
            self.seen.append(chosen)
            self.waiting.append(chosen)
        if frame.pict_type == PictureType.B:
            return
        if self.waiting:
            vectors = _working_field(frame, framing)
            for chosen in self.waiting:
                share = (chosen.number - self.anchor) / max(number - self.anchor, 1)
                chosen.vectors = vectors * share
        self.waiting = []
        self.anchor = number
        self.anchor_frame = frame
        self.anchor_luma = None


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
    video = decode_video(
        path,
        num_frames=num_frames,
        size=size,
        patch_size=patch_size,
        fit=fit,
        limits=limits,
        salvage=salvage,
        watcher=watcher,
    )
    frames = video.frames
    seen = watcher.seen
    count, height, width = frames.shape[:3]
    luma = np.stack([_luma(picture) for picture in frames])
    cells = -(-height // MOTION_CELL), -(-width // MOTION_CELL)
    motion = np.zeros((count, *cells, 2), np.float32)
    residual = np.zeros((count, height, width), np.uint8)
    change = np.zeros((count, *cells), np.float32)
    plain = []  # mean difference of each P-frame to its reference, without any vector
    for t in range(1, count):
        change[t] = cell_means(np.abs(luma[t].astype(np.int16) - luma[t - 1]))
        if seen[t].is_i_frame or seen[t].vectors is None:  # none: a B-frame with nothing after it
            continue
        distance = max(seen[t].number - seen[t].reference, 1)
        motion[t] = -seen[t].vectors / distance * (seen[t].number - seen[t - 1].number)
        quarters = np.clip(np.rint(4 * seen[t].vectors), -MAX_QUARTER_PELS, MAX_QUARTER_PELS)
        prediction = predict_luma(seen[t].reference_luma, quarters.astype(np.int32), MOTION_CELL)
        residual[t] = np.abs(luma[t].astype(np.int16) - prediction).astype(np.uint8)
        plain.append(np.abs(luma[t].astype(np.int16) - seen[t].reference_luma).mean())
    _check_useful(path, residual, plain)
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


def _check_useful(path: Path, residual: np.ndarray, plain: list[float]) -> None:
    """RejectedInput when the vectors leave as much unexplained as no vectors would."""
    if not plain or np.mean(plain) <= STILL_DIFFERENCE:
        return
    left = residual.mean() * len(residual) / len(plain)
    if left > USEFUL_SHARE * np.mean(plain):
        raise RejectedInput(
            "no_motion_vectors",
            f"{path}: its vectors leave {left:.1f} of a difference of {np.mean(plain):.1f} luma "
            "steps, they refer to other frames: leave out --vectors native",
        )


def _working_field(frame, framing: Framing) -> np.ndarray:
    """Vectors into the past, [H/8, W/8, 2] in pixels of the upright working picture."""
    vectors = vectors_of(frame)
    turns = round(frame.rotation / 90) % 4
    height, width = framing.height, framing.width
    if turns % 2:
        height, width = width, height
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
