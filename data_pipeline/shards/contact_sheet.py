"""Draws samples: a contact sheet with row titles, times, sizes and a colour key, or an animation.

A sheet has the rows of ROWS for every clip. An animation has six panels: the frame, its motion and
its residual; the patches selected at this time, and what an encoder has received so far as patches
and as whole frames.
"""

import numpy as np
from PIL import Image, ImageDraw

from .clip_columns import ClipView, Column, ImageView
from .drawing import (
    CELL,
    HEADER,
    INTRA,
    MARGIN,
    NARROWEST,
    PAPER,
    UNSELECTED,
    Cell,
    Heading,
    Row,
    Timeline,
    colour_key,
    enlarged,
    panels_picture,
    patch_pixels,
    ramp,
    rows_block,
    scaled,
    stacked,
    swatch,
    wheel,
    wheel_swatch,
)

ROWS = (
    "Frames",
    "Motion",
    "Residual",
    "Selected patches",
    "Order of selection",
    "Whole frames",
)


def draw_sheet(views: list[ClipView | ImageView]) -> Image.Image:
    """Samples below each other, and the colour key if there are clips among them."""
    blocks = [_image_block(v) if isinstance(v, ImageView) else _clip_block(v) for v in views]
    if any(isinstance(view, ClipView) for view in views):
        width = max(block.width for block in blocks)
        blocks.append(_colour_key(width))
    return stacked(blocks)


def draw_animation(view: ClipView) -> list[Image.Image]:
    """One picture per column of the clip."""
    received = np.full_like(view.columns[0].frame, UNSELECTED)
    sampled = received
    # what both ways of sampling have cost up to the column that is drawn
    tokens = 0
    frame_tokens = 0
    rows, columns = view.info.grid
    counts = [(column.num_intra, column.num_inter) for column in view.columns]
    pictures = []
    for index, column in enumerate(view.columns):
        selected = patch_pixels(column.selected, column.patches)[..., None]
        # a patch stays visible until a later one covers it
        received = np.where(selected, column.patches, received)
        tokens += column.num_intra + column.num_inter
        if column.bought:
            sampled = column.frame
            frame_tokens += rows * columns
        time = _time(column)
        cells = [
            Cell(column.frame, f"frame {time}".strip()),
            Cell(motion_picture(column.motion, view), "motion"),
            Cell(residual_picture(column.residual, view), "residual"),
            Cell(patches_picture(column), f"selected now: {_patch_counts(column)}"),
            Cell(received, f"received as patches: {tokens:,} tokens"),
            Cell(sampled, f"received as whole frames: {frame_tokens:,} tokens"),
        ]
        timeline = Timeline(counts, current=index)
        pictures.append(panels_picture(cells, heading=_heading(view), timeline=timeline))
    return pictures


def clip_rows(view: ClipView) -> list[Row]:
    """The rows of a clip, see ROWS."""
    info = view.info
    columns = view.columns
    rows, grid_columns = info.grid
    whole = rows * grid_columns
    bought = sum(column.bought for column in columns)
    notes = (
        ("from the source, at", "their times"),
        ("direction is hue, speed", "is brightness; full at", f"{view.fastest:.1f} px per frame"),
        ("what motion does not", "explain; full at", f"{view.strongest:.1f} luma steps"),
        ("what the encoder gets:", f"{info.num_patches:,} tokens"),
        ("blue: I-frame, first;", "then bright to dark by", "falling saliency"),
        ("the same budget spent", f"on frames: {bought} x {whole:,} tokens"),
    )
    cells = [
        [Cell(c.frame, _time(c)) for c in columns],
        [Cell(motion_picture(c.motion, view)) for c in columns],
        [Cell(residual_picture(c.residual, view)) for c in columns],
        [Cell(patches_picture(c), _patch_counts(c)) for c in columns],
        [Cell(rank_picture(c, info.patch_size)) for c in columns],
        [_whole_frame(c, whole) for c in columns],
    ]
    return [Row(*parts) for parts in zip(ROWS, notes, cells, strict=True)]


