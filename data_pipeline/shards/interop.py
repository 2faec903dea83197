"""Packed clips in the public layout of codec LLaVA training, and its index files.

    OUTPUT/assets/KEY/mosaic_000.png ... mosaic_007.png   the kept patches by (t, h, w), an eighth
                                                          each, row by row
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

from ..arrays import write_array
from ..errors import CorruptShard
from ..loading.shard_reader import ShardReader
from ..picture_files import write_picture
from .manifest import Manifest, how_to_repack
from .schema import MAX_SIDE, SampleInfo, check_positions, decode_array, decode_patches

NUM_MOSAICS = 8
JPEG_QUALITY = 95
PUBLIC_FIELDS = {"grid": list, "patch_size": int, "valid": int}
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


def export_mosaics(manifest: Manifest, output: Path, image_format: str = "png", report=show) -> int:
    """Write every clip of a packed folder; returns their number.

    Raises ValueError for an image format other than png and jpg.
    """
    if image_format not in ("png", "jpg"):
        raise ValueError(f"--image-format {image_format!r}: choose png or jpg")
    records, images = [], 0
    with ShardReader(manifest) as reader:
        for sample_id in range(len(manifest)):
            shard, sample = manifest.locate(sample_id)
            if sample["kind"] != "video":
                images += 1
                continue
            info = SampleInfo.from_bytes(reader.read(sample_id, "json"), sample["key"])
            if not is_plain_name(sample["key"]):
                raise CorruptShard(
                    f"{shard['name']}.json names a sample {sample['key']!r:.80}, which leads out "
                    f"of the output; {how_to_repack(shard['name'])}"
                )
            folder = output / "assets" / sample["key"]
            if not _is_written(folder, info, image_format):
                _write_clip(folder, _read_clip(reader, sample_id, info), info, image_format)
            records.append(_record(sample["key"], info, image_format))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "samples.jsonl", lines.encode())
    if images:
        report(f"{images} images are left out: the layout is of clips")
    return len(records)


def _is_written(folder: Path, info: SampleInfo, image_format: str) -> bool:
    """Whether a clip was written from the same source, and every byte of it is as it was then."""
    try:
        meta = read_json(folder / "meta.json", META_FIELDS)
    except (FileNotFoundError, DamagedFile):
        return False
    found = (meta["source_sha256"], meta["packed_patches"], meta["grid"], meta["image_format"])
    same = (info.source_sha256, info.num_patches, list(info.grid), image_format)
    return found == same and not _changed_files(folder, meta)


def _changed_files(folder: Path, meta: dict) -> list[str]:
    """Files of a clip that are not as its meta.json says."""
    return [
        name
        for name, sha256 in meta["files"].items()
        if not is_plain_name(name)
        or not (folder / name).is_file()
        or file_sha256(folder / name) != sha256
    ]


def _read_clip(reader: ShardReader, sample_id: int, info: SampleInfo) -> MosaicClip:
    rows, columns = info.grid
    wanted = NUM_MOSAICS * rows * columns
    name = info.source
    positions = decode_array(reader.read(sample_id, "positions.npy"), "positions.npy", name)
    check_positions(positions, count=info.num_patches, grid=info.grid, name=name)
    patches = decode_patches(info, reader.read(sample_id, "tiles.jpg"), name)
    positions, patches = positions[:wanted].astype(np.int32), patches[:wanted]
    order = np.lexsort(positions.T[::-1])
    order = np.append(order, np.full(wanted - len(order), order[-1]))
    return MosaicClip(patches[order], positions[order], min(info.num_patches, wanted))


def _write_clip(folder: Path, clip: MosaicClip, info: SampleInfo, image_format: str) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    for pattern in ("mosaic_*.png", "mosaic_*.jpg"):  # those of another format
        for stale in folder.glob(pattern):
            stale.unlink()
    (rows, columns), p = info.grid, info.patch_size
    pictures = clip.patches.reshape(NUM_MOSAICS, rows, columns, p, p, 3).swapaxes(2, 3)
    options = {"quality": JPEG_QUALITY, "subsampling": "4:4:4"} if image_format == "jpg" else {}
    names = [f"mosaic_{number:03d}.{image_format}" for number in range(NUM_MOSAICS)]
    for name, picture in zip(names, pictures, strict=True):
        image = Image.fromarray(picture.reshape(rows * p, columns * p, 3))
        write_picture(folder / name, image, **options)
    write_array(folder / "positions_thw.npy", clip.positions)
    write_visidx(folder / f"{folder.name}.visidx.npy", clip.positions[: clip.valid], info.grid)
    write_array(folder / "frame_ids.npy", np.unique(clip.positions[:, 0]).astype(np.int32))
    names += ["positions_thw.npy", f"{folder.name}.visidx.npy", "frame_ids.npy"]
    meta = {
        "source": info.source,
        "source_sha256": info.source_sha256,
        "packed_patches": info.num_patches,
        "grid": list(info.grid),
        "patch_size": p,
        "num_patches": len(clip.positions),
        "valid": clip.valid,
        "is_static": info.is_static,
        "image_format": image_format,
        "files": {name: file_sha256(folder / name) for name in names},
    }
    write_json(folder / "meta.json", meta)


def _record(key: str, info: SampleInfo, image_format: str) -> dict:
    folder = f"assets/{key}"
    return {
        "id": key,
        "source": info.source,
        "image": [f"{folder}/mosaic_{n:03d}.{image_format}" for n in range(NUM_MOSAICS)],
        "positions_thw": f"{folder}/positions_thw.npy",
        "conversations": [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": ""}],
    }


def read_mosaics(folder: Path) -> MosaicClip:
    """An exported clip, or one of the public tools with a meta.json as above.

    Raises ValueError when pictures and positions do not fit each other, and for a clip of ours of
    which a file changed since it was written.
    """
    from PIL import Image

    meta = _read_meta(folder)
    (rows, columns), p = meta["grid"], meta["patch_size"]
    pictures = []
    shapes = set()
    for path in sorted(folder.glob("mosaic_*.*")):
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            shapes.add((image.height, image.width))
            if shapes == {(rows * p, columns * p)}:  # else the header says too much
                pictures.append(np.asarray(image.convert("RGB")))
    positions = np.load(folder / "positions_thw.npy", allow_pickle=False)
    count = len(pictures) * rows * columns
    fits = positions.shape == (count, 3) and positions.dtype.kind in "iu" and count
    if shapes != {(rows * p, columns * p)} or not fits:
        raise ValueError(
            f"{folder}: {len(pictures)} mosaics of {sorted(shapes)} do not hold the patches of "
            f"positions {positions.dtype} {list(positions.shape)} on a {rows} x {columns} grid of "
            f"{p} px"
        )
    if positions.min() < 0 or (positions[:, 1:] >= (rows, columns)).any():
        raise ValueError(f"{folder}: positions lie outside of a {rows} x {columns} grid")
    if not 1 <= meta["valid"] <= count:
        raise ValueError(f"{folder}: valid is {meta['valid']} of {count} patches")
    grid = np.stack(pictures).reshape(len(pictures), rows, p, columns, p, 3).swapaxes(2, 3)
    return MosaicClip(grid.reshape(-1, p, p, 3), positions, meta["valid"])


def _read_meta(folder: Path) -> dict:
    """What meta.json says, checked as far as who wrote it allows: ours binds the other files."""
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
    if len(sizes) != 3 or not all(type(size) is int and 0 < size < MAX_SIDE for size in sizes):
        raise DamagedFile(f"{path}: grid {meta['grid']} of patches of {meta['patch_size']} px")
    return meta


def write_visidx(path: Path, positions: np.ndarray, grid: tuple[int, int]) -> None:
    """Positions [K, 3] as a public index file: int32 [K], ascending t*gh*gw + h*gw + w."""
    rows, columns = grid
    t, h, w = positions.astype(np.int64).T
    write_array(path, np.sort((t * rows + h) * columns + w).astype(np.int32))


def read_visidx(path: Path, grid: tuple[int, int], num_frames: int = 64) -> np.ndarray:
    """Positions int32 [K, 3] of a public index file over (num_frames, gh, gw).

    Reads int32 and the older uint16 files. Raises ValueError for another dtype, shape or range.
    """
    rows, columns = grid
    linear = np.load(path, allow_pickle=False)
    if linear.ndim != 1 or linear.dtype not in (np.int32, np.uint16):
        raise ValueError(f"{path} holds {linear.dtype} {list(linear.shape)}, expected int32 [K]")
    total = num_frames * rows * columns
    linear = linear.astype(np.int64)
    if linear.size and not 0 <= linear.min() <= linear.max() < total:
        raise ValueError(
            f"{path} has indices {linear.min()} to {linear.max()}, the grid {num_frames} x {rows} "
            f"x {columns} has 0 to {total - 1}"
        )
    t, h, w = linear // (rows * columns), linear // columns % rows, linear % columns
    return np.stack([t, h, w], axis=-1).astype(np.int32)
