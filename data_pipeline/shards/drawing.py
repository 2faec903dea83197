"""The layout that drawn images share: rows or panels of pictures with their captions, a header, a
timeline, a colour key, and fields of numbers as colours. What is drawn is the caller's:
contact_sheet.py draws samples, why.py why patches of a video are selected.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..picture_text import INK, MUTED, fitted, font
from ..side_files import write_picture

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
# An animation runs at the clip's own speed within these bounds, FRAME_MS a frame where there are
# no times, and rests at its end
FASTEST_MS = 60
FRAME_MS = 200
SLOWEST_MS = 500
HOLD_MS = 2000
WEBP_QUALITY = 60  # edges of patches stay sharp, and a clip of 32 frames below half a megabyte


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


@dataclass(frozen=True)
class Heading:
    """What stands above a clip's pictures: the name of its file, and lines of sizes and settings.

    A name is whatever a file was called: `fitted` makes it printable and short enough.
    """

    name: str
    lines: tuple[str, ...]

    @property
    def height(self) -> int:
        """Pixels that it takes."""
        return HEADER + LINE * (len(self.lines) - 1)

    def draw(self, draw: ImageDraw.ImageDraw, width: int) -> None:
        """Draw it at the top of an image of this width."""
        room = width - 2 * MARGIN
        bold = font(15, bold=True)
        small = font(12)
        name = fitted(self.name, width=room, lettering=bold)
        draw.text((MARGIN, 10), text=name, fill=INK, font=bold)
        for number, line in enumerate(self.lines):
            top = 31 + LINE * number
            text = fitted(line, width=room, lettering=small)
            draw.text((MARGIN, top), text=text, fill=MUTED, font=small)


@dataclass(frozen=True)
class Timeline:
    """Bars of two parts each, (I-frame patches, P-frame patches), with their colours; those up to
    `current` are drawn in colour."""

    counts: list[tuple[int, int]]
    current: int
    intra: tuple[int, int, int] = INTRA
    inter: tuple[int, int, int] = INTER


def stacked(blocks: list[Image.Image]) -> Image.Image:
    """Blocks below each other, with rules between them."""
    width = max(block.width for block in blocks)
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


def rows_block(rows: list[Row], heading: Heading) -> Image.Image:
    """Rows of pictures below the heading, all pictures of one size, with titles and notes."""
    pictures = [[scaled(cell.picture, CELL) for cell in row.cells] for row in rows]
    cell_width, cell_height = pictures[0][0].size  # all have that of the first
    heights = []
    for row in rows:
        # a row is as high as the larger of its images and the notes beside them
        captioned = any(cell.caption for cell in row.cells)
        pictured = cell_height + LINE * captioned
        titled = 20 + LINE * len(row.notes)
        heights.append(max(pictured, titled) + GAP + 2)
    cells_width = len(rows[0].cells) * (cell_width + GAP)
    width = max(TITLES + cells_width + 2 * MARGIN, NARROWEST)
    height_of_block = heading.height + sum(heights) + MARGIN // 2
    block = Image.new("RGB", (width, height_of_block), PAPER)
    draw = ImageDraw.Draw(block)
    heading.draw(draw, width=width)
    top = heading.height + 4
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


def colour_key(entries: list[tuple[np.ndarray, str]], width: int) -> Image.Image:
    """Swatches with what they mean, in as many lines as the width asks for."""
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


def wheel_swatch() -> np.ndarray:
    """The colours of directions, as a disc on paper."""
    side = 36
    # centres of pixels on -1 to 1
    centres = (np.mgrid[:side, :side] + 0.5) / side
    y, x = centres * 2 - 1
    disc = wheel(np.stack([x, y], axis=-1), 1.0).copy()
    disc[np.hypot(x, y) > 1] = PAPER
    return disc


def swatch(colour: tuple[int, int, int]) -> np.ndarray:
    """One colour, for a key."""
    return np.full((16, 16, 3), colour, np.uint8)


def panels_picture(
    cells: list[Cell], heading: Heading, timeline: Timeline, across: int = 3
) -> Image.Image:
    """Panels in rows of `across` below the heading, above the timeline."""
    panels = [scaled(cell.picture, PANEL) for cell in cells]
    side, down = panels[0].size
    pitch = down + LINE + GAP
    panels_width = across * (side + GAP) - GAP
    width = max(panels_width + 2 * MARGIN, NARROWEST)
    first_top = heading.height + 4
    timeline_top = first_top + -(-len(cells) // across) * pitch
    picture = Image.new("RGB", (width, timeline_top + TIMELINE + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    heading.draw(draw, width=width)
    for number, (cell, panel) in enumerate(zip(cells, panels, strict=True)):
        row, column = divmod(number, across)
        left = MARGIN + column * (side + GAP)
        top = first_top + row * pitch
        picture.paste(panel, (left, top))
        caption = fitted(cell.caption, width=side, lettering=font(11))
        draw.text((left, top + down + 1), text=caption, fill=INK, font=font(11))
    _timeline(
        draw,
        timeline=timeline,
        left=MARGIN,
        top=timeline_top,
        width=width - 2 * MARGIN,
    )
    return picture


def _timeline(
    draw: ImageDraw.ImageDraw,
    timeline: Timeline,
    left: int,
    top: int,
    width: int,
) -> None:
    """Selected patches over time as bars."""
    draw.text((left, top), text="patches selected over time", fill=MUTED, font=font(11))
    foot = top + LINE + TIMELINE - 14
    highest = foot - top - LINE
    totals = [sum(counts) for counts in timeline.counts]
    most = max([*totals, 1])  # the bar of full height
    pitch = width / len(timeline.counts)
    for number, (num_intra, num_inter) in enumerate(timeline.counts):
        x = left + number * pitch
        # two parts of one bar, the P-frame patches below
        base = foot
        for count, colour in ((num_inter, timeline.inter), (num_intra, timeline.intra)):
            height = round(count / most * highest)
            if height:
                shade = colour if number <= timeline.current else RULE
                right = x + max(pitch - 2, 1)  # two pixels between bars
                draw.rectangle((x, base - height, right, base - 1), fill=shade)
                base -= height
    draw.line((left, foot, left + width, foot), fill=MUTED)


def patch_pixels(per_patch: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A field on patches [h, w] at every pixel of a picture [H, W, 3]."""
    side = like.shape[0] // per_patch.shape[0]
    return per_patch.repeat(side, axis=0).repeat(side, axis=1)


