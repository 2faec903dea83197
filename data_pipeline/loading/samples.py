"""One sample: its bytes and metadata read and checked, its decoded image turned into a view.

`sequential_batches` reads given samples in order, for evaluation and feature extraction.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import CorruptShard
from ..shards.jpeg import check_jpeg
from ..shards.manifest import Manifest
from ..shards.schema import SampleInfo, check_positions, decode_array, mosaic_size, strip_size
from .choices import (
    CODEC,
    COLLAGE,
    COLOUR_DRAWS,
    FIRST_FRAME_DRAW,
    FLIP_DRAW,
    IMAGE,
    VIEWS,
    SampleTable,
    num_frames,
)
from .config import ViewConfig
from .dali_pipeline import DecodeFailed, PictureDecoder, undecodable
from .packing import PackedBatch, pack_views
from .shard_reader import ShardReader
from .views import (
    View,
    choose_frames,
    codec_view,
    collage_view,
    flip,
    frame_view,
    image_view,
    jitter_colours,
    tube_view,
)

MEMBER_OF_VIEW = ("tiles.jpg", "frames.jpg", "frames.jpg", "jpg")  # in the order of choices.VIEWS


@dataclass(frozen=True)
class Request:
    """One sample of a batch: which, under which of choices.VIEWS, what was read of it, and the size
    (pixel rows and columns) that its image must have. `info` is there for whole frames, `positions`
    for codec patches.
    """

    sample_id: int
    view_index: int
    config: ViewConfig
    encoded: np.ndarray
    size: tuple[int, int]
    info: SampleInfo | None = None
    positions: np.ndarray | None = None


class SampleReader:
    """Reads the samples of one packed dataset; `close` it at the end."""

    def __init__(self, manifest: Manifest, table: SampleTable):
        self._manifest = manifest
        self._table = table
        self._patch_size = manifest.settings["patch_size"]
        self.shards = ShardReader(manifest)

    def close(self) -> None:
        """Close the shards."""
        self.shards.close()

    def name(self, sample_id: int) -> str:
        """Shard, key and source of a sample, for messages."""
        shard, sample = self._manifest.locate(sample_id)
        return (
            f"{self._manifest.directory / shard['name']}.tar/{sample['key']} ({sample['source']})"
        )

    def read(self, sample_id: int, view_index: int, config: ViewConfig) -> Request:
        """Encoded image and metadata of one sample under a view: crc, the image's header and the
        positions of patches checked. Raises CorruptShard or MissingData.
        """
        member = MEMBER_OF_VIEW[view_index]
        data = self.shards.read(sample_id, member)
        name = self.name(sample_id)
        rows = int(self._table.rows[sample_id])
        columns = int(self._table.columns[sample_id])
        grid = (rows, columns)
        info = None
        positions = None
        if view_index == IMAGE:
            size = (rows * self._patch_size, columns * self._patch_size)
        elif view_index == CODEC:
            stored = self.shards.read(sample_id, "positions.npy")
            positions = decode_array(stored, member="positions.npy", name=name)
            count = int(self._table.num_patches[sample_id])
            check_positions(positions, count=count, grid=grid, name=name)
            size = mosaic_size(len(positions), self._patch_size)
        else:
            info = self._read_info(sample_id, grid=grid, name=name)
            size = strip_size(info)
        check_jpeg(data, size=size, name=f"{name}: .{member}")
        return Request(
            sample_id=sample_id,
            view_index=view_index,
            config=config,
            encoded=np.frombuffer(data, np.uint8),
            size=size,
            info=info,
            positions=positions,
        )

    def _read_info(self, sample_id: int, grid: tuple[int, int], name: str) -> SampleInfo:
        info = SampleInfo.from_bytes(self.shards.read(sample_id, "json"), name)
        stored = int(self._table.num_frames[sample_id])
        found = (info.grid, len(info.frame_times), info.patch_size)
        if found != (grid, stored, self._patch_size):
            raise CorruptShard(
                f"{name}: {len(info.frame_times)} frames of {info.grid} patches of "
                f"{info.patch_size} px, its record says {stored} of {grid} of {self._patch_size}"
            )
        return info

    def make_view(self, request: Request, picture: torch.Tensor, draw: np.ndarray | None) -> View:
        """Patches of a decoded image uint8 [H, W, 3]. `draw` is the sample's row of choices.draws;
        without one nothing is random: frames from the middle, colours as they are.
        """
        config = request.config
        if request.view_index == CODEC:
            assert request.positions is not None
            view = codec_view(
                picture,
                positions=request.positions,
                patch_size=self._patch_size,
                max_tokens=config.max_tokens,
            )
            # a sparse item has no grid of its own: it is mirrored in the clip's
            columns = int(self._table.columns[request.sample_id])
        else:
            if request.view_index == IMAGE:
                view = image_view(picture, patch_size=self._patch_size, scale=config.scale)
            else:
                frame_draws = None if draw is None else draw[FIRST_FRAME_DRAW:]
                view = self._frames(request, strip=picture, draw=frame_draws)
            view = tube_view(view, config.frames_per_token)
            columns = view.grid[2]
        if draw is not None and draw[FLIP_DRAW] < config.flip:
            view = flip(view, columns)
        # after the flip, which mirrors each frame
        if request.view_index == COLLAGE:
            view = collage_view(view)
        if draw is not None and config.colour_jitter:
            colour_draws = draw[COLOUR_DRAWS]
            view = jitter_colours(view, strength=config.colour_jitter, draw=colour_draws)
        return view

    def _frames(self, request: Request, strip: torch.Tensor, draw: np.ndarray | None) -> View:
        assert request.info is not None
        config = request.config
        stored = len(request.info.frame_times)
        per_frame = self._table.frame_tokens(request.sample_id, config.scale)
        count = int(num_frames(per_frame, num_stored=stored, view=config))
        chosen = choose_frames(stored, count=count, draw=draw)
        return frame_view(strip, info=request.info, chosen=chosen, scale=config.scale)


def wrong_sizes(requests: list[Request], pictures: list[torch.Tensor]) -> dict[int, str]:
    """Why decoded images cannot be those of their samples: {index: reason} of such alone."""
    reasons = {}
    for i, (request, picture) in enumerate(zip(requests, pictures, strict=True)):
        height, width = picture.shape[:2]
        if (height, width) != request.size:
            rows, columns = request.size
            reasons[i] = f"its picture is {height}x{width}, its metadata says {rows}x{columns}"
    return reasons


def sequential_batches(
    manifest: Manifest,
    sample_ids: Iterable[int],
    batch_size: int,
    view_name: str,
    view_config: ViewConfig | None = None,
) -> Iterator[PackedBatch]:
    """Packs of `batch_size` samples in order, each once; the last pack may be smaller.

    Clips are seen under the view of this name of choices.VIEWS. No filling, no labels, nothing
    random: frames are taken from the middles. A bad sample is an
    error and not replaced: CorruptShard with the names of samples that cannot be read or decoded.
    """
    table = SampleTable.of(manifest)
    config = view_config or ViewConfig()
    samples = SampleReader(manifest, table)
    ids = [int(i) for i in sample_ids]
    starts = range(0, len(ids), batch_size)
    chunks = [ids[start : start + batch_size] for start in starts]
    pending: dict[int, list[Request]] = {}

    def fetch(number: int) -> list[np.ndarray]:
        if number >= len(chunks):
            raise StopIteration  # PictureDecoder's protocol for the end
        requests = []
        for sample_id in chunks[number]:
            chosen = IMAGE if table.is_image[sample_id] else VIEWS.index(view_name)
            requests.append(samples.read(sample_id, view_index=chosen, config=config))
        pending[number] = requests
        return [request.encoded for request in requests]

    try:
        decoder = PictureDecoder(fetch, batch_size)
        for number, chunk in enumerate(chunks):
            images = _decode(decoder, pending=pending, samples=samples)
            pairs = zip(pending.pop(number), images, strict=True)
            yield pack_views(
                [samples.make_view(request, image, draw=None) for request, image in pairs],
                sample_ids=torch.tensor(chunk),
                labels=torch.zeros(len(chunk), 0, dtype=torch.int64),
                weights=torch.ones(len(chunk)),
                index=number,
            )
    finally:
        samples.close()


def _decode(
    decoder: PictureDecoder, pending: dict[int, list[Request]], samples: SampleReader
) -> list[torch.Tensor]:
    """Images of the next batch, each of its right size."""
    try:
        images = next(decoder)
        requests = pending[min(pending)]  # DALI reads ahead: the oldest batch is the one decoded
        bad = wrong_sizes(requests, images)
    except DecodeFailed as error:
        requests = [request for batch in pending.values() for request in batch]
        encoded = [request.encoded for request in requests]
        bad = undecodable(encoded, torch.device("cpu"))
        if not bad:
            raise CorruptShard(f"decoding failed, every picture alone decodes: {error}") from error
    if bad:
        lines = []
        for i, reason in bad.items():
            name = samples.name(requests[i].sample_id)
            lines.append(f"{name}: {reason}")
        raise CorruptShard(
            "samples that cannot be used; to pack them again, remove their shards' .json and"
            " run the `pack` command of the folder again:\n" + "\n".join(lines)
        )
    return images
