"""The source's own motion vectors instead of the canonical stream's, for H.264 and MPEG-4 part 2.

No second encoding, but not cheaper: 1.3 times the canonical mode on two real clips, because the
reference frames are scaled too. The vectors are what the source's encoder chose, at its frame rate
and frame size. So that clips stay comparable,

    motion    = vector / frames since its reference * frames since the frame shown before
    residual  = luma - prediction from the last reference frame

FFmpeg does not export which frame a vector refers to. A P-frame's is taken to be the I- or P-frame
before it; an older one, where the encoder used several, is an error that is noticed: streams whose
vectors predict hardly better than no vectors at all are refused. A B-frame's own vectors are not
used (direct-mode blocks export nothing): it takes those of the P-frame after it, scaled to its
share of the time. Blocks without a vector count as still, and so does the last group of an MPEG-4
stream with B-frames, for which FFmpeg exports none. I-frames are the source's own among the chosen
frames, and the first one.

Shape legend: T frames, H, W working size.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..errors import RejectedInput
from .decode import decode_video
from .decompose import (
    MOTION_CELL,
    CodecClip,
    frame_changes,
    frame_times,
    luma_difference,
    motion_cells,
    rasterise,
    residual_of,
    vectors_of,
)
from .framing import Crop, Framing, working_frame

if TYPE_CHECKING:
    import av

NATIVE_CODECS = ("h264", "mpeg4")  # of which FFmpeg exports vectors
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of RGB, ITU-R BT.601
MAX_QUARTER_PELS = 4 * 1024  # 1024 px: a longer vector points outside of any working frame
USEFUL_SHARE = 0.9  # of the plain difference: vectors that leave more explain nothing
STILL_DIFFERENCE = 1.0  # luma steps: below, there is nothing to explain


@dataclass
class _Chosen:
    """A chosen frame. `reference` is the index of the I- or P-frame before it; `vectors`
    [H/8, W/8, 2] point to that one, in working pixels."""

    index: int
    is_i_frame: bool
    reference: int
    reference_luma: np.ndarray | None
    vectors: np.ndarray | None = None


@dataclass
class VectorWatcher:
    """Sees every decoded frame: remembers reference frames, reads the vectors of P-frames."""

    remedy: ClassVar[str] = "leave out --vectors native"  # for a codec without vectors

    path: Path
    chosen: list[_Chosen] = field(default_factory=list)
    waiting: list[_Chosen] = field(default_factory=list)  # B-frames before their P-frame
    reference: int = 0
    reference_frame: "av.VideoFrame | None" = None
    # of reference_frame, computed only when a chosen frame needs it
    reference_luma: np.ndarray | None = None

    def prepare(self, stream: "av.VideoStream") -> None:
        """Begin a pass: configure the decoder to export vectors.

        Raises RejectedInput for a codec that exports none.
        """
        from av.codec.context import Flags2

        context = stream.codec_context
        if context.name not in NATIVE_CODECS:
            raise RejectedInput(
                "no_motion_vectors",
                f"{self.path} is {context.name}, which exports no vectors: {self.remedy}",
            )
        context.flags2 |= Flags2.export_mvs
        self.chosen = []
        self.waiting = []
        self.reference = 0
        self.reference_frame = None
        self.reference_luma = None

    def see_packet(self, packet: "av.Packet") -> None:
        """One packet, before it is decoded, where its timestamp is its frame's."""

    def see(self, index: int, frame: "av.VideoFrame", crop: Crop, is_chosen: bool) -> None:
        """One frame, in presentation order."""
        from av.video.frame import PictureType

        if is_chosen:
            if self.reference_luma is None and self.reference_frame is not None:
                self.reference_luma = _luma(working_frame(self.reference_frame, crop))
            chosen = _Chosen(
                index=index,
                is_i_frame=frame.pict_type == PictureType.I or self.reference_luma is None,
                reference=self.reference,
                reference_luma=self.reference_luma,
            )
            self.chosen.append(chosen)
            self.waiting.append(chosen)
        if frame.pict_type == PictureType.B:
            return
        if self.waiting:
            vectors = _working_vectors(frame, crop)
            for chosen in self.waiting:
                share = (chosen.index - self.reference) / max(index - self.reference, 1)
                chosen.vectors = vectors * share
        self.waiting = []
        self.reference = index
        self.reference_frame = frame
        self.reference_luma = None


