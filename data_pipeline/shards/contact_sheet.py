"""Draws samples: a contact sheet with row titles, times, sizes and a colour key, or an animation.

A sheet has the rows of ROWS for every clip. An animation has six panels: the frame, its motion and
its residual; the patches selected at this time, and what an encoder has received so far as patches
and as whole frames.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..picture_text import INK, MUTED, fitted, font
from .clip_columns import ClipView, Column, ImageView

ROWS = (
    "Frames",
    "Motion",
    "Residual",
    "Selected patches",
    "Order of selection",
    "Whole frames",
)
# sides of an image in a sheet and in an animation, about: _scaled keeps the aspect ratio
CELL = 160
PANEL = 200
# layout, in pixels
GAP = 6  # between images of a row, and between rows
MARGIN = 16
TITLES = 172  # width of the column of row titles and their notes
HEADER = 50  # height of a sample's name and sizes
LINE = 15  # height of a line of small text
NARROWEST = 560  # so that a block's header has room
TIMELINE = 44  # height of the bars below an animation
UNSELECTED = (22, 24, 29)
PAPER = (255, 255, 255)
RULE = (216, 222, 228)
INTRA = (84, 130, 190)  # I-frame patches, which are selected before all others
INTER = (53, 183, 121)  # P-frame patches where their order is not shown; a green of viridis


@dataclass(frozen=True)
class Cell:
    """A picture uint8 [H, W, 3] and the line below it."""

    picture: np.ndarray
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a clip's block: its title, lines that explain it, and its cells."""

    title: str
    notes: tuple[str, ...]
    cells: list[Cell]


def draw_sheet(views: list[ClipView | ImageView]) -> Image.Image:
    """Samples below each other, and the colour key if there are clips among them."""
    blocks = [_image_block(v) if isinstance(v, ImageView) else _clip_block(v) for v in views]
    width = max(block.width for block in blocks)
    if any(isinstance(view, ClipView) for view in views):
        blocks.append(_colour_key(width))
    height = sum(block.height for block in blocks)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        if top:
            draw.line((MARGIN, top, width - MARGIN, top), fill=RULE)
        top += block.height
    return sheet


def draw_animation(view: ClipView) -> list[Image.Image]:
    """One picture per column of the clip."""
    received = np.full_like(view.columns[0].frame, UNSELECTED)
    sampled = received
    # what both ways of sampling have cost up to the column that is drawn
    tokens = 0
    frame_tokens = 0
    rows, columns = view.info.grid
    pictures = []
    for index, column in enumerate(view.columns):
        selected = _pixels(column.selected, column.patches)[..., None]
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
        pictures.append(_animation_picture(view, cells=cells, place=index))
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
    return _enlarged(_wheel(motion, view.fastest), view)


def residual_picture(residual: np.ndarray, view: ClipView) -> np.ndarray:
    """A field of residuals [G, G], at the clip's size."""
    return _enlarged(_ramp("magma", residual / view.strongest), view)


def patches_picture(column: Column) -> np.ndarray:
    """The selected patches, on UNSELECTED."""
    selected = _pixels(column.selected, column.patches)[..., None]
    return np.where(selected, column.patches, UNSELECTED)


def rank_picture(column: Column, patch_size: int) -> np.ndarray:
    """Selected patches by their rank in the order of selection."""
    # viridis from 0.15 on: its darkest colours are close to UNSELECTED
    colours = _ramp("viridis", 0.15 + 0.85 * column.rank)
    colours[column.intra] = INTRA
    colours[~column.selected] = UNSELECTED
    return colours.repeat(patch_size, axis=0).repeat(patch_size, axis=1)


def _pixels(per_patch: np.ndarray, like: np.ndarray) -> np.ndarray:
    side = like.shape[0] // per_patch.shape[0]
    return per_patch.repeat(side, axis=0).repeat(side, axis=1)


