"""An image of what the encoder sees: frames, the motion and residual in them, and the patches that
were selected, beside what plain frame sampling would have bought with the same number of tokens.

Everything drawn comes out of the shard: clip_columns.py reads it, contact_sheet.py draws it.
"""

import itertools
from pathlib import Path

from PIL import Image

from ..side_files import write_picture
from .clip_columns import ClipView, ImageView, read_sample, sample_view
from .contact_sheet import ROWS, draw_animation, draw_sheet
from .manifest import Manifest

__all__ = ["ROWS", "contact_sheet", "read_sample", "save_view"]

COLUMNS = 8
# An animation runs at the clip's own speed within these bounds, FRAME_MS a frame where a shard has
# no times, and rests at its end
FASTEST_MS = 60
FRAME_MS = 200
SLOWEST_MS = 500
HOLD_MS = 2000
WEBP_QUALITY = 60  # edges of patches stay sharp, and a clip of 32 frames below half a megabyte


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
        first, *rest = pictures
        durations = _durations(view)
        options = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0}
        if path.suffix == ".webp":
            options["quality"] = WEBP_QUALITY
        write_picture(one, first, **options)


def _durations(view: ClipView | ImageView) -> list[int]:
    """Milliseconds for which an animation shows each of its pictures."""
    if isinstance(view, ImageView):
        return [HOLD_MS]
    steps = []
    for now, after in itertools.pairwise(view.columns):
        step = FRAME_MS
        if now.seconds is not None and after.seconds is not None:
            step = round(1000 * (after.seconds - now.seconds))
        steps.append(min(max(step, FASTEST_MS), SLOWEST_MS))
    return [*steps, HOLD_MS]
