"""Packed clips in the public layout of codec LLaVA training, and its index files.

    OUTPUT/assets/KEY/mosaic_000.png ... mosaic_007.png   the selected patches by (t, h, w), an
                                                          eighth each, row by row
    OUTPUT/assets/KEY/positions_thw.npy                   int32 [K, 3], row i = patch i of them all
    OUTPUT/assets/KEY/KEY.visidx.npy                      int32 [K] ascending t*gh*gw + h*gw + w
    OUTPUT/assets/KEY/frame_ids.npy                       int32, times of the frames with a patch
    OUTPUT/assets/KEY/meta.json                           source, grid, counts, sha256 of the files
                                                          above, its own digest; written last
    OUTPUT/samples.jsonl                                  one conversation record per clip

K is eight mosaics of one frame's grid each; a clip with fewer patches repeats its last one (`valid`
in meta.json says how many count), a longer one gives its best. PNG by default: JPEG lets patches of
different frames bleed into each other. Images are left out. Clips whose meta.json fits are kept.

Shape legend: K patches, gh, gw patch rows and columns of a frame, p patch size.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_factory.command_line.plain_text import show
from model_factory.files import (
    DIGEST_KEY,
    DamagedFile,
    check_fields,
    file_sha256,
    is_plain_name,
    open_seal,
    parse_json,
    read_json,
    write_atomically,
    write_json,
)

from ..errors import CorruptShard
from ..loading.shard_reader import ShardReader
from ..side_files import write_array, write_picture
from .inputs import Report
from .manifest import Manifest, how_to_repack
from .schema import MAX_SIDE, SampleInfo, check_positions, decode_array, decode_patches

NUM_MOSAICS = 8  # of the public layout
JPEG_QUALITY = 95  # above the shard's own 90: the patches are encoded a second time here
PUBLIC_FIELDS = {"grid": list, "patch_size": int, "valid": int}
# what our own export adds: which source a clip was made of, and the hashes of its files
META_FIELDS = {
    **PUBLIC_FIELDS,
    "source_sha256": str,
    "packed_patches": int,
    "image_format": str,
    "files": dict,
}
PROMPT = "<image>\n" * NUM_MOSAICS + "Describe the video."


@dataclass(frozen=True)
class MosaicClip:
    """Patches uint8 [K, p, p, 3] and positions int32 [K, 3] of an exported clip; the first `valid`
    count.
    """

    patches: np.ndarray
    positions: np.ndarray
    valid: int


def export_mosaics(
    manifest: Manifest,
    output: Path,
    image_format: str = "png",
    report: Report = show,
) -> int:
    """Write every clip of a packed folder; returns their number.

    Raises ValueError for an image format other than png and jpg.
    """
    if image_format not in ("png", "jpg"):
        raise ValueError(f"--image-format {image_format!r}: choose png or jpg")
    records = []
    num_images = 0
    with ShardReader(manifest) as reader:
        for sample_id in range(len(manifest)):
            shard, sample = manifest.locate(sample_id)
            key = sample["key"]
            if sample["kind"] != "video":
                num_images += 1
                continue
            info = SampleInfo.from_bytes(reader.read(sample_id, "json"), name=key)
            if not is_plain_name(key):
                raise CorruptShard(
                    f"{shard['name']}.json names a sample {key!r:.80}, which leads out of the "
                    f"output; {how_to_repack(shard['name'])}"
                )
            folder = output / "assets" / key
            if not _is_written(folder, info=info, image_format=image_format):
                clip = _read_clip(reader, sample_id, info=info)
                _write_clip(folder, clip, info=info, image_format=image_format)
            assets = f"assets/{key}"
            record = {
                "id": key,
                "source": info.source,
                "image": [f"{assets}/{name}" for name in _mosaic_names(image_format)],
                "positions_thw": f"{assets}/positions_thw.npy",
                "conversations": [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": ""}],
            }
            records.append(record)
    output.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records]
    write_atomically(output / "samples.jsonl", "".join(lines).encode())
    if num_images:
        report(f"{num_images} images are left out: the layout is of clips")
    return len(records)


def _mosaic_names(image_format: str) -> list[str]:
    return [f"mosaic_{number:03d}.{image_format}" for number in range(NUM_MOSAICS)]


def _identity(info: SampleInfo, image_format: str) -> dict:
    """Fields of meta.json by which a clip that was written before is recognised."""
    return {
        "source_sha256": info.source_sha256,
        "packed_patches": info.num_patches,
        "grid": list(info.grid),
        "image_format": image_format,
    }


def _is_written(folder: Path, info: SampleInfo, image_format: str) -> bool:
    """Whether a clip was written from the same source, and every byte of it is as it was then."""
    try:
        meta = read_json(folder / "meta.json", META_FIELDS)
    except (FileNotFoundError, DamagedFile):
        return False
    is_same = _identity(info, image_format).items() <= meta.items()
    return is_same and not _changed_files(folder, meta)


def _changed_files(folder: Path, meta: dict) -> list[str]:
    """Files of a clip that are not as its meta.json states."""
    changed = []
    for name, sha256 in meta["files"].items():
        path = folder / name
        # checked in this order: a name that leads out of the folder is never opened
        if not (is_plain_name(name) and path.is_file() and file_sha256(path) == sha256):
            changed.append(name)
    return changed


def _read_clip(reader: ShardReader, sample_id: int, info: SampleInfo) -> MosaicClip:
    rows, columns = info.grid
    wanted = NUM_MOSAICS * rows * columns
    name = info.source
    data = reader.read(sample_id, "positions.npy")
    positions = decode_array(data, "positions.npy", name=name)
    check_positions(positions, count=info.num_patches, grid=info.grid, name=name)
    patches = decode_patches(info, reader.read(sample_id, "tiles.jpg"), name=name)
    # the best ones come first in a shard; in a mosaic patches lie by time, row and column
    order = np.lexsort(positions[:wanted].T[::-1])
    # the layout has a fixed number of patches: the last one fills what is missing
    filling = np.full(wanted - len(order), order[-1])
    order = np.append(order, filling)
    return MosaicClip(
        patches=patches[order],
        positions=positions[order].astype(np.int32),
        valid=min(info.num_patches, wanted),
    )


def _write_clip(folder: Path, clip: MosaicClip, info: SampleInfo, image_format: str) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    # removed first and written last: a clip that is killed half-way is written again
    (folder / "meta.json").unlink(missing_ok=True)
    # those of another format too
    for stale in (*folder.glob("mosaic_*.png"), *folder.glob("mosaic_*.jpg")):
        stale.unlink()
    rows, columns = info.grid
    p = info.patch_size
    # patch rows and pixel rows are adjacent in an image: [row, column, y, x] -> [row, y, column, x]
    grids = clip.patches.reshape(NUM_MOSAICS, rows, columns, p, p, 3)
    mosaics = grids.swapaxes(2, 3)
    options = {"quality": JPEG_QUALITY, "subsampling": "4:4:4"} if image_format == "jpg" else {}
    names = _mosaic_names(image_format)
    for name, mosaic in zip(names, mosaics, strict=True):
        image = Image.fromarray(mosaic.reshape(rows * p, columns * p, 3))
        write_picture(folder / name, image, **options)
    visidx = f"{folder.name}.visidx.npy"
    write_array(folder / "positions_thw.npy", clip.positions)
    write_visidx(folder / visidx, clip.positions[: clip.valid], grid=info.grid)
    times = np.unique(clip.positions[:, 0])
    write_array(folder / "frame_ids.npy", times.astype(np.int32))
    names += ["positions_thw.npy", visidx, "frame_ids.npy"]
    meta = {
        "source": info.source,
        **_identity(info, image_format),
        "patch_size": p,
        "num_patches": len(clip.positions),
        "valid": clip.valid,
        "is_static": info.is_static,
        "files": {name: file_sha256(folder / name) for name in names},
    }
    write_json(folder / "meta.json", meta)


def read_mosaics(folder: Path) -> MosaicClip:
    """An exported clip, or one of the public tools with a meta.json as above.

    Raises ValueError when images and positions do not fit each other, and for a clip of ours of
    which a file changed since it was written.
    """
    from PIL import Image

    meta = _read_meta(folder)
    rows, columns = meta["grid"]
    p = meta["patch_size"]
    size = (rows * p, columns * p)
    mosaics = []
    sizes = set()
    for path in sorted(folder.glob("mosaic_*.*")):
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            sizes.add((image.height, image.width))
            # decoded only if the header states what meta.json does: it may claim a huge image
            if sizes == {size}:
                mosaics.append(np.asarray(image.convert("RGB")))
    positions = np.load(folder / "positions_thw.npy", allow_pickle=False)
    count = len(mosaics) * rows * columns
    fits = positions.shape == (count, 3) and positions.dtype.kind in "iu"
    if sizes != {size} or not fits:
        raise ValueError(
            f"{folder}: {len(mosaics)} mosaics of {sorted(sizes)} do not hold the patches of "
            f"positions {positions.dtype} {list(positions.shape)} on a {rows} x {columns} grid of "
            f"{p} px"
        )
    is_beyond_grid = (positions[:, 1:] >= (rows, columns)).any()
    if positions.min() < 0 or is_beyond_grid:
        raise ValueError(f"{folder}: positions lie outside of a {rows} x {columns} grid")
    if not 1 <= meta["valid"] <= count:
        raise ValueError(f"{folder}: valid is {meta['valid']} of {count} patches")
    # the reverse of what _write_clip does: [row, y, column, x] -> [row, column, y, x]
    pixels = np.stack(mosaics).reshape(len(mosaics), rows, p, columns, p, 3)
    patches = pixels.swapaxes(2, 3)
    return MosaicClip(
        patches=patches.reshape(-1, p, p, 3),
        positions=positions,
        valid=meta["valid"],
    )


def _read_meta(folder: Path) -> dict:
    """Content of meta.json, checked as far as who wrote it allows: ours binds the other files."""
    path = folder / "meta.json"
    data = path.read_bytes()
    meta = parse_json(data, str(path))
    if DIGEST_KEY in meta:
        meta = open_seal(meta, data=data, name=str(path))
        changed = _changed_files(folder, meta)
        if changed:
            raise DamagedFile(
                f"{folder}: {', '.join(changed)} changed since it was written: export again, which "
                "writes this clip anew"
            )
    check_fields(meta, fields=PUBLIC_FIELDS, name=str(path))
    sizes = (*meta["grid"], meta["patch_size"])
    # bounded, since sizes of arrays are computed from them; `type`, because True is an int too
    are_sizes = [type(size) is int and 0 < size < MAX_SIDE for size in sizes]
    if len(sizes) != 3 or not all(are_sizes):
        raise DamagedFile(f"{path}: grid {meta['grid']} of patches of {meta['patch_size']} px")
    return meta


def write_visidx(path: Path, positions: np.ndarray, grid: tuple[int, int]) -> None:
    """Positions [K, 3] as a public index file: int32 [K], ascending t*gh*gw + h*gw + w."""
    rows, columns = grid
    t, h, w = positions.astype(np.int64).T
    ascending = np.sort((t * rows + h) * columns + w)
    write_array(path, ascending.astype(np.int32))


def read_visidx(path: Path, grid: tuple[int, int], num_frames: int = 64) -> np.ndarray:
    """Positions int32 [K, 3] of a public index file over (num_frames, gh, gw).

    Reads int32 and the older uint16 files. Raises ValueError for another dtype, shape or range.
    """
    shape = (num_frames, *grid)
    indices = np.load(path, allow_pickle=False)
    if indices.ndim != 1 or indices.dtype not in (np.int32, np.uint16):
        raise ValueError(f"{path} holds {indices.dtype} {list(indices.shape)}, expected int32 [K]")
    total = math.prod(shape)
    if indices.size and not 0 <= indices.min() <= indices.max() < total:
        raise ValueError(
            f"{path} has indices {indices.min()} to {indices.max()}, the grid "
            f"{' x '.join(map(str, shape))} has 0 to {total - 1}"
        )
    # row-major, as write_visidx counts
    positions = np.stack(np.unravel_index(indices, shape), axis=-1)
    return positions.astype(np.int32)
