"""Labelled clips -> packs for the encoder, in the order that is asked for.

    look   at a clip of the list  ->  view of its file (clip_views.py)  ->  several in one pack

Files are decoded by a few child processes (clip_reader.py), some clips ahead of the encoder, and no
file can hang or kill the probe. Packed shards of a split are read instead where they exist; they
hold one version of each clip. A file that cannot be read is noted, with its reason, and left out.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from data_pipeline.errors import RejectedInput
from data_pipeline.lists import ids_of_sources
from data_pipeline.loading.config import ViewConfig
from data_pipeline.loading.packing import PackedBatch, pack_views
from data_pipeline.loading.samples import sequential_batches
from data_pipeline.loading.views import View
from data_pipeline.shards.manifest import Manifest, load_manifest

from ..clip_input import IMAGE_FAMILIES, InputConfig
from ..clip_reader import PixelReader
from ..clip_views import Look, chosen_decoder, chosen_gop, view_of_file
from ..feature_cache import file_identity
from .benchmarks import LabelledList

Packs = Iterator[tuple[list[Look], PackedBatch]]


def open_clips(
    clips: LabelledList,
    config: InputConfig,
    size: int,
    patch_size: int,
    frames_per_token: int = 1,
) -> "RawClips | PackedClips":
    """The reader of a split. Raises ValueError for more than packed shards hold, and for input that
    is no whole tubes of an encoder that takes `frames_per_token`."""
    _check_tubes(config, frames_per_token)
    if clips.shards is not None:
        return PackedClips(
            clips,
            clips.shards,
            config=config,
            patch_size=patch_size,
            frames_per_token=frames_per_token,
        )
    return RawClips(
        clips,
        config,
        size=size,
        patch_size=patch_size,
        frames_per_token=frames_per_token,
    )


def _check_tubes(config: InputConfig, frames_per_token: int) -> None:
    if frames_per_token == 1:
        return
    if config.view == "codec":
        raise ValueError(
            f"--model_family {config.family}: the encoder takes tokens of {frames_per_token} whole "
            "frames, and codec patches are of one: pass --model_family llava_vit_sampling"
        )
    if config.num_frames % frames_per_token:
        raise ValueError(
            f"--num_frames {config.num_frames}: the encoder takes tokens of {frames_per_token} "
            "frames, so give a multiple"
        )


class RawClips:
    """Files of a list; `unreadable` fills up with names and reasons."""

    several_versions = True  # clips can be looked at in other ways than the plain one

    def __init__(
        self,
        clips: LabelledList,
        config: InputConfig,
        size: int,
        patch_size: int,
        frames_per_token: int = 1,
    ) -> None:
        # a working side must be even for 4:2:0 chroma (data_pipeline/codec/framing.py)
        if size % patch_size or size % 2:
            raise ValueError(
                f"--input_size {size} must be even and a multiple of the encoder's patch size "
                f"{patch_size}"
            )
        if config.view == "codec":
            # refuses a budget that is too small before anything is decoded
            side = size // patch_size
            chosen_gop(config, rows=side, columns=side)
        self._clips = clips
        self._config = config
        self._size = size
        self._patch_size = patch_size
        self._frames_per_token = frames_per_token
        self._reader: PixelReader | None = None  # its processes start with the first clip
        self.unreadable: dict[str, str] = {}
        self.read_from = f"files, read by {chosen_decoder(config)}"

    def identity(self, index: int) -> str:
        """Text that changes with the file."""
        return file_identity(self._clips.folder / self._clips.names[index])

    def find_missing(self, indices: Iterable[int]) -> None:
        """Note the files among `indices` that are not there."""
        for index in indices:
            name = self._clips.names[index]
            if not (self._clips.folder / name).is_file():
                self.unreadable[name] = "missing"

    def packs(self, looks: list[Look], batch_size: int) -> Packs:
        """(looks, pack) of readable clips in order, at most batch_size each."""
        ready: list[Look] = []
        views: list[View] = []
        # two batches ahead: reading goes on while the encoder works
        for look, view in self._views(looks, ahead=2 * batch_size):
            if view is not None:
                ready.append(look)
                views.append(view)
            if len(views) == batch_size:
                yield ready, _packed(ready, views)
                ready = []
                views = []
        if views:
            yield ready, _packed(ready, views)

    def _views(self, looks: list[Look], ahead: int) -> Iterator[tuple[Look, View | None]]:
        """(look, its view or None) in order. Up to `ahead` clips are submitted beyond the one that
        is yielded; `workers` of them are read at a time."""
        reader = self._reader or PixelReader(self._config.workers, self._config.wall_seconds)
        self._reader = reader
        pool = ThreadPoolExecutor(self._config.workers, thread_name_prefix="probe")
        waiting: deque[tuple[Look, Future[View | None]]] = deque()
        try:
            for look in looks:
                waiting.append((look, pool.submit(self._view, look, reader)))
                if len(waiting) > ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        except BaseException:
            # After Ctrl-C nothing waits for clips that will not be encoded. Threads of the pool
            # wait for children, so the children have to end first.
            reader.close()
            self._reader = None
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _view(self, look: Look, reader: PixelReader) -> View | None:
        name = self._clips.names[look.clip]
        try:
            return view_of_file(
                self._clips.folder / name,
                look=look,
                config=self._config,
                size=self._size,
                patch_size=self._patch_size,
                reader=reader,
                frames_per_token=self._frames_per_token,
            )
        except RejectedInput as rejection:
            self.unreadable[name] = f"{rejection.reason} ({rejection.detail})"
            return None


class PackedClips:
    """Clips of packed shards; names that are not in them are unreadable."""

    several_versions = False

    def __init__(
        self,
        clips: LabelledList,
        shards: Path,
        config: InputConfig,
        patch_size: int,
        frames_per_token: int = 1,
    ) -> None:
        self._config = config
        self._frames_per_token = frames_per_token
        self._manifest = load_manifest(shards)
        _check_stored(self._manifest, shards, config=config, patch_size=patch_size)
        settings = self._manifest.settings
        self.read_from = (
            f"packed shards of {settings['size']} px, patch {settings['patch_size']}; flags of raw "
            "videos have no effect"
        )
        ids = ids_of_sources(self._manifest)
        self._sample_ids = [ids.get(name) for name in clips.names]
        absent = [name for name in clips.names if name not in ids]
        self.unreadable = dict.fromkeys(absent, "not in the packed shards")

    def identity(self, index: int) -> str:
        """Text that changes with the shards."""
        return f"{self._manifest.sha256} {self._sample_ids[index]}"

    def find_missing(self, indices: Iterable[int]) -> None:
        """Do nothing: `unreadable` is complete, by the manifest."""

    def packs(self, looks: list[Look], batch_size: int) -> Packs:
        """(looks, pack) of clips in order, batch_size each."""
        # The reader of shards takes a missing sample for an error, so those are left out before.
        pairs = [(look, self._sample_ids[look.clip]) for look in looks]
        stored = [(look, sample_id) for look, sample_id in pairs if sample_id is not None]
        config = self._config
        max_tokens = config.num_tokens
        if config.view == "frame":
            # num_frames whole frames, also of the sample with the largest grid
            samples = [s for shard in self._manifest.shards for s in shard["samples"]]
            grids = [sample["grid"] for sample in samples]
            largest = max(grid[0] * grid[1] for grid in grids)
            max_tokens = config.num_frames // self._frames_per_token * largest
        batches = sequential_batches(
            self._manifest,
            sample_ids=[sample_id for _, sample_id in stored],
            batch_size=batch_size,
            view_name=config.view,
            view_config=ViewConfig(
                codec_ratio=float(config.view == "codec"),
                frame_ratio=float(config.view == "frame"),
                max_tokens=max_tokens,
                max_frames=config.num_frames,
                scale=config.frame_scale,
                frames_per_token=self._frames_per_token,
            ),
        )
        for number, batch in enumerate(batches):
            # batches are consecutive pieces of what was asked for, in its order
            first = number * batch_size
            chunk = stored[first : first + batch_size]
            yield [look for look, _ in chunk], batch


def _packed(looks: list[Look], views: list[View]) -> PackedBatch:
    """A pack of views; it has no labels, since the encoder is frozen."""
    return pack_views(
        views,
        sample_ids=torch.tensor([look.clip for look in looks]),
        labels=torch.zeros(len(views), 0, dtype=torch.int64),
        weights=torch.ones(len(views)),
    )


def _check_stored(manifest: Manifest, shards: Path, config: InputConfig, patch_size: int) -> None:
    """Raise ValueError where packed shards do not hold what the encoder takes: a budget beyond what
    is stored would silently be a smaller one."""
    packed = manifest.settings["patch_size"]
    # an image encoder cuts the frames, which are put together again, by its own patch size
    if config.family not in IMAGE_FAMILIES and packed != patch_size:
        raise ValueError(
            f"{shards} was packed with patch size {packed}, the encoder takes {patch_size}: "
            f"pack again with --patch-size {patch_size}, or move the packed folder away"
        )
    samples = [sample for shard in manifest.shards for sample in shard["samples"]]
    stored = max(sample["num_patches"] for sample in samples)
    if config.view == "codec" and config.num_tokens > stored:
        raise ValueError(
            f"--K_keep {config.num_tokens}: {shards} keeps {stored} patches a clip; "
            f"pass --K_keep {stored} or pack with a larger --budget"
        )
    frames = manifest.settings["num_full_frames"]
    if config.view == "frame" and config.num_frames > frames:
        raise ValueError(
            f"--num_frames {config.num_frames}: {shards} stores {frames} frames "
            f"a clip; pass --num_frames {frames} or pack with more --full-frames"
        )
    if config.temporal_crops > 1 or config.spatial_crops > 1:
        raise ValueError(
            f"{shards} holds one square and one sampling of every clip: crops need the raw "
            "videos, so move the packed folder away"
        )
