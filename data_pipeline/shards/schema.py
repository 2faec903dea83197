"""THE on-disk contract, version 1: which members a sample has, their dtypes, and how to read them.

    KEY.json           metadata, see `SampleInfo`
    KEY.tiles.jpg      the K selected patches as a mosaic of tiles, TILE_COLUMNS wide, JPEG 4:4:4;
                       each tile is the patch, edge-padded to a multiple of 8 px, so that no JPEG
                       block holds pixels of two patches
    KEY.positions.npy  uint16 [K, 3] (t, h, w) in tile order, which is the order of selection
                       (codec.selection): any prefix is the selection of a smaller budget. t is a
                       temporal position from 0 to 63, not the index of a frame
    KEY.scores.npy     float16 [K]
    KEY.motion.npy     float16 [T, G, G, 3] coarse mean motion (x, y) in pixels and residual, see
                       codec.saliency
    KEY.frames.jpg     M full frames as a vertical strip, each padded to a multiple of 8 rows
    KEY.jpg            image samples: the image; they have KEY.json and KEY.jpg only

Labels never live in a shard. Shape legend: K selected patches, T frames, M stored frames, H, W
working size, p patch.
"""

import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import CorruptShard
from ..side_files import array_bytes, check_array, parse_array, parse_record
from .jpeg import check_jpeg

SCHEMA_VERSION = 1
TILE_COLUMNS = 32  # 512 px wide at 16 px patches
JPEG_QUALITY = 90
BLOCK = 8  # a JPEG block's side; with 4:4:4 chroma the same for colour
# Bounds of what hostile members may claim, each far above what a packer writes: what they size is
# allocated by the reader.
MAX_ARRAY_BYTES = 1 << 28
MAX_INFO_BYTES = 1 << 22
MAX_SIDE = 1 << 20
MAX_PATCHES = 1 << 24
TIME_BASE = 64  # temporal positions run over 0..63 whatever the number of frames
ARRAYS: dict[str, tuple[type, tuple[int | None, ...]]] = {  # dtype and shape, None: any size
    "positions.npy": (np.uint16, (None, 3)),
    "scores.npy": (np.float16, (None,)),
    "motion.npy": (np.float16, (None, None, None, 3)),
}