def decompose_native(path: Path, framing: Framing) -> CodecClip:
    """Codec view of a video by its own vectors; errors as of decompose_video, and
    `no_motion_vectors`.
    """
    clip, unpredicted = decompose_watched(path, framing, watcher=VectorWatcher(path))
    _check_useful(path, residual=clip.residual, unpredicted=unpredicted)
    return clip


def decompose_watched(
    path: Path, framing: Framing, watcher: VectorWatcher
) -> tuple[CodecClip, list[float]]:
    """Codec view of a video by its own vectors, and what they have to explain: the mean difference
    of each P-frame to its reference, without any vector. The watcher sees all frames.
    """
    video = decode_video(path, framing, watcher=watcher)
    chosen = watcher.chosen
    luma = _luma(video.frames)
    count, height, width = luma.shape
    motion = np.zeros((count, *motion_cells(height, width), 2), np.float32)
    residual = np.zeros((count, height, width), np.int16)
    unpredicted: list[float] = []
    for t in range(1, count):
        frame = chosen[t]
        # no vectors: a B-frame with nothing after it
        if frame.is_i_frame or frame.vectors is None or frame.reference_luma is None:
            continue
        distance = max(frame.index - frame.reference, 1)
        since_shown = frame.index - chosen[t - 1].index
        # negated, since a vector points back to where the content was
        motion[t] = -frame.vectors / distance * since_shown
        quarter_pels = np.clip(np.rint(4 * frame.vectors), -MAX_QUARTER_PELS, MAX_QUARTER_PELS)
        residual[t] = residual_of(
            luma[t],
            reference=frame.reference_luma,
            quarter_pels=quarter_pels.astype(np.int32),
        )
        unpredicted.append(float(luma_difference(luma[t], frame.reference_luma).mean()))
    clip = CodecClip(
        frames=video.frames,
        is_i_frame=np.array([frame.is_i_frame or t == 0 for t, frame in enumerate(chosen)]),
        motion=motion,
        residual=residual,
        change=frame_changes(luma),
        times=frame_times(count),
        seconds=video.seconds,
        num_source_frames=video.num_source_frames,
        codec=video.codec,
        notes=(*video.notes, "native vectors"),
        content=video.content,
    )
    return clip, unpredicted


def _check_useful(path: Path, residual: np.ndarray, unpredicted: list[float]) -> None:
    """RejectedInput when the vectors leave as much unexplained as no vectors would."""
    if not unpredicted or np.mean(unpredicted) <= STILL_DIFFERENCE:
        return
    # the residual of I-frames is zero, so the mean over all is that of the predicted frames
    left = np.abs(residual).mean() * len(residual) / len(unpredicted)
    if left > USEFUL_SHARE * np.mean(unpredicted):
        raise RejectedInput(
            "no_motion_vectors",
            f"{path}: its vectors leave {left:.1f} of a difference of {np.mean(unpredicted):.1f} "
            "luma steps, they refer to other frames: leave out --vectors native",
        )


def _working_vectors(frame: "av.VideoFrame", crop: Crop) -> np.ndarray:
    """Vectors into the past, [H/8, W/8, 2] in pixels of the upright working frame."""
    turns = round(frame.rotation / 90) % 4
    height = crop.height
    width = crop.width
    if turns % 2:
        height, width = width, height
    cells = rasterise(vectors_of(frame), height=frame.height, width=frame.width) / 4.0
    rows = np.arange(height) * frame.height // height // MOTION_CELL
    columns = np.arange(width) * frame.width // width // MOTION_CELL
    # vectors are in pixels, so they shrink with the frame
    scale = (width / frame.width, height / frame.height)
    vectors = cells[rows[:, None], columns] * scale
    for _ in range(turns):  # counterclockwise: right becomes up
        vectors = np.rot90(vectors)
        turned_x = vectors[..., 1]
        turned_y = -vectors[..., 0]
        vectors = np.stack([turned_x, turned_y], axis=-1)
    cut = crop.cut(vectors)
    pad = [(0, -side % MOTION_CELL) for side in cut.shape[:2]]
    # each cell takes the vector of the pixel at its centre
    half = MOTION_CELL // 2
    padded = np.pad(cut, (*pad, (0, 0)), mode="edge")
    return padded[half::MOTION_CELL, half::MOTION_CELL]


def _luma(images: np.ndarray) -> np.ndarray:
    """uint8 luma [..., H, W] of RGB images [..., H, W, 3]."""
    return np.rint(images @ LUMA).astype(np.uint8)
