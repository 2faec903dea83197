"""A picture of what the encoder sees: for each sample its frames, the motion and residual in them,
and the patches that were kept, beside what plain frame sampling would have kept.

Everything drawn comes out of the shard. Rows of a sample: frames; motion (direction is hue, speed
is brightness, as on a colour wheel); residual (brightness); the kept patches on black, whole for
I-frames; and frame sampling, the whole frames that the same number of tokens buys. A GIF shows
frame, motion, residual and, side by side, frame sampling against codec input. Images are shown
once.
"""

from pathlib import Path

import numpy as np

from ..loading.shard_reader import ShardReader
from ..picture_files import write_picture
from .manifest import Manifest
from .schema import SampleInfo, decode_array, decode_frames, decode_patches

COLUMNS = 8
GAP = 4
BRIGHT_RESIDUAL = 32.0  # luma steps drawn white
ROWS = ("frames", "motion", "residual", "codec input", "frame sampling")


def read_sample(manifest: Manifest, sample_id: int) -> tuple[SampleInfo, dict[str, bytes]]:
    """Metadata and member bytes of one sample, checked against their crc32."""
    shard, sample = manifest.locate(sample_id)
    with ShardReader(manifest) as reader:
        members = {ext: reader.read(sample_id, ext) for ext in sample["members"]}
    return SampleInfo.from_bytes(members["json"], f"{shard['name']}/{sample['key']}"), members


def contact_sheet(manifest: Manifest, sample_ids: list[int]) -> np.ndarray:
    """uint8 RGB sheet, five rows of up to COLUMNS pictures per sample, see ROWS."""
    blocks = []
    for sample_id in sample_ids:
        info, members = read_sample(manifest, sample_id)
        if info.kind == "image":
            rows = [[decode_frames(info, members["jpg"], info.source)[0]]]
        else:
            rows = _clip_rows(info, members)
        blocks += [_row(pictures) for pictures in rows]
    width = max(block.shape[1] for block in blocks)
    padded = [
        np.pad(block, ((0, GAP), (0, width - block.shape[1]), (0, 0)), constant_values=255)
        for block in blocks
    ]
    return np.concatenate(padded)


def animation(manifest: Manifest, sample_id: int) -> list[np.ndarray]:
    """One picture per stored frame: frame, motion, residual, frame sampling and codec input side by
    side, the last two filling up as time goes on.
    """
    info, members = read_sample(manifest, sample_id)
    if info.kind == "image":
        return [decode_frames(info, members["jpg"], info.source)[0]]
    frames, motion, residual, codec, sampling = _clip_rows(info, members, every=True)
    columns = zip(frames, motion, residual, _held(sampling), _held(codec), strict=True)
    return [_row(list(pictures)) for pictures in columns]