@dataclass(frozen=True)
class SampleInfo:
    """Content of KEY.json. `frame_times` are the stored frames' positions on the time base."""

    kind: str  # "video" or "image"
    source: str  # name of the input, relative to the packed folder
    source_sha256: str
    height: int
    width: int
    patch_size: int
    num_patches: int = 0  # K
    num_frames: int = 1  # T
    gop: int = 0
    frame_times: tuple[int, ...] = (0,)  # M times
    i_frame_times: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()  # T presentation times
    # top, left, bottom and right of the picture in a padded frame; empty: nothing is padded
    content: tuple[int, ...] = ()
    is_static: bool = False
    mean_motion: float = 0.0  # pixels per frame, camera included
    mean_residual: float = 0.0  # luma steps
    num_source_frames: int = 1
    notes: tuple[str, ...] = ()  # interlaced, rotated, salvaged
    codec: str = ""
    decoder: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of one full frame."""
        return self.height // self.patch_size, self.width // self.patch_size

    def _check(self) -> None:
        """ValueError for numbers that no writer writes."""
        sizes = (self.height, self.width, self.patch_size, self.num_frames)
        if not all(type(value) is int and 0 <= value < MAX_SIDE for value in sizes):
            raise ValueError(f"sizes {sizes} are not all integers in 0..{MAX_SIDE}")
        if type(self.num_patches) is not int or not 0 <= self.num_patches < MAX_PATCHES:
            raise ValueError(f"num_patches {self.num_patches!r}")
        if self.patch_size == 0 or min(self.grid) < 1:
            raise ValueError(f"{self.height}x{self.width} in patches of {self.patch_size}")
        if self.height % self.patch_size or self.width % self.patch_size:
            raise ValueError(f"{self.height}x{self.width} is not whole in {self.patch_size} px")
        times = self.frame_times
        # `type` here and above, because True and False are ints too
        if not times or not all(type(time) is int and 0 <= time < TIME_BASE for time in times):
            raise ValueError(f"frame times {times} are not integers in 0..{TIME_BASE - 1}")
        if sorted(set(times)) != list(times):
            raise ValueError(f"frame times {times} do not rise")
        self._check_content()
        if not isinstance(self.source, str) or self.kind not in ("video", "image"):
            raise ValueError(f"kind {self.kind!r} of source {self.source!r}")

    def _check_content(self) -> None:
        if not self.content:
            return
        if len(self.content) != 4 or not all(type(side) is int for side in self.content):
            raise ValueError(f"content {self.content} is not four integers")
        top, left, bottom, right = self.content
        if not (0 <= top < bottom <= self.height and 0 <= left < right <= self.width):
            raise ValueError(f"content {self.content} of a frame of {self.height}x{self.width}")

    def to_bytes(self) -> bytes:
        """JSON, keys sorted: the same sample always gives the same bytes."""
        values = asdict(self)
        if not self.content:  # as before there was padding
            del values["content"]
        return json.dumps(values, sort_keys=True, ensure_ascii=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "SampleInfo":
        """Parse KEY.json; CorruptShard names the sample for a foreign version or missing fields."""
        values = parse_record(data, name=name, max_bytes=MAX_INFO_BYTES)
        try:
            if values["schema_version"] != SCHEMA_VERSION:
                raise CorruptShard(
                    f"{name} has schema version {values['schema_version']}, this code reads "
                    f"{SCHEMA_VERSION}: pack the source again"
                )
            given: dict[str, Any] = {}
            # a later writer of this version may add fields: they are ignored
            for name_of_field in cls.__dataclass_fields__.keys() & values.keys():
                value = values[name_of_field]
                given[name_of_field] = tuple(value) if isinstance(value, list) else value
            info = cls(**given)
            info._check()
            return info
        except CorruptShard:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptShard(f"{name}: KEY.json is not a sample's metadata ({error})") from error


def tile_side(patch_size: int) -> int:
    """Edge of a stored tile in pixels: the patch size in whole JPEG blocks (14 -> 16)."""
    return -(-patch_size // BLOCK) * BLOCK


def strip_rows(height: int) -> int:
    """Rows that one frame takes in the strip, whole JPEG blocks too."""
    return tile_side(height)


def mosaic_size(num_patches: int, patch_size: int) -> tuple[int, int]:
    """Pixel rows and columns of KEY.tiles.jpg."""
    side = tile_side(patch_size)
    return -(-num_patches // TILE_COLUMNS) * side, TILE_COLUMNS * side


def strip_size(info: SampleInfo) -> tuple[int, int]:
    """Pixel rows and columns of KEY.frames.jpg."""
    return len(info.frame_times) * strip_rows(info.height), info.width


def encode_clip(
    info: SampleInfo,
    patches: np.ndarray,
    positions: np.ndarray,
    scores: np.ndarray,
    motion: np.ndarray,
    frames: np.ndarray,
) -> dict[str, bytes]:
    """Members of a video sample.

    patches: uint8 [K, p, p, 3] in the order of positions [K, 3]; frames: uint8 [M, H, W, 3].
    """
    count, patch_size = patches.shape[:2]
    side = tile_side(patch_size)
    rows = -(-count // TILE_COLUMNS)
    missing = rows * TILE_COLUMNS - count
    pad = side - patch_size
    # edges are repeated; in the last row of tiles the last patch fills what is missing
    tile_borders = ((0, missing), (0, pad), (0, pad), (0, 0))
    tiles = np.pad(patches, tile_borders, mode="edge")
    grid = tiles.reshape(rows, TILE_COLUMNS, side, side, 3).swapaxes(1, 2)
    pad = strip_rows(info.height) - info.height
    frame_borders = ((0, 0), (0, pad), (0, 0), (0, 0))
    strip = np.pad(frames, frame_borders, mode="edge")
    return {
        "json": info.to_bytes(),
        "tiles.jpg": _jpeg(grid.reshape(rows * side, TILE_COLUMNS * side, 3)),
        "positions.npy": array_bytes(positions.astype(np.uint16)),
        "scores.npy": array_bytes(scores.astype(np.float16)),
        "motion.npy": array_bytes(motion.astype(np.float16)),
        "frames.jpg": _jpeg(strip.reshape(-1, info.width, 3)),
    }


def encode_image(info: SampleInfo, image: np.ndarray) -> dict[str, bytes]:
    """Members of an image sample; image uint8 [H, W, 3]."""
    return {"json": info.to_bytes(), "jpg": _jpeg(image)}


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    # full chroma: at 4:2:0 a chroma sample would hold pixels of two tiles
    Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    return stream.getvalue()


def decode_array(data: bytes, member: str, name: str) -> np.ndarray:
    """Read a .npy member: fixed dtype and number of dimensions, bounded size, finite numbers.
    CorruptShard names the sample.
    """
    label = f"{name}.{member}"
    if len(data) > MAX_ARRAY_BYTES:
        raise CorruptShard(f"{label} has {len(data)} bytes, at most {MAX_ARRAY_BYTES} are read")
    dtype, shape = ARRAYS[member]
    array = parse_array(data, dtype=dtype, name=label)
    check_array(array, shape=shape, name=label)
    return array.copy()


def check_positions(positions: np.ndarray, count: int, grid: tuple[int, int], name: str) -> None:
    """CorruptShard unless positions uint16 [K, 3] are `count` different patches (t, h, w) of the
    time base and a grid of (rows, columns). 40 us for 2048 of them."""
    if positions.shape != (count, 3):
        raise CorruptShard(f"{name}: positions {positions.shape} for {count} patches")
    bounds = (TIME_BASE, *grid)
    rows, columns = grid
    t, h, w = np.ascontiguousarray(positions.T)
    # column by column; whole rows are compared only where an error names one
    is_outside = t.max() >= TIME_BASE or h.max() >= rows or w.max() >= columns
    if is_outside:
        worst = positions[(positions >= bounds).any(axis=1)][0].tolist()
        raise CorruptShard(
            f"{name}: a patch stands at (t, h, w) = {tuple(worst)}, the sample has {bounds}"
        )
    # sorted, not marked in an array of the grid: its size is only what a record claims
    indices = (t.astype(np.int64) * rows + h) * columns + w
    indices.sort()
    if (indices[1:] == indices[:-1]).any():
        raise CorruptShard(f"{name}: two patches stand at one place")


def decode_jpeg(data: bytes, size: tuple[int, int], name: str) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a JPEG member of `size` (H, W), by Pillow (tools and tests; training
    decodes with DALI). CorruptShard names an image that is another one or cannot be decoded.
    """
    from PIL import Image

    check_jpeg(data, size=size, name=name)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise CorruptShard(f"{name} cannot be decoded ({error})") from error


