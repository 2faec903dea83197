"""The loader: one stream of packed batches per head,
fed by plan -> reader -> DALI -> views -> packing.

A stream is a pure function of (dataset, config, batch number); its state is one integer. A thread
prepares batches ahead, so the trainer waits only when data is slower than training. Reading a
stream:

    requests = plan.batch(i).share(rank, world)        which samples, seen how
    bytes    = reader.read(sample, member)             crc checked
    pixels   = DALI decode and normalise
    batch    = pack_views([view(pixels) ...])
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ..counter_rng import counter_rng
from ..datasets import Dataset
from ..errors import DataPipelineError
from ..shards.manifest import Manifest
from ..shards.schema import SampleInfo, decode_array
from .dali_pipeline import PictureDecoder
from .packing import PackedBatch, pack_views
from .plan import EpochPlan, PlannedBatch
from .shard_reader import ShardReader
from .views import (
    MEMBER_OF_VIEW,
    View,
    ViewConfig,
    choose_frames,
    codec_view,
    collage_view,
    frame_view,
    image_view,
    jitter_colours,
)


@dataclass(frozen=True)
class StreamConfig:
    """One head's data: samples per rank and batch, views,
    and how many of the first `label_width` labels are drawn.
    """

    batch_size: int = 32
    view: ViewConfig = field(default_factory=ViewConfig)
    label_width: int = 10
    labels_per_step: int = 8
    dali_num_threads: int = 2

    def __post_init__(self):
        if self.batch_size < 1 or not 1 <= self.labels_per_step <= self.label_width:
            raise ValueError(
                f"batch_size {self.batch_size} must be positive and labels_per_step "
                f"{self.labels_per_step} "
                f"between 1 and label_width {self.label_width}"
            )


@dataclass(frozen=True)
class _Request:
    """One sample of a batch: who, seen how, and its metadata."""

    sample_id: int
    view: str
    info: SampleInfo
    positions: np.ndarray | None


class SampleDecoder:
    """Bytes and metadata of requested samples, decoded to views.
    Shared by training streams and sequential readers.
    """

    def __init__(self, manifest: Manifest, view: ViewConfig):
        self._manifest = manifest
        self._view = view
        self._reader = ShardReader(manifest)

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()

    def request(self, sample_id: int, view: str) -> tuple[_Request, np.ndarray]:
        """Metadata and encoded picture of one sample under a view."""
        shard, sample = self._manifest.locate(sample_id)
        view = "image" if sample["kind"] == "image" else view
        name = f"{shard['name']}/{sample['key']}"
        info = SampleInfo.from_bytes(self._reader.read(sample_id, "json"), name)
        positions = None
        if view == "codec":
            positions = decode_array(
                self._reader.read(sample_id, "positions.npy"), "positions.npy", name
            )
        encoded = np.frombuffer(self._reader.read(sample_id, MEMBER_OF_VIEW[view]), np.uint8)
        return _Request(sample_id, view, info, positions), encoded

    def view(
        self, request: _Request, pixels: torch.Tensor, rng: np.random.Generator | None
    ) -> View:
        """Patches of one decoded picture [3, H, W];
        frames are drawn by `rng`, or taken in the middle without one.
        """
        info = request.info
        if request.view == "codec":
            return codec_view(pixels, request.positions, info.patch_size, self._view.max_tokens)
        if request.view == "image":
            return image_view(pixels, info.patch_size)
        stored = len(info.frame_times)
        chosen = choose_frames(stored, self._view.num_frames(info.grid, stored), rng)
        return (frame_view if request.view == "frame" else collage_view)(pixels, info, chosen)


class HeadStream:
    """Endless packed batches of one head for one rank, starting at any global batch number."""

    def __init__(
        self,
        dataset: Dataset,
        config: StreamConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ):
        self._dataset, self._config, self._seed = dataset, config, seed
        self._rank, self._world_size = rank, world_size
        self.plan = EpochPlan(len(dataset.manifest), config.batch_size * world_size, seed)
        self.token_budget = config.batch_size * _longest_item(dataset.manifest, config.view)
        self._decoder = SampleDecoder(dataset.manifest, config.view)
        self._start, self._next = start, start
        self._pending: dict[int, tuple[PlannedBatch, list[_Request]]] = {}
        self._pictures = PictureDecoder(self._fetch, config.batch_size, config.dali_num_threads)

    def _fetch(self, iteration: int) -> list[np.ndarray]:
        index = self._start + iteration
        share = self.plan.batch(index).share(self._rank, self._world_size)
        view, seed = self._config.view, self._seed
        chosen = [view.choose("video", seed, share.epoch, int(i)) for i in share.sample_ids]
        pairs = [
            self._decoder.request(int(i), name)
            for i, name in zip(share.sample_ids, chosen, strict=True)
        ]
        self._pending[index] = (share, [request for request, _ in pairs])
        return [encoded for _, encoded in pairs]

    def __next__(self) -> PackedBatch:
        pixels = next(self._pictures)
        share, requests = self._pending.pop(self._next)
        self._next += 1
        seed, epoch = self._seed, share.epoch
        views = []
        for request, picture in zip(requests, pixels, strict=True):
            rng = counter_rng(seed, "pixels", epoch, request.sample_id)
            view = self._decoder.view(request, picture, rng)
            jitter = self._config.view.colour_jitter
            views.append(jitter_colours(view, jitter, rng) if jitter else view)
        return pack_views(
            views,
            torch.from_numpy(share.sample_ids.astype(np.int64)),
            torch.from_numpy(self._labels(share)),
            torch.from_numpy(share.weights),
            self.token_budget,
            epoch,
            share.index,
        )

    def _labels(self, share: PlannedBatch) -> np.ndarray:
        """int64 [B, L]: labels_per_step of the first label_width labels, drawn per (epoch,
        sample).
        """
        config = self._config
        table = self._dataset.labels[share.sample_ids, : config.label_width].astype(np.int64)
        count = min(config.labels_per_step, table.shape[1])
        if count == table.shape[1]:
            return table
        picks = [
            np.sort(
                counter_rng(self._seed, "labels", share.epoch, int(i)).permutation(table.shape[1])[
                    :count
                ]
            )
            for i in share.sample_ids
        ]
        return np.take_along_axis(table, np.stack(picks), axis=1)


def _longest_item(manifest: Manifest, view: ViewConfig) -> int:
    """Most tokens that any sample can take under any view;
    names the sample that breaks max_tokens.
    """
    longest = 1
    for shard in manifest.shards:
        for sample in shard["samples"]:
            whole = sample["grid"][0] * sample["grid"][1]
            if whole > view.max_tokens:
                raise DataPipelineError(
                    f"one frame of {sample['source']} is {whole} tokens, --target_num allows "
                    f"{view.max_tokens}: "
                    "raise it or pack at a smaller size"
                )
            frames = view.max_tokens // whole * whole if sample["kind"] == "video" else whole
            patches = min(sample["num_patches"], view.max_tokens)
            longest = max(longest, patches, min(frames, view.max_frames * whole))
    return longest


class MixtureLoader:
    """{head name: PackedBatch} per step, prepared ahead by one thread.
    `close` it, or use it as a context manager.
    """

    def __init__(self, streams: dict[str, Iterator[PackedBatch]], prefetch: int = 2):
        self._streams = streams
        self._queue: queue.Queue = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()

    def _produce(self) -> None:
        try:
            while not self._stop.is_set():
                self._offer({name: next(stream) for name, stream in self._streams.items()})
        except BaseException as error:  # handed to the trainer, which raises it
            self._offer(error)

    def _offer(self, item) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __next__(self) -> dict[str, PackedBatch]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "MixtureLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def sequential_batches(
    manifest: Manifest,
    sample_ids: Iterable[int],
    batch_size: int,
    view: str,
    view_config: ViewConfig | None = None,
) -> Iterator[PackedBatch]:
    """Every given sample once, in order, under one view with fixed frames;
    the last batch may be smaller.

    For evaluation and feature extraction: no filling, no labels (width 0).
    """
    decoder = SampleDecoder(manifest, view_config or ViewConfig())
    ids = list(sample_ids)
    chunks = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    pending: dict[int, list[_Request]] = {}

    def fetch(iteration: int) -> list[np.ndarray]:
        if iteration >= len(chunks):
            raise StopIteration
        pairs = [decoder.request(i, view) for i in chunks[iteration]]
        pending[iteration] = [request for request, _ in pairs]
        return [encoded for _, encoded in pairs]

    try:
        for number, pixels in enumerate(PictureDecoder(fetch, batch_size)):
            pairs = zip(pending.pop(number), pixels, strict=True)
            views = [decoder.view(request, picture, None) for request, picture in pairs]
            no_labels = torch.zeros(len(views), 0, dtype=torch.int64)
            ids = torch.tensor(chunks[number])
            yield pack_views(views, ids, no_labels, torch.ones(len(views)), index=number)
    finally:
        decoder.close()