def _held(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Each picture over what was shown before it: black stands for nothing new."""
    shown, held = np.zeros_like(pictures[0]), []
    for picture in pictures:
        shown = np.where(picture.any(axis=-1, keepdims=True), picture, shown)
        held.append(shown)
    return held


def save_view(manifest: Manifest, sample_ids: list[int], path: Path) -> None:
    """Write a .png contact sheet of the samples, or a .gif of each
    (NAME_ID.gif where there are several).
    ValueError for another suffix.
    """
    from PIL import Image

    wrong = [i for i in sample_ids if not 0 <= i < len(manifest)]
    if wrong or not sample_ids:
        raise ValueError(f"--samples {wrong}: the folder has samples 0 to {len(manifest) - 1}")
    if path.suffix == ".png":
        write_picture(path, Image.fromarray(contact_sheet(manifest, sample_ids)))
    elif path.suffix == ".gif":
        for sample_id in sample_ids:
            one = path if len(sample_ids) == 1 else path.with_stem(f"{path.stem}_{sample_id}")
            first, *rest = (Image.fromarray(picture) for picture in animation(manifest, sample_id))
            options = {"save_all": True, "append_images": rest, "duration": 200, "loop": 0}
            write_picture(one, first, **options)
    else:
        raise ValueError(f"--output {path} must end in .png (contact sheet) or .gif (animation)")


def _clip_rows(info: SampleInfo, members, every: bool = False) -> list[list[np.ndarray]]:
    frames = decode_frames(info, members["frames.jpg"], info.source)
    motion = decode_array(members["motion.npy"], "motion.npy", info.source)
    positions = decode_array(members["positions.npy"], "positions.npy", info.source).astype(int)
    tiles = decode_patches(info, members["tiles.jpg"], info.source)
    shown = (
        range(len(frames))
        if every
        else np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames))).astype(int)
    )
    fastest = max(float(np.linalg.norm(motion[..., :2].astype(np.float32), axis=-1).max()), 1.0)
    bought = _sampled_frames(info, len(frames))
    rows: list[list[np.ndarray]] = [[] for _ in ROWS]
    for i in shown:
        time = info.frame_times[i]
        until = info.frame_times[i + 1] if i + 1 < len(frames) else time + 1
        index = round(time * (info.num_frames - 1) / max(info.frame_times[-1], 1))
        rows[0].append(frames[i])
        rows[1].append(_motion_picture(motion[index], fastest, info))
        rows[2].append(_residual_picture(motion[index], info))
        rows[3].append(_kept_picture(tiles, positions, time, until, info))
        rows[4].append(frames[i] if i in bought else np.zeros_like(frames[i]))
    return rows


def _sampled_frames(info: SampleInfo, num_stored: int) -> set[int]:
    """Stored frames that the clip's token budget buys whole, evenly spread."""
    affordable = max(1, info.num_patches // (info.grid[0] * info.grid[1]))
    places = np.linspace(0, num_stored - 1, min(affordable, num_stored))
    return set(np.rint(places).astype(int).tolist())


def _motion_picture(motion: np.ndarray, fastest: float, info: SampleInfo) -> np.ndarray:
    from PIL import Image

    x, y = motion[..., 0].astype(np.float32), motion[..., 1].astype(np.float32)
    hue = (np.arctan2(y, x) / (2 * np.pi) % 1 * 255).astype(np.uint8)
    value = (np.clip(np.hypot(x, y) / fastest, 0, 1) * 255).astype(np.uint8)
    hsv = np.stack([hue, np.full_like(hue, 255), value], axis=-1)
    return _enlarged(Image.fromarray(hsv, mode="HSV").convert("RGB"), info)


def _residual_picture(motion: np.ndarray, info: SampleInfo) -> np.ndarray:
    from PIL import Image

    share = np.clip(motion[..., 2].astype(np.float32) / BRIGHT_RESIDUAL, 0, 1)
    return _enlarged(Image.fromarray((255 * share).astype(np.uint8)).convert("RGB"), info)


def _enlarged(picture, info: SampleInfo) -> np.ndarray:
    from PIL import Image

    return np.asarray(picture.resize((info.width, info.height), Image.Resampling.NEAREST))


def _kept_picture(tiles, positions, start: int, stop: int, info: SampleInfo) -> np.ndarray:
    """All kept patches with start <= t < stop, later ones on top."""
    picture = np.zeros((info.height, info.width, 3), np.uint8)
    chosen = np.flatnonzero((positions[:, 0] >= start) & (positions[:, 0] < stop))
    for k in chosen[np.argsort(positions[chosen, 0], kind="stable")]:
        top, left = positions[k, 1:] * info.patch_size
        picture[top : top + info.patch_size, left : left + info.patch_size] = tiles[k]
    return picture


def _row(pictures: list[np.ndarray]) -> np.ndarray:
    height = max(picture.shape[0] for picture in pictures)
    cells = [
        np.pad(p, ((0, height - p.shape[0]), (0, GAP), (0, 0)), constant_values=255)
        for p in pictures
    ]
    return np.concatenate(cells, axis=1)