def decode_patches(info: SampleInfo, mosaic: bytes, name: str) -> np.ndarray:
    """uint8 [K, p, p, 3], the selected patches of a clip from its KEY.tiles.jpg; errors as of
    decode_jpeg."""
    size = mosaic_size(info.num_patches, info.patch_size)
    image = decode_jpeg(mosaic, size=size, name=f"{name}.tiles.jpg")
    side = tile_side(info.patch_size)
    rows = image.shape[0] // side
    tiles = image.reshape(rows, side, TILE_COLUMNS, side, 3).swapaxes(1, 2)
    tiles = tiles.reshape(-1, side, side, 3)[: info.num_patches]
    return tiles[:, : info.patch_size, : info.patch_size]


def decode_frames(info: SampleInfo, member: bytes, name: str) -> np.ndarray:
    """uint8 [M, H, W, 3], the whole frames of a clip from its KEY.frames.jpg, or the one image of
    an image sample from its KEY.jpg (see frames_member); errors as of decode_jpeg."""
    label = f"{name}.{frames_member(info.kind)}"
    if info.kind == "image":
        return decode_jpeg(member, size=(info.height, info.width), name=label)[None]
    strip = decode_jpeg(member, size=strip_size(info), name=label)
    frames = strip.reshape(-1, strip_rows(info.height), info.width, 3)
    return frames[:, : info.height]


def frames_member(kind: str) -> str:
    """The member that holds whole frames of a sample of this kind."""
    return "jpg" if kind == "image" else "frames.jpg"