def _wheel(motion: np.ndarray, fastest: float) -> np.ndarray:
    """uint8 RGB [..., 3] of vectors [..., 2]: direction is hue, speed is brightness."""
    x = motion[..., 0].astype(np.float32)
    y = motion[..., 1].astype(np.float32)
    turns = np.arctan2(y, x) / (2 * np.pi) % 1
    hue = (turns * 255).astype(np.uint8)
    speed = np.clip(np.hypot(x, y) / fastest, 0, 1)
    value = (speed * 255).astype(np.uint8)
    # Pillow's HSV has eight bits a channel; saturation stays the same for all directions
    saturation = np.full_like(hue, 220)
    hsv = np.stack([hue, saturation, value], axis=-1)
    return np.asarray(Image.fromarray(hsv, mode="HSV").convert("RGB"))


def _ramp(name: str, values: np.ndarray) -> np.ndarray:
    """uint8 RGB [..., 3] of values 0..1 in one of matplotlib's colour maps."""
    from matplotlib import colormaps

    colours = colormaps[name](np.clip(values, 0, 1))[..., :3]  # the fourth is alpha
    return (colours * 255).astype(np.uint8)


def _enlarged(picture: np.ndarray, view: ClipView) -> np.ndarray:
    size = (view.info.width, view.info.height)
    # nearest: the cells of the coarse field stay visible as such
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST))


def _scaled(picture: np.ndarray, side: int) -> Image.Image:
    """The picture at about side x side pixels: shrunk to them, or enlarged by a whole number, which
    keeps the pixels of small clips sharp."""
    image = Image.fromarray(np.ascontiguousarray(picture, dtype=np.uint8))
    ratio = side / (image.width * image.height) ** 0.5
    if ratio < 1:
        width = max(1, round(image.width * ratio))  # at least 1: a strip may be very thin
        height = max(1, round(image.height * ratio))
        size = (width, height)
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = round(ratio)
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


def _header(draw: ImageDraw.ImageDraw, width: int, view: ClipView | ImageView) -> None:
    """Name and sizes of a sample, in the first HEADER rows of its block."""
    room = width - 2 * MARGIN
    bold = font(15, bold=True)
    small = font(12)
    # a source is whatever a file was called: `fitted` makes it printable and short enough
    name = fitted(view.info.source, width=room, lettering=bold)
    sizes = fitted(_sizes(view), width=room, lettering=small)
    draw.text((MARGIN, 10), text=name, fill=INK, font=bold)
    draw.text((MARGIN, 31), text=sizes, fill=MUTED, font=small)


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
    picture = _scaled(view.picture, 2 * CELL)
    width = max(picture.width + 2 * MARGIN, NARROWEST)
    block = Image.new("RGB", (width, HEADER + picture.height + MARGIN), PAPER)
    _header(ImageDraw.Draw(block), width=width, view=view)
    block.paste(picture, (MARGIN, HEADER))
    return block


def _clip_block(view: ClipView) -> Image.Image:
    rows = clip_rows(view)
    pictures = [[_scaled(cell.picture, CELL) for cell in row.cells] for row in rows]
    cell_width, cell_height = pictures[0][0].size  # all have that of the clip
    heights = []
    for row in rows:
        # a row is as high as the larger of its images and the notes beside them
        captioned = any(cell.caption for cell in row.cells)
        pictured = cell_height + LINE * captioned
        titled = 20 + LINE * len(row.notes)
        heights.append(max(pictured, titled) + GAP + 2)
    cells_width = len(rows[0].cells) * (cell_width + GAP)
    width = max(TITLES + cells_width + 2 * MARGIN, NARROWEST)
    height_of_block = HEADER + sum(heights) + MARGIN // 2
    block = Image.new("RGB", (width, height_of_block), PAPER)
    draw = ImageDraw.Draw(block)
    _header(draw, width=width, view=view)
    top = HEADER + 4
    for row, drawn, height in zip(rows, pictures, heights, strict=True):
        draw.text((MARGIN, top), text=row.title, fill=INK, font=font(13, bold=True))
        for number, note in enumerate(row.notes):
            below_title = top + 20 + LINE * number
            draw.text((MARGIN, below_title), text=note, fill=MUTED, font=font(11))
        left = MARGIN + TITLES
        for cell, picture in zip(row.cells, drawn, strict=True):
            block.paste(picture, (left, top))
            below = top + cell_height + 1
            draw.text((left, below), text=cell.caption, fill=MUTED, font=font(11))
            left += cell_width + GAP
        top += height
    return block