def wheel(motion: np.ndarray, fastest: float) -> np.ndarray:
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


def ramp(name: str, values: np.ndarray) -> np.ndarray:
    """uint8 RGB [..., 3] of values 0..1 in one of matplotlib's colour maps."""
    from matplotlib import colormaps

    colours = colormaps[name](np.clip(values, 0, 1))[..., :3]  # the fourth is alpha
    return (colours * 255).astype(np.uint8)


def enlarged(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """A picture of a coarse field at this size."""
    size = (width, height)
    # nearest: the cells of the coarse field stay visible as such
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST))


def scaled(picture: np.ndarray, side: int) -> Image.Image:
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


def write_animation(
    path: Path, pictures: list[Image.Image], seconds: Sequence[float | None]
) -> None:
    """Write pictures as a GIF or a WebP that shows each for as long as the clip does, by their
    times."""
    first, *rest = pictures
    durations = durations_of(seconds)
    options = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0}
    if path.suffix.lower() == ".webp":
        options["quality"] = WEBP_QUALITY
    write_picture(path, first, **options)


def durations_of(seconds: Sequence[float | None]) -> list[int]:
    """Milliseconds for which an animation shows each of its pictures."""
    steps = []
    for now, after in itertools.pairwise(seconds):
        step = FRAME_MS
        if now is not None and after is not None:
            step = round(1000 * (after - now))
        steps.append(min(max(step, FASTEST_MS), SLOWEST_MS))
    return [*steps, HOLD_MS]
