"""One sample: its bytes and metadata read and checked, its decoded picture turned into a view."""

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import CorruptShard
from ..shards.jpeg import check_jpeg
from ..shards.manifest import Manifest
from ..shards.schema import SampleInfo, check_positions, decode_array, mosaic_size, strip_size
from .choices import CODEC, COLLAGE, IMAGE, ViewConfig, num_frames
from .shard_reader import ShardReader
from .table import SampleTable
from .views import (
    View,
    choose_frames,
    codec_view,
    collage_view,
    flip,
    frame_view,
    image_view,
    jitter_colours,
)

MEMBER_OF_VIEW = ("tiles.jpg", "frames.jpg", "frames.jpg", "jpg")  # in the order of choices.VIEWS


@dataclass(frozen=True)
class Request:
    """One sample of a batch: who, seen how, what was read of it and the size its picture must have
    (pixel rows and columns).
    """

    sample_id: int
    view: int
    config: ViewConfig
    encoded: np.ndarray
    size: tuple[int, int]
    info: SampleInfo | None = None
    positions: np.ndarray | None = None


class SampleReader:
    """Reads the samples of one packed dataset; `close` it at the end."""

    def __init__(self, manifest: Manifest, table: SampleTable):
        self._manifest, self._table = manifest, table
        self._patch_size = manifest.settings["patch_size"]
        self._reader = ShardReader(manifest)

    @property
    def reading(self) -> str:
        """The file that is being read right now; empty between reads."""
        return str(self._reader.reading or "")

    def first_and_last(self) -> list[str]:
        """As ShardReader.first_and_last."""
        return self._reader.first_and_last()

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()

    def name(self, sample_id: int) -> str:
        """Shard, key and source of a sample, for messages."""
        shard, sample = self._manifest.locate(sample_id)
        return (
            f"{self._manifest.directory / shard['name']}.tar/{sample['key']} ({sample['source']})"
        )

    def read(self, sample_id: int, view: int, config: ViewConfig) -> Request:
        """Encoded picture and metadata of one sample under a view: crc, the picture's header and
        the places of patches checked. Raises CorruptShard or MissingData.
        """
        member = MEMBER_OF_VIEW[view]
        data = self._reader.read(sample_id, member)
        name = self.name(sample_id)
        rows = int(self._table.rows[sample_id])
        columns = int(self._table.columns[sample_id])
        info = positions = None
        if view == IMAGE:
            size = (rows * self._patch_size, columns * self._patch_size)
        elif view == CODEC:
            positions = self._read_positions(sample_id, (rows, columns), name)
            size = mosaic_size(len(positions), self._patch_size)
        else:
            info = self._read_info(sample_id, (rows, columns), name)
            size = strip_size(info)
        check_jpeg(data, size=size, name=f"{name}: .{member}")
        return Request(
            sample_id=sample_id,
            view=view,
            config=config,
            encoded=np.frombuffer(data, np.uint8),
            size=size,
            info=info,
            positions=positions,
        )

    def _read_info(self, sample_id: int, grid: tuple[int, int], name: str) -> SampleInfo:
        info = SampleInfo.from_bytes(self._reader.read(sample_id, "json"), name)
        stored = int(self._table.num_frames[sample_id])
        if (info.grid, len(info.frame_times), info.patch_size) != (grid, stored, self._patch_size):
            raise CorruptShard(
                f"{name}: {len(info.frame_times)} frames of {info.grid} patches of "
                f"{info.patch_size} px, its record says {stored} of {grid} of {self._patch_size}"
            )
        return info

    def _read_positions(self, sample_id: int, grid: tuple[int, int], name: str) -> np.ndarray:
        data = self._reader.read(sample_id, "positions.npy")
        positions = decode_array(data, "positions.npy", name)
        count = int(self._table.num_patches[sample_id])
        check_positions(positions, count=count, grid=grid, name=name)
        return positions

    def view(self, request: Request, picture: torch.Tensor, draw: np.ndarray | None) -> View:
        """Patches of a decoded picture uint8 [H, W, 3]. `draw` is the sample's row of
        choices.draws; without one nothing is random: frames from the middle, colours as they are.
        """
        config, patch_size, columns = request.config, self._patch_size, None
        if request.view == CODEC:
            view = codec_view(picture, request.positions, patch_size, config.max_tokens)
            columns = int(self._table.columns[request.sample_id])
        elif request.view == IMAGE:
            view = image_view(picture, patch_size, config.scale)
        else:
            view = self._frames(request, picture, None if draw is None else draw[16:])
        if draw is not None and draw[0] < config.flip:
            view = flip(view, columns or view.grid[2])
        if request.view == COLLAGE:
            view = collage_view(view)
        if draw is not None and config.colour_jitter:
            view = jitter_colours(view, config.colour_jitter, draw[1:10])
        return view

    def _frames(self, request: Request, strip: torch.Tensor, draw: np.ndarray | None) -> View:
        info, config = request.info, request.config
        rows, columns = self._table.scaled_grid(request.sample_id, config.scale)
        stored = len(info.frame_times)
        count = int(num_frames(rows * columns, stored, config))
        return frame_view(strip, info, choose_frames(stored, count, draw), config.scale)


def wrong_size(request: Request, picture: torch.Tensor) -> str | None:
    """Why a decoded picture cannot be the sample's; None when its size is right."""
    if tuple(picture.shape[:2]) == request.size:
        return None
    height, width = picture.shape[:2]
    return f"its picture is {height}x{width}, its metadata says {request.size[0]}x{request.size[1]}"
