"""Every random choice about a sample, and how many tokens it leads to, before anything is read.

    views      codec, frame or collage by ratio; images are images
    tokens     exact length of the item, so that packs can be planned
    draws      uniform numbers for flip, colours and frames
    labels     which of a sample's labels are drawn

All depend on (seed, epoch, sample id) and never on the place in a batch, the rank or the worker.
Vectorised over samples: 0.1 microseconds a sample for view and tokens, 3 for the draws.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..random import counter_uniform
from ..shards.schema import TIME_BASE
from .table import SampleTable

VIEWS = ("codec", "frame", "collage", "image")
CODEC, FRAME, COLLAGE, IMAGE = range(4)
MAX_FRAMES = TIME_BASE  # no clip stores more


@dataclass(frozen=True)
class ViewConfig:
    """How samples are looked at.

    The rest of the two ratios is collage. `max_tokens` bounds every item, `max_frames` the whole
    frames of a clip; `scale` shrinks frames and pictures (0.5: a quarter of the tokens; the codec
    view, whose patches are stored, follows `max_tokens` alone). `flip` is the probability of a
    mirrored item, `colour_jitter` the strength of views.jitter_colours.
    """

    codec_ratio: float = 0.4
    frame_ratio: float = 0.4
    max_tokens: int = 2048
    max_frames: int = 8
    scale: float = 1.0
    flip: float = 0.0
    colour_jitter: float = 0.0

    def __post_init__(self):
        if not 0 <= self.colour_jitter < 1:
            raise ValueError(f"colour_jitter {self.colour_jitter} must lie in [0, 1)")
        if not 0 <= self.flip <= 1 or not 0 < self.scale <= 1:
            raise ValueError(f"flip {self.flip} must lie in [0, 1], scale {self.scale} in (0, 1]")
        if (
            min(self.codec_ratio, self.frame_ratio) < 0
            or self.codec_ratio + self.frame_ratio > 1 + 1e-9
        ):
            raise ValueError(
                f"--residual_ratio {self.codec_ratio} and --frame_sampling_ratio "
                f"{self.frame_ratio} must not be "
                "negative nor exceed 1 together (the rest is collage)"
            )
        if self.max_tokens < 1 or not 1 <= self.max_frames <= MAX_FRAMES:
            raise ValueError(
                f"--target_num {self.max_tokens} must be positive, --num_frames {self.max_frames} "
                f"in 1..{MAX_FRAMES}"
            )


@dataclass(frozen=True)
class Stage:
    """Part of a progressive schedule: from the share `start` of the run on, these bounds replace
    the view's."""

    start: float
    max_tokens: int
    max_frames: int
    scale: float = 1.0

    def of(self, view: ViewConfig) -> ViewConfig:
        """The view in this stage."""
        bounds = {"max_tokens": self.max_tokens, "max_frames": self.max_frames, "scale": self.scale}
        return replace(view, **bounds)


def choose_views(table: SampleTable, view: ViewConfig, seed: int, epoch: int, ids) -> np.ndarray:
    """Index into VIEWS of each sample, int64 [n]."""
    draw = counter_uniform(torch.from_numpy(ids), seed, "view", epoch).numpy()
    chosen = np.searchsorted([view.codec_ratio, view.codec_ratio + view.frame_ratio], draw, "right")
    return np.where(table.is_image[ids], IMAGE, chosen)


def num_tokens(table: SampleTable, view: ViewConfig, views: np.ndarray, ids) -> np.ndarray:
    """Tokens of each sample under its view, int64 [n]."""
    rows, columns = table.scaled_grid(ids, view.scale)
    whole = rows * columns
    frames = num_frames(whole, table.num_frames[ids], view)
    counts = [np.minimum(table.num_patches[ids], view.max_tokens), frames * whole, frames * whole]
    return np.select([views == CODEC, views == FRAME, views == COLLAGE], counts, whole)


def num_frames(frame_tokens, num_stored, view: ViewConfig):
    """Whole frames that fit max_tokens and max_frames, at least one."""
    fitting = np.minimum(view.max_frames, view.max_tokens // frame_tokens)
    return np.maximum(1, np.minimum(fitting, num_stored))


def longest_item(table: SampleTable, view: ViewConfig) -> tuple[int, int]:
    """(sample id, tokens) of the longest item of the dataset under any view that may be chosen."""
    lengths = np.max(_possible_lengths(table, view), axis=0)
    worst = int(lengths.argmax())
    return worst, int(lengths[worst])


def shortest_item(table: SampleTable, view: ViewConfig) -> int:
    """Tokens of the shortest item of the dataset under any view that may be chosen."""
    return int(np.min(_possible_lengths(table, view)))


def _possible_lengths(table: SampleTable, view: ViewConfig) -> np.ndarray:
    """Tokens of every sample under each view of a ratio above 0, int64 [views, N]."""
    ratios = (view.codec_ratio, view.frame_ratio, 1 - view.codec_ratio - view.frame_ratio)
    ids = np.arange(len(table.rows))
    return np.stack(
        [
            num_tokens(table, view, np.where(table.is_image, IMAGE, chosen), ids)
            for chosen, ratio in zip((CODEC, FRAME, COLLAGE), ratios, strict=True)
            if ratio > 1e-9
        ]
    )


def draws(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """Uniform numbers of each sample, float32 [n, 16 + MAX_FRAMES]: flip, colours, then frames."""
    width = 16 + MAX_FRAMES
    words = torch.from_numpy(ids)[:, None] * width + torch.arange(width)
    return counter_uniform(words, seed, "pixels", epoch).numpy()


def choose_labels(labels: np.ndarray, count: int, seed: int, epoch: int, ids) -> np.ndarray:
    """int64 [n, count] of labels [n, L]: drawn without replacement among those that are not -1, in
    their order; -1 where there are fewer.
    """
    labels = labels.astype(np.int64)
    if count >= labels.shape[1]:
        return labels
    words = torch.from_numpy(ids)[:, None] * labels.shape[1] + torch.arange(labels.shape[1])
    keys = counter_uniform(words, seed, "labels", epoch).numpy() + (labels < 0)
    picks = np.sort(np.argsort(keys, axis=1, kind="stable")[:, :count], axis=1)
    return np.take_along_axis(labels, picks, axis=1)