def _time(column: Column) -> str:
    return "" if column.seconds is None else f"{column.seconds:.2f} s"


def _patch_counts(column: Column) -> str:
    parts = []
    if column.num_intra:
        parts.append(f"{column.num_intra} I")
    if column.num_inter:
        parts.append(f"{column.num_inter} P")
    return " + ".join(parts) or "none"


def _whole_frame(column: Column, tokens: int) -> Cell:
    if column.bought:
        return Cell(column.frame, f"{tokens} tokens")
    return Cell(np.full_like(column.frame, UNSELECTED), "not sampled")


def motion_picture(motion: np.ndarray, view: ClipView) -> np.ndarray:
    """A field of vectors [G, G, 2] on a colour wheel, at the clip's size."""
    picture = wheel(motion, view.fastest)
    return enlarged(picture, width=view.info.width, height=view.info.height)


def residual_picture(residual: np.ndarray, view: ClipView) -> np.ndarray:
    """A field of residuals [G, G], at the clip's size."""
    picture = ramp("magma", residual / view.strongest)
    return enlarged(picture, width=view.info.width, height=view.info.height)


def patches_picture(column: Column) -> np.ndarray:
    """The selected patches, on UNSELECTED."""
    selected = patch_pixels(column.selected, column.patches)[..., None]
    return np.where(selected, column.patches, UNSELECTED)


def rank_picture(column: Column, patch_size: int) -> np.ndarray:
    """Selected patches by their rank in the order of selection."""
    # viridis from 0.15 on: its darkest colours are close to UNSELECTED
    colours = ramp("viridis", 0.15 + 0.85 * column.rank)
    colours[column.intra] = INTRA
    colours[~column.selected] = UNSELECTED
    return colours.repeat(patch_size, axis=0).repeat(patch_size, axis=1)


def _heading(view: ClipView | ImageView) -> Heading:
    return Heading(view.info.source, lines=(_sizes(view),))


def _sizes(view: ClipView | ImageView) -> str:
    info = view.info
    rows, columns = info.grid
    size = f"{info.width} x {info.height} px, patches of {info.patch_size} px"
    if isinstance(view, ImageView):
        return f"picture, {size}: {rows * columns:,} tokens"
    every = rows * columns * info.num_frames
    length = ""
    if len(info.seconds) > 1:
        duration = info.seconds[-1] - info.seconds[0]
        length = f" over {duration:.2f} s"
    ratio = info.num_patches / every
    share = f"{info.num_patches:,} of {every:,} patches selected ({ratio:.1%})"
    static = ", static" if info.is_static else ""
    return f"{size}, {info.num_frames} frames{length}, GOP {info.gop}{static}; {share}"


def _image_block(view: ImageView) -> Image.Image:
    picture = scaled(view.picture, 2 * CELL)
    width = max(picture.width + 2 * MARGIN, NARROWEST)
    block = Image.new("RGB", (width, HEADER + picture.height + MARGIN), PAPER)
    _heading(view).draw(ImageDraw.Draw(block), width=width)
    block.paste(picture, (MARGIN, HEADER))
    return block


def _clip_block(view: ClipView) -> Image.Image:
    return rows_block(clip_rows(view), heading=_heading(view))


def _colour_key(width: int) -> Image.Image:
    shades = np.linspace(0, 1, 90)[None].repeat(16, axis=0)
    entries = [
        (wheel_swatch(), "direction of motion"),
        (ramp("magma", shades), "residual, none to full"),
        (swatch(INTRA), "I-frame patch, before all others"),
        (ramp("viridis", 0.15 + 0.85 * shades[:, ::-1]), "P-frame patch, first to last"),
        (swatch(UNSELECTED), "not selected"),
    ]
    return colour_key(entries, width=width)
