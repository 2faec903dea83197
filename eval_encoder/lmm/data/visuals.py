"""A path of a conversation -> what a tower sees: an image, a clip's frames, or a clip's patches.

    picture.jpg       padded to a square with the mean colour (`pad`) or cropped (`square`), then
                      the tower's image processor
    clip.mp4          whole frames or codec patches with true positions, as the attentive probe
                      reads clips (probe/clips.py); a tower of images gets its frames one by one
    SHARDS#KEY        a clip of a packed folder: its patches and positions
    FOLDER            with mosaics and positions_thw.npy, as public tools write clips: the same

Nothing is drawn at random: the same path gives the same numbers, so features can be stored. Cost: a
few milliseconds per image, tens per clip.

Shape legend: K patches of an item, p patch size, F images.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import BaseImageProcessor

from data_pipeline.codec.guard import WALL_SECONDS
from data_pipeline.codec.open_video import InputLimits, is_image
from data_pipeline.errors import DataPipelineError
from data_pipeline.loading.packing import pack_views
from data_pipeline.loading.shard_reader import ShardReader
from data_pipeline.loading.views import View
from data_pipeline.shards.interop import read_mosaics
from data_pipeline.shards.manifest import MANIFEST_NAME, load_manifest
from data_pipeline.shards.schema import (
    SampleInfo,
    check_positions,
    decode_array,
    decode_patches,
)
from model_factory.llava.towers import Grid, VisualInputs
from model_factory.packing import compute_patch_positions_from_grid_thw, patchify

from ...clip_input import InputConfig
from ...clip_reader import shared_reader
from ...clip_views import Look, view_of_file
from ...feature_cache import file_identity
from .conversation import Visual

ASPECTS = ("pad", "square")
# --video_view -> the attentive probe's family that sees clips in this view
VIEWS = {"frame": "llava_vit_sampling", "codec": "llava_vit_codec"}


@dataclass(frozen=True)
class VisualConfig:
    """patch_size     of the tower; `packs`: whether it takes packs, or images only
    aspect         of images, one of ASPECTS
    video_size     side of clips in pixels
    video_view     frame or codec; num_frames of the first, num_tokens of the second"""

    patch_size: int
    packs: bool
    aspect: str = "pad"
    video_size: int = 224
    video_view: str = "frame"
    num_frames: int = 8
    num_tokens: int = 1568

    def __post_init__(self) -> None:
        for name, known in (("aspect", ASPECTS), ("video_view", tuple(VIEWS))):
            if getattr(self, name) not in known:
                choices = " or ".join(known)
                raise ValueError(f"{name} is {getattr(self, name)!r}: {choices}")
        if self.video_view == "codec" and not self.packs:
            raise ValueError("codec patches need an encoder of ours: --video_view frame")

    def clips(self) -> InputConfig:
        """The same as a configuration of the attentive probe, whose reader decodes clips."""
        return InputConfig(
            family=VIEWS[self.video_view],
            num_frames=self.num_frames,
            # all positions of the codec's time base (data_pipeline/codec/decompose.py)
            target_frames=64,
            num_tokens=self.num_tokens,
            gop=0,
            camera="median",
            centre_prior=0.0,
            size=self.video_size,
            # one plain look at every clip: the same path gives the same numbers
            temporal_crops=1,
            spatial_crops=1,
            train_views=1,
            augmentations=(),
            mean=None,
            std=None,
            decoder="auto",
            decoder_threads=1,
            wall_seconds=WALL_SECONDS,
            workers=0,
            seed=0,
        )


@dataclass(frozen=True)
class VisualItem:
    """pictures float [F, 3, H, W] for a tower of images, else patch rows float [K, 3*p*p] with
    positions int64 [K, 3]; all normalised. `grids` of its items: one, or one per image; None for
    patches that fill no grid."""

    grids: tuple[Grid | None, ...]
    pictures: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class VisualReader:
    """Reads paths below a folder; see the module's text."""

    def __init__(
        self, config: VisualConfig, image_processor: BaseImageProcessor, folder: str | Path = "."
    ) -> None:
        self.config = config
        self.folder = Path(folder)
        self.processor = image_processor

    def identity(self, visual: Visual) -> str:
        """Text that changes with the bytes that are read: path, size and time of files."""
        path = visual.place(self.folder)
        if "#" in visual.path:
            return f"{visual.path} {file_identity(path / MANIFEST_NAME)}"
        # sorted, since a folder is listed in any order
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return " ".join(file_identity(file) for file in files)

    def __call__(self, visual: Visual, limits: InputLimits | None = None) -> VisualItem:
        """What the tower sees of a path, whose file may be at most of the `limits`.

        Raises RejectedInput for a file that cannot be read, DataPipelineError for shards, and
        ValueError for mosaics that do not fit."""
        path = visual.place(self.folder)
        _, _, key = visual.path.partition("#")
        if key:
            patches, positions = _packed_clip(str(path), key)
            return self._patches(patches, positions)
        if path.is_dir():
            clip = read_mosaics(path)
            # the valid ones are followed by repeats of the last patch, which fill the mosaics
            return self._patches(clip.patches[: clip.valid], clip.positions[: clip.valid])
        if visual.kind == "image" or is_image(path):
            return self.picture(shared_reader().picture(path, limits))
        view = view_of_file(
            path,
            look=Look(0),  # version 0: the middle of the segments, nothing drawn
            config=self.config.clips(),
            size=self.config.video_size,
            patch_size=self.config.patch_size,
            limits=limits,
        )
        return self._clip(view)

    def picture(self, picture: np.ndarray) -> VisualItem:
        """What the tower sees of an image uint8 [H, W, 3]."""
        from PIL import Image

        if self.config.aspect == "pad":
            picture = pad_to_square(picture, self.processor.image_mean)
        image = Image.fromarray(picture)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        p = self.config.patch_size
        height, width = pixels.shape[-2:]
        grid = (1, height // p, width // p)
        if not self.config.packs:
            return VisualItem((grid,), pictures=pixels)
        positions = compute_patch_positions_from_grid_thw(torch.tensor([grid]))
        return VisualItem((grid,), rows=patchify(pixels[0], p), positions=positions)

    def _clip(self, view: View) -> VisualItem:
        view = replace(view, colour=self._colour())
        # labels and weights, which a pack for training has, are not used here
        zero = torch.zeros(1)
        pack = pack_views(
            [view],
            sample_ids=zero.long(),
            labels=zero[None].long(),
            weights=zero,
        )
        rows = pack.hidden_states()
        frames, height, width = view.grid
        if self.config.packs:
            # selected patches, which fill no grid, come as one row of one frame
            is_sparse = frames == 1 and height == 1
            grid = None if is_sparse else view.grid
            return VisualItem((grid,), rows=rows, positions=view.positions)
        p = self.config.patch_size
        squares = rows.view(frames, height, width, 3, p, p)
        channels_first = squares.permute(0, 3, 1, 4, 2, 5)  # [F, 3, h, p, w, p]
        images = channels_first.reshape(frames, 3, height * p, width * p)
        return VisualItem(((1, height, width),) * frames, pictures=images)

    def _patches(self, patches: np.ndarray, positions: np.ndarray) -> VisualItem:
        """What the tower sees of packed patches uint8 [K, p, p, 3] at positions [K, 3]."""
        side = patches.shape[1]
        if not self.config.packs or side != self.config.patch_size:
            raise ValueError(
                f"packed patches of {side} px need an encoder of ours with that patch size, not "
                f"{self.config.patch_size}: pack again, or give the video file"
            )
        channels_last = torch.from_numpy(np.ascontiguousarray(patches))
        view = View(
            pieces=(channels_last.movedim(-1, 1),),
            positions=torch.from_numpy(positions.astype(np.int64)),
            grid=(1, 1, len(positions)),  # which `_clip` takes for patches that fill no grid
        )
        return self._clip(view)

    def _colour(self) -> torch.Tensor:
        """Gain and offset [2, 3] that normalise bytes as the image processor does."""
        mean = torch.tensor(self.processor.image_mean, dtype=torch.float32)
        std = torch.tensor(self.processor.image_std, dtype=torch.float32)
        # (byte / 255 - mean) / std as gain * byte + offset
        return torch.stack([1 / (255 * std), -mean / std])


def read_visual(reader: VisualReader, visual: Visual, name: str) -> VisualItem:
    """What the reader gives; ValueError names the sample and the file that cannot be read."""
    try:
        return reader(visual)
    except (DataPipelineError, ValueError, OSError) as error:
        raise ValueError(
            f"{name}: {visual.kind} {visual.path} cannot be read: {error}; mend the file or take "
            "the sample out of the list"
        ) from error


def packed_inputs(items: Sequence[VisualItem]) -> VisualInputs:
    """Items one after the other, as a tower that takes packs has them."""
    rows = [cast(torch.Tensor, item.rows) for item in items]
    return VisualInputs(
        rows=torch.cat(rows),
        positions=torch.cat([cast(torch.Tensor, item.positions) for item in items]),
        lengths=torch.tensor([len(item_rows) for item_rows in rows]),
        # zeros stand for patches that fill no grid
        grids=torch.tensor([item.grids[0] or (0, 0, 0) for item in items]),
    )


def pad_to_square(picture: np.ndarray, mean: list[float]) -> np.ndarray:
    """uint8 [H, W, 3] in the middle of a square of the longer side, filled with the mean colour
    (0..1, cut to whole numbers as published). Where the difference is odd, the margin behind is one
    pixel wider."""
    height, width = picture.shape[:2]
    side = max(height, width)
    if height == width:
        return picture
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * channel) for channel in mean]
    top = (side - height) // 2
    left = (side - width) // 2
    square[top : top + height, left : left + width] = picture
    return square


@functools.lru_cache(maxsize=8)
def _opened(folder: str) -> tuple[ShardReader, dict[str, int]]:
    """(reader, {key: index}) of a packed folder; a list names many clips of few folders."""
    manifest = load_manifest(folder)
    samples = (manifest.locate(index)[1] for index in range(len(manifest)))
    keys = {sample["key"]: index for index, sample in enumerate(samples)}
    return ShardReader(manifest), keys


def _packed_clip(folder: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(patches uint8 [K, p, p, 3], positions [K, 3]) of a packed clip."""
    reader, keys = _opened(folder)
    if key not in keys:
        raise DataPipelineError(f"{folder} holds no clip with the key {key!r}")
    index = keys[key]
    info = SampleInfo.from_bytes(reader.read(index, "json"), key)
    if info.kind != "video":
        raise DataPipelineError(f"{folder}: {key!r} is a picture: give its file")
    member = "positions.npy"
    positions = decode_array(reader.read(index, member), member=member, name=info.source)
    check_positions(positions, count=info.num_patches, grid=info.grid, name=info.source)
    mosaic = reader.read(index, "tiles.jpg")
    patches = decode_patches(info, mosaic=mosaic, name=info.source)
    return patches, positions
