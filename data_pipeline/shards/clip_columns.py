"""What a drawn image shows of one sample, read from its shard.

A clip is shown in columns: each is a stored frame and what happens from it until the next column,
so that every selected patch is in exactly one of them.
"""

from dataclasses import dataclass

import numpy as np

from ..loading.shard_reader import ShardReader
from .manifest import Manifest
from .schema import TIME_BASE, SampleInfo, decode_array, decode_frames, decode_patches

# full brightness is what three of four columns stay below, so that a scene cut does not darken the
# others, and at least the floors of codec.saliency, so that the noise of a still scene stays dark
BRIGHT_PERCENTILE = 75
MOTION_FLOOR = 0.25
RESIDUAL_FLOOR = 1.0


@dataclass(frozen=True)
class Column:
    """A stored frame of a clip, and what was selected from its time until the next column's.

    Shape legend: H, W working size, G cells of the motion field, h, w patch grid.
    """

    frame: np.ndarray  # uint8 [H, W, 3]
    seconds: float | None  # presentation time, None where the shard has none
    motion: np.ndarray  # float32 [G, G, 2], mean over the span, pixels per frame
    residual: np.ndarray  # float32 [G, G], mean over the span, luma steps
    patches: np.ndarray  # uint8 [H, W, 3], later patches on top
    selected: np.ndarray  # bool [h, w]
    rank: np.ndarray  # float32 [h, w]: 1 the best P-frame patch of the clip, 0 the last one
    intra: np.ndarray  # bool [h, w]: the patch on top is of an I-frame
    num_intra: int  # I-frame patches in the span
    num_inter: int  # P-frame patches in the span
    bought: bool  # frame sampling would have taken this frame, whole


@dataclass(frozen=True)
class ClipView:
    """A clip in columns, with the motion and the residual that are drawn at full brightness."""

    info: SampleInfo
    columns: list[Column]
    fastest: float
    strongest: float


@dataclass(frozen=True)
class ImageView:
    """An image sample: uint8 [H, W, 3]."""

    info: SampleInfo
    picture: np.ndarray


def read_sample(manifest: Manifest, sample_id: int) -> tuple[SampleInfo, dict[str, bytes]]:
    """Metadata and member bytes of one sample, checked against their crc32."""
    shard, sample = manifest.locate(sample_id)
    with ShardReader(manifest) as reader:
        members = {ext: reader.read(sample_id, ext) for ext in sample["members"]}
    name = f"{shard['name']}/{sample['key']}"
    info = SampleInfo.from_bytes(members["json"], name=name)
    return info, members


def sample_view(
    manifest: Manifest, sample_id: int, columns: int | None = None
) -> ClipView | ImageView:
    """What an image shows of a sample: all stored frames, or `columns` evenly spread ones."""
    info, members = read_sample(manifest, sample_id)
    if info.kind == "image":
        frames = decode_frames(info, member=members["jpg"], name=info.source)
        return ImageView(info, picture=frames[0])
    return _clip_view(info, members=members, columns=columns)


def _clip_view(info: SampleInfo, members: dict[str, bytes], columns: int | None) -> ClipView:
    name = info.source
    frames = decode_frames(info, member=members["frames.jpg"], name=name)
    field = decode_array(members["motion.npy"], member="motion.npy", name=name)
    field = field.astype(np.float32)  # a mean of float16 values is a float16 again
    positions = decode_array(members["positions.npy"], member="positions.npy", name=name)
    positions = positions.astype(int)
    tiles = decode_patches(info, mosaic=members["tiles.jpg"], name=name)
    intra = np.isin(positions[:, 0], info.i_frame_times)
    shown = np.arange(len(frames))
    if columns is not None and columns < len(frames):
        shown = np.linspace(0, len(frames) - 1, columns).astype(int)
    bought = _bought_columns(info, len(shown))
    # spans meet without a gap, and the last one ends with the time base: no patch is left out
    starts = [info.frame_times[i] for i in shown]
    stops = [*starts[1:], TIME_BASE]
    made = []
    for index, (frame, start, stop) in enumerate(zip(shown, starts, stops, strict=True)):
        first, last = _frames_between(info.num_frames, start=start, stop=stop)
        span = field[first:last].mean(axis=0)
        times = positions[:, 0]
        inside = (times >= start) & (times < stop)
        made.append(
            Column(
                frame=frames[frame],
                seconds=info.seconds[first] if len(info.seconds) == info.num_frames else None,
                motion=span[..., :2],
                residual=span[..., 2],
                num_intra=int((inside & intra).sum()),
                num_inter=int((inside & ~intra).sum()),
                bought=index in bought,
                **_selected_maps(
                    tiles,
                    positions=positions,
                    intra=intra,
                    chosen=np.flatnonzero(inside),
                    info=info,
                ),
            )
        )
    # brightness of the whole clip, by its columns' largest values
    speeds = [np.linalg.norm(column.motion, axis=-1).max() for column in made]
    residuals = [column.residual.max() for column in made]
    return ClipView(
        info=info,
        columns=made,
        fastest=max(float(np.percentile(speeds, BRIGHT_PERCENTILE)), MOTION_FLOOR),
        strongest=max(float(np.percentile(residuals, BRIGHT_PERCENTILE)), RESIDUAL_FLOOR),
    )


def _frames_between(num_frames: int, start: int, stop: int) -> tuple[int, int]:
    """Range of the clip's frames with start <= time < stop on the 0..63 time base; not empty."""
    # as codec.decompose.frame_times gives them
    evenly = np.arange(num_frames) / max(num_frames - 1, 1) * (TIME_BASE - 1)
    times = np.rint(evenly)
    first = int(np.abs(times - start).argmin())
    return first, max(int((times < stop).sum()), first + 1)


def _bought_columns(info: SampleInfo, num_columns: int) -> set[int]:
    """Columns whose whole frames the clip's token budget buys, evenly spread."""
    rows, columns = info.grid
    # at least one frame, though a small budget does not pay for a whole one
    affordable = max(1, info.num_patches // (rows * columns))
    spread = np.linspace(0, num_columns - 1, min(affordable, num_columns))
    return set(np.rint(spread).astype(int).tolist())


def _selected_maps(
    tiles: np.ndarray,
    positions: np.ndarray,
    intra: np.ndarray,
    chosen: np.ndarray,
    info: SampleInfo,
) -> dict[str, np.ndarray]:
    """Column's patches, selected, rank and intra of the patches `chosen`, drawn in the order of
    time."""
    picture = np.zeros((info.height, info.width, 3), np.uint8)
    selected = np.zeros(info.grid, bool)
    rank = np.zeros(info.grid, np.float32)
    of_i_frame = np.zeros(info.grid, bool)
    # the shard's order is the order of selection, I-frame patches first (schema.py)
    rank_among_p = np.cumsum(~intra) - 1
    last = max(int(rank_among_p.max(initial=0)), 1)
    for k in chosen[np.argsort(positions[chosen, 0], kind="stable")]:
        row, column = positions[k, 1:]
        top = row * info.patch_size
        left = column * info.patch_size
        bottom = top + info.patch_size
        right = left + info.patch_size
        picture[top:bottom, left:right] = tiles[k]
        selected[row, column] = True
        of_i_frame[row, column] = intra[k]
        rank[row, column] = 1 - rank_among_p[k] / last
    return {"patches": picture, "selected": selected, "rank": rank, "intra": of_i_frame}
