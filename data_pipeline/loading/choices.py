"""Every random choice about a sample, and how many tokens it leads to, before anything is read.

    table      kind, grid and stored patches and frames of every sample, from the manifest
    views      codec, frame or collage by ratio; images are images
    tokens     exact length of the item, so that packs can be planned
    draws      uniform numbers for flip, colours and frames
    labels     which of a sample's labels are drawn

All depend on (seed, epoch, sample id) and never on the index in a batch, the rank or the worker.
Vectorised over samples: 0.1 microseconds a sample for view and tokens, 3 for the draws.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..datasets import Dataset
from ..errors import CorruptShard, MissingData
from ..random import counter_uniform
from ..shards.manifest import Manifest, how_to_repack
from ..shards.schema import MAX_PATCHES
from .config import MAX_FRAMES, StreamConfig, ViewConfig

VIEWS = ("codec", "frame", "collage", "image")
CODEC, FRAME, COLLAGE, IMAGE = range(4)
# Columns of the draws: one for the flip, nine for colours (views.jitter_colours), the rest of the
# sixteen unused, then one for each whole frame.
FLIP_DRAW = 0
COLOUR_DRAWS = slice(1, 10)
FIRST_FRAME_DRAW = 16
_ABSENT = 1e-9  # smaller ratios count as 0: 1 - 0.7 - 0.3 is 5.6e-17, not 0
ESTIMATED_FROM = 10_000  # samples; a choice, far more than a mean needs


@dataclass(frozen=True)
class SampleTable:
    """What the plan must know of every sample without reading it, 17 bytes a sample.

    Columns over sample ids: is_image bool, and int32 patch rows and columns of one frame, selected
    patches, stored whole frames.
    """

    is_image: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    num_patches: np.ndarray
    num_frames: np.ndarray

    @classmethod
    def of(cls, manifest: Manifest) -> "SampleTable":
        """Read off the shards' records; CorruptShard for records of an older writer."""
        if not len(manifest):
            raise MissingData(f"{manifest.directory} holds no sample: see `stats` on it")
        # no pairs in between: new objects by the hundred thousand wake the garbage collector
        records = [
            _checked_record(sample, shard=shard, manifest=manifest)
            for shard in manifest.shards
            for sample in shard["samples"]
        ]
        kinds = (sample["kind"] for shard in manifest.shards for sample in shard["samples"])
        rows, columns, num_patches, num_frames = np.array(records, np.int32).T
        return cls(
            is_image=np.fromiter((kind == "image" for kind in kinds), bool, len(manifest)),
            rows=rows,
            columns=columns,
            num_patches=num_patches,
            num_frames=num_frames,
        )

    def frame_tokens(self, ids: np.ndarray | slice | int, scale: float) -> np.ndarray:
        """Tokens of one frame of samples after shrinking, int64."""
        rows, columns = scaled_grid(self.rows[ids], columns=self.columns[ids], scale=scale)
        return rows * columns


