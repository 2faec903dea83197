"""An image of what the encoder sees: frames, the motion and residual in them, and the patches that
were selected, beside what plain frame sampling would have bought with the same number of tokens.

Everything drawn comes out of the shard: clip_columns.py reads it, contact_sheet.py draws it.
"""

from pathlib import Path

from PIL import Image

from ..side_files import write_picture
from .clip_columns import ImageView, read_sample, sample_view
from .contact_sheet import ROWS, draw_animation, draw_sheet
from .drawing import write_animation
from .manifest import Manifest

__all__ = ["ROWS", "contact_sheet", "read_sample", "save_view"]

COLUMNS = 8


def contact_sheet(manifest: Manifest, sample_ids: list[int]) -> Image.Image:
    """The image of samples below each other, clips in up to COLUMNS columns."""
    return draw_sheet([sample_view(manifest, sample_id=i, columns=COLUMNS) for i in sample_ids])


def save_view(manifest: Manifest, sample_ids: list[int], path: Path) -> None:
    """Write a .png contact sheet of the samples, or a .gif or .webp animation of each
    (NAME_ID.gif where there are several).
    ValueError for another suffix.
    """
    wrong = [i for i in sample_ids if not 0 <= i < len(manifest)]
    if wrong or not sample_ids:
        raise ValueError(f"--samples {wrong}: the folder has samples 0 to {len(manifest) - 1}")
    if path.suffix not in (".png", ".gif", ".webp"):
        raise ValueError(
            f"--output {path} must end in .png (contact sheet), .gif or .webp (animation)"
        )
    if path.suffix == ".png":
        write_picture(path, contact_sheet(manifest, sample_ids), optimize=True)
        return
    for sample_id in sample_ids:
        one = path
        if len(sample_ids) > 1:  # an animation shows one sample
            one = path.with_stem(f"{path.stem}_{sample_id}")
        view = sample_view(manifest, sample_id)
        pictures = [draw_sheet([view])] if isinstance(view, ImageView) else draw_animation(view)
        seconds = [None] if isinstance(view, ImageView) else [c.seconds for c in view.columns]
        write_animation(one, pictures, seconds=seconds)
