"""Selection as the published preparation tools do it, from the source's own vectors: for comparing
with published results, and for the inputs that published multimodal models were trained on.

    frames      at linspace(0, n - 1, T), truncated: even indices, whatever their times
    motion      |v - median v|, v the vectors into the past as coded, in pixels: not scaled by the
                distance of the reference, B-frames' own ones, zero where a block has none
    residual    |luma - prediction|, an estimate of the coded residual, which FFmpeg does not export
    map         mean of both, each divided by its own 95th percentile over the frame's pixels and
                clipped to 1, without floors
    score       sum of the map over a patch, after it was scaled to the working frame

I-frames have no score. `published` takes the best patches of the clip and none of an I-frame
(encoder training); `published_llava` takes the first frame whole, then the best of all others.
Patches that touch padding are no candidates.

The prediction follows H.264: from the nearest frame in the direction that FFmpeg names which was
decoded before and may be predicted from, that is an I- or P-frame, or a B-frame that MP4 and
Matroska files mark as a reference. Where FFmpeg names both directions it is predicted from both,
weighted by their distances where that explains the frame better (implicit weighting, ITU-T H.264
8.4.2.3.1), or from one where that explains the cell better. A block without any vector is an intra
block, whose residual no vector tells: it counts as zero. How near all this comes to what the public
tool chose:
benchmarks/results/published_rule_cpu2_2026-12-01.md.

Memory: MAX_REFERENCES frames of the source, whose luma is copied when it is needed, and at most
MAX_WAITING more planes of luma with their references', whatever its length.
Shape legend: T frames, H, W source or working size, h, w patch grid, Y, X motion cells.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..errors import RejectedInput
from .decompose import (
    MOTION_CELL,
    CodecClip,
    cell_means,
    luma_difference,
    rasterise,
    vectors_of,
)
from .frames import is_reference
from .framing import Crop, Framing
from .motion_compensation import predict_luma
from .native import VectorWatcher, decompose_watched
from .selection import Selection

if TYPE_CHECKING:
    import av

PUBLISHED_RULES = ("published", "published_llava")
PERCENTILE = 95  # taken for full scale, as published
PAST = -1  # FFmpeg's names of the two directions
FUTURE = 1
# Chosen B-frames that may wait for the frame that they are predicted from: as many as an H.264
# decoder can reorder. More of them are predicted from the past alone.
MAX_WAITING = 16
# Shown references among which the last one decoded before a frame is found: B-frames that are
# references themselves are decoded after the P-frame behind them, in pyramids of some levels.
MAX_REFERENCES = 4
# Luma steps. The loop filter smooths a block after its residual was added, mostly by one step, so
# that a block without any residual is not exactly its prediction.
LOOP_FILTER_STEP = 1
POC_OF_FRAME = 2  # H.264 counts two fields of each frame


@dataclass
class _Reference:
    """A frame that others are predicted from, its index and its rank in decoding order (None where
    the packets do not show it); its luma is read only when it is needed."""

    index: int
    rank: int | None
    frame: "av.VideoFrame"

    @cached_property
    def luma(self) -> np.ndarray:
        """uint8 [H, W]."""
        return source_luma(self.frame)

    def is_known_to(self, rank: int | None) -> bool:
        """Whether it is decoded before the frame of this rank."""
        return self.rank is None or rank is None or self.rank < rank


@dataclass
class _Scored:
    """A chosen frame before its score: `luma` uint8 [H, W], vectors int32 [Y, X, 2] in quarter
    pixels and masks bool [Y, X] of the cells that have one, by direction; the reference before it,
    and quarter turns until it is upright."""

    slot: int
    index: int
    rank: int | None
    luma: np.ndarray
    vectors: dict[int, np.ndarray]
    masks: dict[int, np.ndarray]
    past: _Reference
    turns: int
    crop: Crop


@dataclass
class PublishedWatcher(VectorWatcher):
    """Scores the patches of the chosen frames while they are decoded, float32 [h, w] each.

    What the native mode knows of the frames is kept besides, for the sample's motion summary.
    """

    remedy: ClassVar[str] = "choose --rule i_frames_first"

    patch_size: int = 16
    scores: dict[int, np.ndarray] = field(default_factory=dict)  # by index among the chosen frames
    undecided: list[_Scored] = field(default_factory=list)  # B-frames before their second reference
    references: list[_Reference] = field(default_factory=list)  # the last ones shown, oldest first
    # by timestamp, of packets whose frames are not shown yet: rank, and whether it is a reference
    packets: dict[int, tuple[int, bool]] = field(default_factory=dict)
    num_packets: int = 0
    stream: "av.VideoStream | None" = None

    def prepare(self, stream: "av.VideoStream") -> None:
        """Begin a pass; errors as of the native mode."""
        super().prepare(stream)
        self.scores = {}
        self.undecided = []
        self.references = []
        self.packets = {}
        self.num_packets = 0
        self.stream = stream

    def see_packet(self, packet: "av.Packet") -> None:
        """One packet in decoding order."""
        if packet.pts is not None and self.stream is not None:
            self.packets[packet.pts] = (self.num_packets, is_reference(self.stream, packet))
            self.num_packets += 1

    def see(self, index: int, frame: "av.VideoFrame", crop: Crop, is_chosen: bool) -> None:
        """One frame, in presentation order."""
        from av.video.frame import PictureType

        super().see(index, frame, crop=crop, is_chosen=is_chosen)
        is_b_frame = frame.pict_type == PictureType.B
        rank = None
        predicts_others = not is_b_frame
        if frame.pts in self.packets:
            rank, predicts_others = self.packets.pop(frame.pts)
        reference = _Reference(index, rank=rank, frame=frame)
        if predicts_others:
            self._decide(reference)
        if is_chosen and self.references and frame.pict_type != PictureType.I:
            scored = self._unscored(reference, crop=crop)
            is_forward = not scored.masks[FUTURE].any()
            if is_forward or len(self.undecided) == MAX_WAITING:
                self._score(scored)
            else:
                self.undecided.append(scored)
        if predicts_others:
            self.references = [*self.references[1 - MAX_REFERENCES :], reference]

    def _decide(self, future: _Reference) -> None:
        """Score the frames that were waiting for this reference."""
        undecided = self.undecided
        self.undecided = []
        for scored in undecided:
            if future.is_known_to(scored.rank):
                self._score(scored, future=future)
            else:
                self.undecided.append(scored)

    def clip_scores(self, clip: CodecClip) -> np.ndarray:
        """Scores float32 [T, h, w] of the frames of a clip; those of I-frames are 0."""
        for scored in self.undecided:  # B-frames at the very end
            self._score(scored)
        self.undecided = []
        count, height, width, _ = clip.frames.shape
        grid = (height // self.patch_size, width // self.patch_size)
        scores = np.zeros((count, *grid), np.float32)
        for slot, of_frame in self.scores.items():
            scores[slot] = of_frame
        return scores

    def _unscored(self, reference: _Reference, crop: Crop) -> _Scored:
        """A chosen frame with what its score needs, except a frame that is still to come."""
        frame = reference.frame
        vectors = {}
        masks = {}
        for direction in (PAST, FUTURE):
            vectors[direction], masks[direction] = directed_vectors(frame, direction)
        known = [past for past in self.references if past.is_known_to(reference.rank)]
        return _Scored(
            slot=len(self.chosen) - 1,
            index=reference.index,
            rank=reference.rank,
            luma=reference.luma,
            vectors=vectors,
            masks=masks,
            past=known[-1] if known else self.references[0],
            turns=round(frame.rotation / 90) % 4,
            crop=crop,
        )

    def _score(self, scored: _Scored, future: _Reference | None = None) -> None:
        luma = scored.luma
        height, width = luma.shape
        masks = scored.masks
        past = scored.past
        prediction = predict_luma(past.luma, scored.vectors[PAST], cell=MOTION_CELL)
        is_predicted = masks[PAST]
        if future is not None:
            prediction = predict_from_both(
                luma,
                past=prediction,
                future=predict_luma(future.luma, scored.vectors[FUTURE], cell=MOTION_CELL),
                masks=(masks[PAST], masks[FUTURE]),
                share=(scored.index - past.index, future.index - past.index),
            )
            is_predicted = masks[PAST] | masks[FUTURE]
        residual = luma_difference(luma, prediction)
        has_residual = _pixels(is_predicted, height=height, width=width)
        residual[~has_residual | (residual <= LOOP_FILTER_STEP)] = 0
        speed = _pixels(compensated_speed(scored.vectors[PAST]), height=height, width=width)
        news = np.rot90(pixel_scores(speed, residual), k=scored.turns)
        working = scored.crop.scale(np.ascontiguousarray(news))
        self.scores[scored.slot] = patch_sums(working, self.patch_size)


def decompose_published(path: Path, framing: Framing) -> tuple[CodecClip, np.ndarray]:
    """The clip of a video by its own vectors, and the scores float32 [T, h, w] of its patches.

    Errors as of decompose_native, but vectors that explain nothing are taken as they are.
    `framing` should ask for frames by index, as published.
    """
    watcher = PublishedWatcher(path, patch_size=framing.patch_size)
    clip, _ = decompose_watched(path, framing, watcher=watcher)
    return clip, watcher.clip_scores(clip)


def choose_published(
    clip: CodecClip, scores: np.ndarray, budget: int, whole_first_frame: bool
) -> Selection:
    """At most `budget` patches: the highest scores [T, h, w], ties by position.

    With `whole_first_frame` all patches of frame 0 come first, and other I-frames may give theirs
    when nothing better is left; without it no I-frame patch is taken at all.
    """
    count, rows, columns = scores.shape
    patch_size = clip.frames.shape[1] // rows
    is_candidate = np.broadcast_to(clip.whole_patches(patch_size), scores.shape).copy()
    if whole_first_frame:
        is_candidate[0] = False
        first = np.arange(rows * columns)
    else:
        is_candidate[clip.is_i_frame] = False
        first = np.zeros(0, int)
    candidates = np.flatnonzero(is_candidate)
    ranked = scores.reshape(-1)[candidates]
    order = np.argsort(-ranked, kind="stable")  # stable: equal scores stay in order of position
    selected = np.concatenate([first, candidates[order]])[:budget]
    # stored as means over the patch, 0 to 1; the first frame gets the highest score
    means = np.concatenate([np.ones(len(first)), ranked[order] / patch_size**2])[:budget]
    positions = np.stack(np.unravel_index(selected, scores.shape), axis=-1)
    return Selection(
        positions=positions.astype(np.uint16),
        scores=means.astype(np.float16),
        is_static=False,
    )


def check_has_news(path: Path, clip: CodecClip) -> None:
    """RejectedInput for a clip of I-frames only, of which `published` takes nothing."""
    if clip.is_i_frame.all():
        raise RejectedInput(
            "no_motion_vectors",
            f"{path}: all chosen frames are I-frames, which --rule published does not take: pack "
            "it with --rule i_frames_first",
        )


def pixel_scores(speed: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Mean float32 [H, W] of both fields, each on its own scale of the frame."""
    return (_scaled(speed) + _scaled(residual)) / 2