def _checked_record(sample: dict, shard: dict, manifest: Manifest) -> tuple[int, int, int, int]:
    """(rows, columns, patches, stored frames) of a sample's record."""
    try:
        rows, columns = sample["grid"]
        numbers = (rows, columns, sample["num_patches"], sample["num_stored_frames"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptShard(
            f"{manifest.directory}: the record of {sample.get('source')} lacks {error}; an older "
            f"version wrote it; {how_to_repack(shard['name'])}"
        ) from error
    if not all(type(number) is int and 0 < number < MAX_PATCHES for number in numbers):
        raise CorruptShard(
            f"{manifest.directory}: the record of {sample['source']} says grid {rows}x{columns}, "
            f"{numbers[2]} patches, {numbers[3]} frames: no sample is like that; "
            f"{how_to_repack(shard['name'])}"
        )
    return numbers


def scaled_grid(
    rows: np.ndarray | int, columns: np.ndarray | int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Patch rows and columns of a frame after shrinking to whole patches, at least one."""
    return _scaled(rows, scale), _scaled(columns, scale)


def _scaled(side: np.ndarray | int, scale: float) -> np.ndarray:
    # halves are rounded up; np.rint would round them to even
    rounded = np.floor(np.asarray(side) * scale + 0.5)
    return np.maximum(rounded.astype(np.int64), 1)


def choose_views(
    table: SampleTable, view: ViewConfig, seed: int, epoch: int, ids: np.ndarray
) -> np.ndarray:
    """Index into VIEWS of each sample, int64 [n]."""
    draw = counter_uniform(torch.from_numpy(ids), seed, "view", epoch).numpy()
    bounds = [view.codec_ratio, view.codec_ratio + view.frame_ratio]
    chosen = np.searchsorted(bounds, draw, side="right")
    return np.where(table.is_image[ids], IMAGE, chosen)


def num_tokens(
    table: SampleTable, view: ViewConfig, views: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """Tokens of each sample under its view, int64 [n]."""
    per_frame = table.frame_tokens(ids, view.scale)
    stored = table.num_frames[ids]
    frames = num_frames(per_frame, num_stored=stored, view=view)
    of_frames = per_frame * (frames // view.frames_per_token)
    # any prefix of the stored patches is an item, so the bound cuts it anywhere
    of_patches = np.minimum(table.num_patches[ids], view.max_tokens)
    of_clips = np.where(views == CODEC, of_patches, of_frames)
    return np.where(views == IMAGE, per_frame, of_clips)


def num_frames(
    frame_tokens: np.ndarray, num_stored: np.ndarray | int, view: ViewConfig
) -> np.ndarray:
    """Whole frames that fit max_tokens and max_frames, at least one. Tubes are whole: frames beyond
    the last whole one are left out, and a clip with too few frames for one repeats some of them.
    """
    size = view.frames_per_token
    fitting = np.minimum(view.max_frames, size * (view.max_tokens // frame_tokens))
    whole = np.minimum(fitting, num_stored) // size * size
    return np.maximum(size, whole)


def possible_lengths(table: SampleTable, view: ViewConfig) -> np.ndarray:
    """Tokens of every sample under each view of a ratio above 0, int64 [views, N]."""
    ratios = {
        CODEC: view.codec_ratio,
        FRAME: view.frame_ratio,
        COLLAGE: 1 - view.codec_ratio - view.frame_ratio,
    }
    ids = np.arange(len(table.rows))
    lengths = []
    for chosen, ratio in ratios.items():
        if ratio > _ABSENT:
            views = np.where(table.is_image, IMAGE, chosen)
            lengths.append(num_tokens(table, view=view, views=views, ids=ids))
    return np.stack(lengths)


def draws(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """Uniform numbers of each sample, float32 [n, FIRST_FRAME_DRAW + MAX_FRAMES]."""
    words = _words(ids, FIRST_FRAME_DRAW + MAX_FRAMES)
    return counter_uniform(words, seed, "pixels", epoch).numpy()


def _words(ids: np.ndarray, width: int) -> torch.Tensor:
    """`width` numbers of each id that no other id has, int64 [n, width]."""
    return torch.from_numpy(ids)[:, None] * width + torch.arange(width)


def choose_labels(
    labels: np.ndarray, count: int, seed: int, epoch: int, ids: np.ndarray
) -> np.ndarray:
    """int64 [n, count] of labels [n, L]: drawn without replacement among those that are not -1, in
    their order; -1 where there are fewer.
    """
    labels = labels.astype(np.int64)
    width = labels.shape[1]
    if count >= width:
        return labels
    # the labels of the smallest keys are drawn; absent ones have keys above 1, so they come last
    words = _words(ids, width)
    keys = counter_uniform(words, seed, "labels", epoch).numpy() + (labels < 0)
    smallest = np.argsort(keys, axis=1, kind="stable")[:, :count]
    picks = np.sort(smallest, axis=1)
    return np.take_along_axis(labels, picks, axis=1)


def samples_per_batch(
    dataset: Dataset, config: StreamConfig, seed: int, units: int, pack_tokens: int | None
) -> float:
    """Samples of the mean global batch of a run: the units, or for packs what their tokens hold of
    the mean item, estimated from up to 10,000 samples in every stage.
    """
    if pack_tokens is None:
        return units
    table = SampleTable.of(dataset.manifest)
    spread = np.linspace(0, len(table.rows) - 1, ESTIMATED_FROM)
    ids = np.unique(spread.astype(np.int64))  # a smaller dataset has each of its samples once
    starts = [0.0, *(stage.start for stage in config.stages[1:])]
    ends = [*starts[1:], 1.0]
    batches = 0.0  # per sample of the run: stages are shares of its samples
    for start, end, view in zip(starts, ends, config.views(), strict=True):
        views = choose_views(table, view=view, seed=seed, epoch=0, ids=ids)
        lengths = num_tokens(table, view=view, views=views, ids=ids)
        tokens = float(lengths.mean())
        batches += (end - start) * tokens / (units * pack_tokens)
    return 1 / batches
