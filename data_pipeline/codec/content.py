"""Which part of a working frame shows the video; the rest is the padding of `--fit pad`.

Patches that touch padding are no news: no rule selects one of a P-frame. Cells of pure padding
never move, so they must not decide what the camera does, nor what full scale is.
"""

from dataclasses import astuple, dataclass

import numpy as np


@dataclass(frozen=True)
class Content:
    """A box of the working frame in pixels; `bottom` and `right` lie one beyond its last."""

    top: int
    left: int
    bottom: int
    right: int

    def cells(self, cell: int) -> tuple[slice, slice]:
        """Rows and columns of square cells that hold content, if only in part."""
        rows = slice(self.top // cell, -(-self.bottom // cell))
        columns = slice(self.left // cell, -(-self.right // cell))
        return rows, columns

    def whole_patches(self, height: int, width: int, patch_size: int) -> np.ndarray:
        """Mask bool [h, w] of the patches of a frame that lie wholly in the content."""
        mask = np.zeros((height // patch_size, width // patch_size), bool)
        first_row = -(-self.top // patch_size)
        first_column = -(-self.left // patch_size)
        mask[first_row : self.bottom // patch_size, first_column : self.right // patch_size] = True
        return mask

    def stored(self, height: int, width: int) -> tuple[int, ...]:
        """The four numbers as a sample states them: none where the content is the whole frame."""
        return () if self == Content(0, 0, height, width) else astuple(self)


def whole_frame(height: int, width: int) -> Content:
    """Content without padding."""
    return Content(0, 0, height, width)