def _scaled(values: np.ndarray) -> np.ndarray:
    """Values float32 [H, W] in 0..1, 1 being their 95th percentile; where that is 0, all that is
    more than 0 is 1."""
    full = np.float32(np.percentile(values, PERCENTILE))
    if full == 0:
        return (values > 0).astype(np.float32)
    return np.minimum(values.astype(np.float32) / full, 1)


def compensated_speed(vectors: np.ndarray) -> np.ndarray:
    """|v - median v| float32 [Y, X] in pixels of vectors [Y, X, 2] in quarter pixels."""
    pixels = vectors.astype(np.float32) / 4
    return np.linalg.norm(pixels - np.median(pixels, axis=(0, 1)), axis=-1)


def predict_from_both(
    luma: np.ndarray,
    past: np.ndarray,
    future: np.ndarray,
    masks: tuple[np.ndarray, np.ndarray],
    share: tuple[int, int],
) -> np.ndarray:
    """Prediction int16 [H, W] of a B-frame from its two predictions [H, W].

    masks   cells [Y, X] that have a vector into the past, and into the future
    share   frames from the past reference to this frame, and to the future reference
    """
    height, width = luma.shape
    mean = (past + future + 1) >> 1
    since_past, between = share
    weight = implicit_weight(since_past, between)
    weighted = (past.astype(np.int32) * (64 - weight) + future.astype(np.int32) * weight + 32) >> 6
    choices = [past, future, mean, weighted.astype(np.int16)]
    errors = [cell_means(luma_difference(luma, choice)) for choice in choices]
    named_both = masks[0] & masks[1]
    # Which of the two means the stream uses stands in its headers, which FFmpeg does not export.
    # The wrong one leaves a multiple: 0.5 luma steps instead of 0.002 where nothing else is coded.
    left = [np.minimum.reduce([*errors[:2], both])[named_both].sum() for both in errors[2:]]
    used = 2 if left[0] <= left[1] else 3
    # FFmpeg names the directions of a macroblock for all of its parts, though one part may be
    # predicted from the past and another from the future: a cell takes what explains it best.
    best = np.argmin([errors[0], errors[1], errors[used]], axis=0)
    chosen = np.where(named_both, best, masks[1])
    of_pixel = _pixels(chosen, height=height, width=width)
    return np.choose(of_pixel, [past, future, choices[used]])