def _colour_key(width: int) -> Image.Image:
    """Swatches with what they mean, in as many lines as the width asks for."""
    ramp = np.linspace(0, 1, 90)[None].repeat(16, axis=0)
    entries = [
        (_wheel_swatch(), "direction of motion"),
        (_ramp("magma", ramp), "residual, none to full"),
        (_swatch(INTRA), "I-frame patch, before all others"),
        (_ramp("viridis", 0.15 + 0.85 * ramp[:, ::-1]), "P-frame patch, first to last"),
        (_swatch(UNSELECTED), "not selected"),
    ]
    # laid out before anything is drawn: the number of lines decides the height of the image
    corners = []
    left = MARGIN
    top = 10
    for swatch, text in entries:
        text_width = int(font(12).getlength(text))
        entry_width = swatch.shape[1] + 8 + text_width
        # the first entry of a line stays there even if it is too wide
        if left > MARGIN and left + entry_width > width - MARGIN:
            left = MARGIN
            top += 44
        corners.append((left, top))
        left += entry_width + 28
    key = Image.new("RGB", (width, top + 50), PAPER)
    draw = ImageDraw.Draw(key)
    for (left, top), (swatch, text) in zip(corners, entries, strict=True):
        # in the middle of a line as high as the wheel, the highest swatch
        indent = (36 - swatch.shape[0]) // 2
        key.paste(Image.fromarray(swatch), (left, top + indent))
        beside = left + swatch.shape[1] + 8
        draw.text((beside, top + 11), text=text, fill=INK, font=font(12))
    return key


def _wheel_swatch() -> np.ndarray:
    """The colours of directions, as a disc on paper."""
    side = 36
    # centres of pixels on -1 to 1
    centres = (np.mgrid[:side, :side] + 0.5) / side
    y, x = centres * 2 - 1
    disc = _wheel(np.stack([x, y], axis=-1), 1.0).copy()
    disc[np.hypot(x, y) > 1] = PAPER
    return disc


def _swatch(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((16, 16, 3), colour, np.uint8)


def _animation_picture(view: ClipView, cells: list[Cell], place: int) -> Image.Image:
    """Six panels in two rows below the header, above the timeline."""
    panels = [_scaled(cell.picture, PANEL) for cell in cells]
    across, down = panels[0].size
    pitch = down + LINE + GAP
    panels_width = 3 * (across + GAP) - GAP
    width = max(panels_width + 2 * MARGIN, NARROWEST)
    first_top = HEADER + 4
    timeline_top = first_top + 2 * pitch
    picture = Image.new("RGB", (width, timeline_top + TIMELINE + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    _header(draw, width=width, view=view)
    for number, (cell, panel) in enumerate(zip(cells, panels, strict=True)):
        row, column = divmod(number, 3)
        left = MARGIN + column * (across + GAP)
        top = first_top + row * pitch
        picture.paste(panel, (left, top))
        caption = fitted(cell.caption, width=across, lettering=font(11))
        draw.text((left, top + down + 1), text=caption, fill=INK, font=font(11))
    _timeline(
        draw,
        columns=view.columns,
        place=place,
        left=MARGIN,
        top=timeline_top,
        width=width - 2 * MARGIN,
    )
    return picture


def _timeline(
    draw: ImageDraw.ImageDraw,
    columns: list[Column],
    place: int,
    left: int,
    top: int,
    width: int,
) -> None:
    """Selected patches over time as bars, those up to the column `place` in colour."""
    draw.text((left, top), text="patches selected over time", fill=MUTED, font=font(11))
    foot = top + LINE + TIMELINE - 14
    highest = foot - top - LINE
    counts = [column.num_intra + column.num_inter for column in columns]
    most = max(*counts, 1)  # the bar of full height
    pitch = width / len(columns)
    for number, column in enumerate(columns):
        x = left + number * pitch
        # two parts of one bar, the P-frame patches below
        base = foot
        for count, colour in ((column.num_inter, INTER), (column.num_intra, INTRA)):
            height = round(count / most * highest)
            if height:
                shade = colour if number <= place else RULE
                right = x + pitch - 2  # two pixels between bars
                draw.rectangle((x, base - height, right, base - 1), fill=shade)
                base -= height
    draw.line((left, foot, left + width, foot), fill=MUTED)
