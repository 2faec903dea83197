"""Text on drawn images: a font that is always there, and names that are safe to draw.

The font is DejaVu Sans from matplotlib's own files, so images look alike on every machine and need
no system fonts.
"""

from functools import cache
from pathlib import Path

from PIL import ImageFont

from model_factory.command_line.plain_text import printable

INK = (31, 35, 40)
MUTED = (101, 109, 118)
LONGEST_NAME = 500  # characters measured; beyond it a name is cut before its width is known


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The Pillow font of a size in pixels."""
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(get_data_path(), "fonts", "ttf", name)
    # the basic layout is part of Pillow, raqm is a library that some machines lack
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def fitted(text: object, width: float, lettering: ImageFont.FreeTypeFont) -> str:
    """The text in one printable line of at most `width` pixels, its middle left out if need be."""
    line = printable(text)
    if len(line) > LONGEST_NAME:
        start = line[: LONGEST_NAME // 2]
        end = line[-LONGEST_NAME // 2 :]
        line = f"{start}…{end}"
    if lettering.getlength(line) <= width:
        return line
    # one character less at a time, since their widths differ; at most LONGEST_NAME rounds
    for num_characters in range(len(line) - 1, 1, -1):
        head = num_characters // 2
        tail = num_characters - head
        shorter = f"{line[:head]}…{line[len(line) - tail :]}"
        if lettering.getlength(shorter) <= width:
            return shorter
    return "…"
