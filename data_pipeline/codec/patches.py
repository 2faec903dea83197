"""From a video to the patches that are selected of it, by one of several rules: the same for
packing and for the probe.

    i_frames_first    I-frames whole, then the P-frame patches of the highest saliency
    published, published_llava    as the public preparation tools choose (published_rule.py)

Rivals, to be compared with at equal tokens:

    differences       I-frames whole, then the P-frame patches that differ most from the frame
                      before, without any motion compensation
    i_frames_random   I-frames whole, then P-frame patches at random
    random            patches at random, of all frames

Random ones are drawn by the clip's own pixels, so equal clips have equal patches.
"""

import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import RejectedInput
from ..random import counter_rng
from .decompose import CodecClip, decompose_video, per_pixel
from .framing import Framing, check_choice
from .native import decompose_native
from .published_rule import (
    PUBLISHED_RULES,
    check_has_news,
    choose_published,
    decompose_published,
)
from .saliency import SaliencyConfig, block_mean, is_static, patch_saliency
from .selection import Order, Selection, select_patches, spread_mask

VECTORS = ("canonical", "native")
RANDOM_RULES = ("i_frames_random", "random")
RULES = ("i_frames_first", *PUBLISHED_RULES, "differences", *RANDOM_RULES)


@dataclass(frozen=True)
class SelectionConfig:
    """Which patches of a clip are selected. `vectors` None: as the rule needs them, the published
    ones the source's own."""

    rule: str = "i_frames_first"
    vectors: str | None = None
    order: Order = Order()
    saliency: SaliencyConfig = field(default_factory=SaliencyConfig)

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, choices=RULES)
        if self.vectors is None:
            # frozen, so that what is stored as the settings of a packing cannot change any more
            object.__setattr__(self, "vectors", "native" if self.is_published else "canonical")
        check_choice("vectors", str(self.vectors), choices=VECTORS)
        if self.is_published:
            self._check_published()
        elif self.rule != "i_frames_first" and self.saliency != SaliencyConfig():
            raise ValueError(
                f"--rule {self.rule} has no saliency: leave out what changes the score"
            )

    def _check_published(self) -> None:
        """ValueError for what the published rules do not leave open."""
        if self.vectors != "native":
            raise ValueError(
                f"--rule {self.rule} reads the source's own vectors, not --vectors {self.vectors}: "
                "leave out --vectors"
            )
        if self.saliency != SaliencyConfig() or self.order != Order():
            raise ValueError(
                f"--rule {self.rule} has a formula of its own for the score of a patch: leave out "
                "the other options on which patches are selected"
            )

    @classmethod
    def from_dict(cls, values: dict) -> "SelectionConfig":
        """The configuration that `dataclasses.asdict` made a dict of."""
        order = Order(**values["order"])
        saliency = SaliencyConfig(**values["saliency"])
        return cls(**{**values, "order": order, "saliency": saliency})

    @property
    def is_published(self) -> bool:
        """Whether frames and patches are chosen as by the public preparation tools."""
        return self.rule in PUBLISHED_RULES

    def num_whole_frames(self, num_i_frames: int) -> int:
        """Frames that are selected whole, of a clip with so many I-frames."""
        if self.rule in ("published", "random"):
            return 0
        return 1 if self.rule == "published_llava" else num_i_frames

    def whole_tokens(self, num_i_frames: int, rows: int, columns: int) -> int:
        """Patches of the frames that are selected whole, or by their share, before all others."""
        mask = spread_mask(rows, columns, share=self.order.i_frame_share)
        return self.num_whole_frames(num_i_frames) * int(mask.sum())


@dataclass(frozen=True)
class ScoredClip:
    """A clip and the scores float32 [T, h, w] of its patches; I-frames that come first have 0."""

    clip: CodecClip
    scores: np.ndarray


def decompose(path: Path, framing: Framing, gop: int, config: SelectionConfig) -> ScoredClip:
    """Decode one video and score its patches by the rule; `gop` is the number of frames from one
    I-frame of the canonical stream to the next.

    Errors as of decompose_video, and of decompose_native for the source's own vectors.
    """
    patch_size = framing.patch_size
    if config.is_published:
        clip, scores = decompose_published(path, replace(framing, by_index=True))
        return ScoredClip(clip, scores)
    if config.vectors == "native":
        clip = decompose_native(path, framing)
    else:
        clip = decompose_video(path, framing, gop=gop)
    if config.rule == "i_frames_first":
        scores = patch_saliency(clip, patch_size=patch_size, config=config.saliency)
    elif config.rule == "differences":
        scores = patch_differences(clip, patch_size)
    else:
        scores = random_scores(clip, patch_size)
    return ScoredClip(clip, scores)


def choose_patches(
    scored: ScoredClip, name: str, budget: int, config: SelectionConfig
) -> Selection:
    """At most `budget` patches of a clip.

    Raises RejectedInput, with the clip's `name`, where the budget cannot hold the frames that are
    selected whole, or nothing can be selected.
    """
    clip = scored.clip
    scores = scored.scores
    _, rows, columns = scores.shape
    # more than the configuration can check: with fit "area" a frame is no square, and native
    # vectors come with the I-frames of the source
    whole = config.whole_tokens(int(clip.is_i_frame.sum()), rows=rows, columns=columns)
    if whole > budget:
        raise RejectedInput(
            "budget", f"{name}: its I-frames are {whole} patches, the budget is {budget}"
        )
    if config.is_published:
        if config.rule == "published":
            check_has_news(Path(name), clip)
        return choose_published(
            clip,
            scores,
            budget=budget,
            whole_first_frame=config.rule == "published_llava",
        )
    is_first = clip.is_i_frame
    if config.rule == "random":
        is_first = np.zeros_like(is_first)
    return select_patches(
        scores,
        is_i_frame=is_first,
        budget=budget,
        order=config.order,
        is_static=config.rule not in RANDOM_RULES and is_static(clip),
        is_content=clip.whole_patches(clip.frames.shape[1] // rows),
    )


def patch_differences(clip: CodecClip, patch_size: int) -> np.ndarray:
    """Mean |luma - luma of the frame before| float32 [T, h, w] of each patch; 0 on I-frames."""
    height, width = clip.frames.shape[1:3]
    change = per_pixel(clip.change, height=height, width=width)
    differences = block_mean(change, patch_size)
    differences[clip.is_i_frame] = 0
    return differences


def random_scores(clip: CodecClip, patch_size: int) -> np.ndarray:
    """Uniform numbers float32 [T, h, w], more than 0, drawn by the clip's own pixels."""
    count, height, width, _ = clip.frames.shape
    rng = counter_rng(0, "random patches", zlib.crc32(clip.frames))
    shape = (count, height // patch_size, width // patch_size)
    return 1 - rng.random(shape, np.float32)
