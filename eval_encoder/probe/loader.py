"""Labelled clips -> packs for the encoder, in the order that is asked for.

Raw files are decoded by a few child processes, some clips ahead of the encoder; no file can hang or
kill the probe. Packed shards of a split are read instead where they exist; they hold one version of
each clip. A file that cannot be read is noted, with its reason, and left out.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from data_pipeline.errors import RejectedInput
from data_pipeline.labelled_lists import ids_of_sources
from data_pipeline.loading.choices import ViewConfig
from data_pipeline.loading.packing import PackedBatch, pack_views
from data_pipeline.loading.sequential import sequential_batches
from data_pipeline.shards.manifest import Manifest, load_manifest

from ..feature_cache import file_identity
from .benchmarks import LabelledList
from .clips import Look, chosen_decoder, chosen_gop, view_of_file
from .config import IMAGE_FAMILIES, InputConfig
from .reader import PixelReader

Packs = Iterator[tuple[list[Look], PackedBatch]]


class RawClips:
    """Files of a list; `unreadable` fills up with names and reasons."""

    several_versions = True  # clips can be looked at in other ways than the plain one

    def __init__(self, clips: LabelledList, config: InputConfig, size: int, patch_size: int):
        if size % patch_size or size % 2:
            raise ValueError(
                f"--input_size {size} must be even and a multiple of the encoder's patch size "
                f"{patch_size}"
            )
        if config.view == "codec":
            chosen_gop(config, (size // patch_size) ** 2)
        self._clips = clips
        self._config = config
        self._size = size
        self._patch_size = patch_size
        self._reader: PixelReader | None = None  # its processes start with the first clip
        self.unreadable: dict[str, str] = {}
        self.about = f"files, read by {chosen_decoder(config)}"

    def identity(self, index: int) -> str:
        """Text that changes with the file."""
        return file_identity(self._clips.folder / self._clips.names[index])

    def find_missing(self, indices) -> None:
        """Note the files among `indices` that are not there."""
        for name in (self._clips.names[i] for i in indices):
            if not (self._clips.folder / name).is_file():
                self.unreadable[name] = "missing"

    def packs(self, looks: list[Look], batch_size: int) -> Packs:
        """(looks, pack) of readable clips in order, at most batch_size each."""
        ready: list = []
        for look, view in self._views(looks, 2 * batch_size):
            if view is not None:
                ready.append((look, view))
            if len(ready) == batch_size:
                yield _packed(ready)
                ready = []
        if ready:
            yield _packed(ready)

    def _views(self, looks: list[Look], ahead: int):
        pool = ThreadPoolExecutor(self._config.workers, thread_name_prefix="probe")
        waiting: deque[tuple[Look, Future]] = deque()
        if self._reader is None:
            self._reader = PixelReader(self._config.workers, self._config.wall_seconds)
        try:
            for look in looks:
                waiting.append((look, pool.submit(self._view, look)))
                if len(waiting) > ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        except BaseException:  # Ctrl-C: nobody waits for clips that nobody will see
            self._reader.close()
            self._reader = None
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _view(self, look: Look):
        name = self._clips.names[look.clip]
        try:
            return view_of_file(
                self._clips.folder / name,
                look,
                self._config,
                size=self._size,
                patch_size=self._patch_size,
                reader=self._reader,
            )
        except RejectedInput as rejection:
            self.unreadable[name] = f"{rejection.reason} ({rejection.detail})"
            return None


class PackedClips:
    """Clips of packed shards; names that are not in them are unreadable."""

    several_versions = False

    def __init__(self, clips: LabelledList, config: InputConfig, patch_size: int):
        self._config, self._manifest = config, load_manifest(clips.shards)
        _check_stored(self._manifest, clips, config, patch_size)
        settings = self._manifest.settings
        self.about = (
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

    def find_missing(self, indices) -> None:
        """Nothing to do: the manifest has told."""

    def packs(self, looks: list[Look], batch_size: int) -> Packs:
        """(looks, pack) of clips in order, batch_size each."""
        looks = [look for look in looks if self._sample_ids[look.clip] is not None]
        config, view = self._config, self._config.view
        limit = config.num_tokens
        if view == "frame":
            limit = config.num_frames * _frame_tokens(self._manifest)
        shown = ViewConfig(max_tokens=limit, max_frames=config.num_frames)
        ids = [self._sample_ids[look.clip] for look in looks]
        batches = sequential_batches(self._manifest, ids, batch_size, view, shown)
        for number, batch in enumerate(batches):
            yield looks[number * batch_size : (number + 1) * batch_size], batch


def open_clips(
    clips: LabelledList, config: InputConfig, size: int, patch_size: int
) -> RawClips | PackedClips:
    """The reader of a split. Raises ValueError for more than packed shards hold."""
    if clips.shards is None:
        return RawClips(clips, config, size, patch_size)
    return PackedClips(clips, config, patch_size)


def _packed(ready: list) -> tuple[list[Look], PackedBatch]:
    looks, views = zip(*ready, strict=True)
    count = len(views)
    ids = torch.tensor([look.clip for look in looks])
    labels = torch.zeros(count, 0, dtype=torch.int64)
    return list(looks), pack_views(list(views), ids, labels, torch.ones(count))


def _frame_tokens(manifest: Manifest) -> int:
    """Most patches that one whole frame of the split has."""
    samples = (sample for shard in manifest.shards for sample in shard["samples"])
    return max(sample["grid"][0] * sample["grid"][1] for sample in samples)


def _check_stored(
    manifest: Manifest, clips: LabelledList, config: InputConfig, patch_size: int
) -> None:
    """What is packed must be what the encoder takes; a budget beyond it would silently be a smaller
    one."""
    packed = manifest.settings["patch_size"]
    if config.family not in IMAGE_FAMILIES and packed != patch_size:
        raise ValueError(
            f"{clips.shards} was packed with patch size {packed}, the encoder takes {patch_size}: "
            f"pack again with --patch-size {patch_size}, or move the packed folder away"
        )
    kept = max(s["num_patches"] for shard in manifest.shards for s in shard["samples"])
    frames = manifest.settings["num_full_frames"]
    if config.view == "codec" and config.num_tokens > kept:
        raise ValueError(
            f"--K_keep {config.num_tokens}: {clips.shards} keeps {kept} patches a clip; "
            f"pass --K_keep {kept} or pack with a larger --budget"
        )
    if config.view == "frame" and config.num_frames > frames:
        raise ValueError(
            f"--num_frames {config.num_frames}: {clips.shards} stores {frames} frames "
            f"a clip; pass --num_frames {frames} or pack with more --full-frames"
        )
    if config.temporal_crops > 1 or config.spatial_crops > 1:
        raise ValueError(
            f"{clips.shards} holds one square and one sampling of every clip: crops need the raw "
            "videos, so move the packed folder away"
        )