def implicit_weight(since_past: int, between: int) -> int:
    """Weight of the future reference in 64ths, by the distances in frames: ITU-T H.264 8.4.2.3.1
    and 8.4.1.2.3."""
    distance = np.clip(POC_OF_FRAME * between, 1, 127)
    part = np.clip(POC_OF_FRAME * since_past, -128, 127)
    inverse = (16384 + distance // 2) // distance
    return int((part * inverse + 32) >> 6) >> 2


def directed_vectors(frame: "av.VideoFrame", direction: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors int32 [Y, X, 2] of a frame into one direction, in quarter pixels, and the mask bool
    [Y, X] of the cells that have one."""
    vectors = vectors_of(frame)
    if len(vectors):
        vectors = vectors[vectors["source"] == direction]
    field_of_vectors = rasterise(vectors, height=frame.height, width=frame.width)
    # the same blocks with a known vector show where there are any
    marks = vectors.copy()
    if len(marks):
        marks["motion_x"] = 1
        marks["motion_scale"] = 4
    mask = rasterise(marks, height=frame.height, width=frame.width)[..., 0] == 1
    return field_of_vectors, mask


def source_luma(frame: "av.VideoFrame") -> np.ndarray:
    """Luma uint8 [H, W] of a decoded frame, as it is stored; deeper samples lose their low bits."""
    bits = frame.format.components[0].bits
    plane = frame.planes[0]
    # copies below: the decoder writes the next frame into this memory
    if bits == 8:
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
        return rows[:, : frame.width].copy()
    deep = np.frombuffer(plane, np.uint16).reshape(plane.height, -1)
    return (deep[:, : frame.width] >> (bits - 8)).astype(np.uint8)


def patch_sums(values: np.ndarray, patch_size: int) -> np.ndarray:
    """Sums float32 [h, w] of a map [H, W] over the patches."""
    height, width = values.shape
    rows = height // patch_size
    columns = width // patch_size
    grid = values.reshape(rows, patch_size, columns, patch_size)
    return grid.sum(axis=(1, 3), dtype=np.float32)


def _pixels(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """A field on motion cells [Y, X] at every pixel [H, W]."""
    rows = np.repeat(cells, MOTION_CELL, axis=0)[:height]
    return np.repeat(rows, MOTION_CELL, axis=1)[:, :width]
