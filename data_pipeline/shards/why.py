"""Why these patches: an image of what a video's patches were ranked by, frame by frame.

Shards hold patches and a coarse summary, so the video is decomposed again, by the rule and the
settings that packing would use:

    explain      the clip, its scores and its selection
    save_why     a sheet (.png) of COLUMNS frames, or an animation (.gif, .webp) over time

A row, or a panel, is shown only where the rule reads it: random patches have no motion row.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..codec.decompose import MOTION_CELL, CodecClip, per_pixel
from ..codec.open_video import check_file, is_image
from ..codec.patches import RANDOM_RULES, SelectionConfig, choose_patches, decompose
from ..codec.saliency import block_mean, cell_side, compensated_motion
from ..codec.selection import Order
from ..errors import DataPipelineError
from ..side_files import write_picture
from .clip_columns import BRIGHT_PERCENTILE, MOTION_FLOOR, RESIDUAL_FLOOR
from .drawing import (
    INTRA,
    UNSELECTED,
    Cell,
    Heading,
    Row,
    Timeline,
    colour_key,
    panels_picture,
    patch_pixels,
    ramp,
    rows_block,
    stacked,
    swatch,
    wheel,
    wheel_swatch,
    write_animation,
)
from .sample_builder import SampleConfig

FORMATS = (".png", ".gif", ".webp")
COLUMNS = 8
# Frames of a GIF, which has no prediction between frames of real footage: about 0.1 MB each
GIF_FRAMES = 14
CELL_PERCENTILE = 99  # of the cells of a frame: what is brighter is an outlier
DIMMED = 0.3  # brightness of what is not selected; still to be recognised
CHOSEN = (255, 159, 28)  # outline of P-frame patches: an orange, rare in footage
ACROSS = 3  # panels beside each other, of more than FEW_PANELS
FEW_PANELS = 4


@dataclass(frozen=True)
class Explanation:
    """A clip with what its patches were ranked by.

    Shape legend: T frames, H, W working size, Y, X motion cells, h, w patch grid.
    """

    name: str
    config: SampleConfig
    clip: CodecClip
    compensated: np.ndarray  # float32 [T, Y, X, 2], motion without the camera's
    change: np.ndarray  # float32 [T, y, x], luma steps: means over cells of `change_cell` pixels
    change_cell: int  # of the residual, or of plain differences where the rule reads those
    scores: np.ndarray  # float32 [T, h, w] in the unit that _unit names
    selected: np.ndarray  # bool [T, h, w]
    is_static: bool  # nothing moves: whole frames at even times are selected, not by score
    fastest: float  # pixels per frame, luma steps, and score that are drawn at full brightness
    strongest: float
    highest: float  # of all scores: none saturates

    @property
    def rule(self) -> SelectionConfig:
        """The settings of the selection."""
        return self.config.selection

    @property
    def counts(self) -> list[tuple[int, int]]:
        """(patches of I-frames taken before others, all others) of each frame."""
        of_frame = self.selected.sum(axis=(1, 2)).tolist()
        first = self.is_first.tolist()
        return [(n, 0) if is_first else (0, n) for n, is_first in zip(of_frame, first, strict=True)]

    @property
    def is_first(self) -> np.ndarray:
        """Frames bool [T] whose patches are taken before all others, without a score."""
        if self.rule.rule in ("published", "random"):
            return np.zeros(len(self.scores), bool)
        if self.rule.rule == "published_llava":
            return np.arange(len(self.scores)) == 0
        return self.clip.is_i_frame


def explain(path: Path, config: SampleConfig) -> Explanation:
    """Decompose one video and select its patches, in this process.

    RejectedInput as in packing, also for what lies beyond `config.limits`; DataPipelineError for a
    picture, or a video of one frame, which have no P-frames.
    """
    check_file(path, config.limits)
    if is_image(path):
        raise DataPipelineError(f"--why {path} is a picture: patches are selected of videos")
    rule = config.selection
    scored = decompose(path, config.framing, gop=config.gop, config=rule)
    clip = scored.clip
    if len(clip.frames) == 1:
        raise DataPipelineError(f"--why {path} has one frame: patches are selected of P-frames")
    selection = choose_patches(scored, name=str(path), budget=config.tokens, config=rule)
    scores = scored.scores
    if rule.is_published:
        # sums over the pixels of a patch; shown as means, which shards hold too
        scores = scores / config.patch_size**2
    selected = np.zeros(scores.shape, bool)
    selected[tuple(selection.positions.astype(int).T)] = True
    p_frames = ~clip.is_i_frame
    # the published rules take the median away, whatever the saliency of the others does
    camera = "median" if rule.is_published else rule.saliency.camera
    if rule.rule == "differences":
        change_cell = MOTION_CELL
        change = clip.change * p_frames[:, None, None]
    else:
        # the cells in which the default score reads it; pixels would show noise above all
        change_cell = cell_side(config.patch_size)
        change = block_mean(clip.residual, change_cell)
    return Explanation(
        name=path.name,
        config=config,
        clip=clip,
        compensated=compensated_motion(clip, camera),
        change=change,
        change_cell=change_cell,
        scores=scores,
        selected=selected,
        is_static=selection.is_static,
        fastest=_bright(np.linalg.norm(clip.motion[p_frames], axis=-1), floor=MOTION_FLOOR),
        strongest=_bright(change[p_frames], floor=RESIDUAL_FLOOR),
        highest=float(max(scores.max(), np.finfo(np.float32).tiny)),
    )


def save_why(path: Path, config: SampleConfig, output: Path) -> None:
    """Write why the patches of a video are selected, as a .png sheet or a .gif or .webp animation.

    ValueError for another suffix, before the video is read; other errors as of explain.
    """
    suffix = output.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"--output {output} must end in .png (sheet), .gif or .webp (animation)")
    why = explain(path, config)
    if suffix == ".png":
        write_picture(output, draw_why(why), optimize=True)
        return
    limit = GIF_FRAMES if suffix == ".gif" else len(why.scores)
    shown = frames_shown(why, limit)
    pictures = animate_why(why, shown)
    write_animation(output, pictures, seconds=why.clip.seconds[shown].tolist())


def frames_shown(why: Explanation, limit: int) -> list[int]:
    """At most `limit` frames, in order: the first one, and of each even span of the others the one
    with most selected P-frame patches, the earliest of equals."""
    count = len(why.scores)
    if count <= limit:
        return list(range(count))
    num_p = np.array([num_inter for _, num_inter in why.counts])
    edges = np.linspace(1, count, limit).astype(int)
    spans = zip(edges[:-1], edges[1:], strict=True)
    return [0, *(int(start + num_p[start:stop].argmax()) for start, stop in spans)]


def draw_why(why: Explanation) -> Image.Image:
    """The sheet: rows of pictures over frames_shown, and the colour key."""
    rows = why_rows(why, frames_shown(why, COLUMNS))
    block = rows_block(rows, heading=_heading(why))
    return stacked([block, _colour_key(why, titles=[row.title for row in rows], width=block.width)])


def animate_why(why: Explanation, shown: list[int]) -> list[Image.Image]:
    """One picture for each of these frames: a panel per row of the sheet, and the timeline of the
    whole clip."""
    rows = why_rows(why, shown)
    across = len(rows) if len(rows) <= FEW_PANELS else ACROSS
    heading = _heading(why)
    pictures = []
    for number, frame in enumerate(shown):
        cells = []
        for row in rows:
            cell = row.cells[number]
            caption = f"{row.title}: {cell.caption}" if cell.caption else row.title
            cells.append(Cell(cell.picture, caption))
        timeline = Timeline(why.counts, current=frame, inter=CHOSEN)
        panels = panels_picture(cells, heading=heading, timeline=timeline, across=across)
        key = _colour_key(why, titles=[row.title for row in rows], width=panels.width)
        pictures.append(stacked([panels, key]))
    return pictures


def why_rows(why: Explanation, shown: list[int]) -> list[Row]:
    """What the rule reads of these frames, their scores, and the selected patches."""
    frames = [Cell(why.clip.frames[t], _frame_caption(why, t)) for t in shown]
    rows = [Row("Frame", ("from the source, at its time;", "I- or P-frame"), frames)]
    rule = why.rule
    if rule.rule == "differences":
        change_notes = ("to the frame before, without", "any motion; full at", _luma(why.strongest))
        rows.append(Row("Difference", change_notes, [_change_cell(why, t) for t in shown]))
    elif rule.rule not in RANDOM_RULES:
        rows += _codec_rows(why, shown)
    scale = f"0 to {_number(why.highest)}, root scale;"
    score_notes = (*_score_unit(rule), scale, _last_selected(why))
    rows.append(Row("Score", score_notes, [_score_cell(why, t) for t in shown]))
    notes = ("outlined over the frame:", f"{int(why.selected.sum()):,} tokens of the clip")
    cells = [Cell(outlined(why, t), _patch_count(why, t)) for t in shown]
    return [*rows, Row("Selected patches", notes, cells)]


def _codec_rows(why: Explanation, shown: list[int]) -> list[Row]:
    """Motion as coded and without the camera's, and residual, as far as the score reads them."""
    clip = why.clip
    saliency = why.rule.saliency
    is_bits = saliency.score == "bits"
    rows = []
    if saliency.motion_weight and not is_bits:
        notes = (
            "direction is hue, speed",
            "is brightness; full at",
            f"{why.fastest:.1f} px per frame",
        )
        cells = [_motion_cell(why, clip.motion[t], is_p=not clip.is_i_frame[t]) for t in shown]
        rows.append(Row("Motion as coded", notes, cells))
        camera = "median" if why.rule.is_published else saliency.camera
        notes = ("without the camera's, by", f"its model: {camera};", "on the same scale")
        cells = [_motion_cell(why, why.compensated[t], is_p=not clip.is_i_frame[t]) for t in shown]
        rows.append(Row("Motion of objects", notes, cells))
    if saliency.residual_weight or is_bits:
        notes = ("what motion does not", "explain; full at", _luma(why.strongest))
        rows.append(Row("Residual", notes, [_change_cell(why, t) for t in shown]))
    return rows


def outlined(why: Explanation, frame: int) -> np.ndarray:
    """A frame uint8 [H, W, 3], dark but for its selected patches, whose area has an outline: blue
    where they come before all others, else orange."""
    picture = why.clip.frames[frame]
    selected = why.selected[frame]
    inside = patch_pixels(selected, picture)
    # selected pixels within `width` of one that is not, or of the border of the picture
    width = max(1, why.config.patch_size // 8)
    deep = np.pad(inside, width)
    rows, columns = inside.shape
    core = inside.copy()
    for dy in (-width, 0, width):
        for dx in (-width, 0, width):
            core &= deep[width + dy : width + dy + rows, width + dx : width + dx + columns]
    drawn = np.where(inside[..., None], picture, picture * DIMMED).astype(np.uint8)
    drawn[inside & ~core] = INTRA if why.is_first[frame] else CHOSEN
    return drawn


def score_picture(why: Explanation, frame: int) -> np.ndarray:
    """The scores of a frame's patches as heat, at the frame's size; those that come before all
    others, without a score, are blue."""
    heat = _heat(why.scores[frame] / why.highest)
    if why.is_first[frame]:
        heat[:] = UNSELECTED
        heat[why.selected[frame]] = INTRA
    side = why.config.patch_size
    return heat.repeat(side, axis=0).repeat(side, axis=1)


def _heat(shares: np.ndarray) -> np.ndarray:
    """Colours of shares 0 to 1 of the highest score, by their square roots: the highest of a clip
    is several times the lowest that is selected, and both are to be seen."""
    return ramp("inferno", np.sqrt(shares))


def _score_cell(why: Explanation, frame: int) -> Cell:
    caption = "before all others"
    if not why.is_first[frame]:
        best = float(why.scores[frame].max())
        caption = f"best {_number(best)}" if best else "none"
    return Cell(score_picture(why, frame), caption)


def _motion_cell(why: Explanation, motion: np.ndarray, is_p: bool) -> Cell:
    """A field of vectors [Y, X, 2] on the colour wheel, with its mean speed."""
    _, height, width, _ = why.clip.frames.shape
    picture = per_pixel(wheel(motion, why.fastest)[None], height=height, width=width)[0]
    speed = np.linalg.norm(motion, axis=-1).mean()
    return Cell(picture, f"mean {speed:.2f} px" if is_p else "none")


def _change_cell(why: Explanation, frame: int) -> Cell:
    """The residual or difference of a frame as heat, with its mean."""
    _, height, width, _ = why.clip.frames.shape
    values = why.change[frame]
    heat = ramp("magma", values / why.strongest)
    picture = heat.repeat(why.change_cell, axis=0).repeat(why.change_cell, axis=1)
    caption = "none" if why.clip.is_i_frame[frame] else f"mean {values.mean():.2f}"
    # cells of motion may reach beyond the frame
    return Cell(picture[:height, :width], caption)


def _frame_caption(why: Explanation, frame: int) -> str:
    kind = "I" if why.clip.is_i_frame[frame] else "P"
    return f"{why.clip.seconds[frame]:.2f} s, {kind}"


def _patch_count(why: Explanation, frame: int) -> str:
    num_patches = int(why.selected[frame].sum())
    if num_patches == 0:
        return "none"
    return f"{num_patches} I" if why.is_first[frame] else f"{num_patches} P"


def _luma(value: float) -> str:
    return f"{value:.1f} luma steps"


def _number(value: float) -> str:
    """Three digits: scores are shares or hundreds of bits."""
    return f"{value:.3g}"


def _score_unit(rule: SelectionConfig) -> tuple[str, ...]:
    """What one of a score is."""
    if rule.rule == "differences":
        return ("in luma steps, the mean;",)
    if rule.rule in RANDOM_RULES:
        return ("numbers at random;",)
    if rule.is_published:
        return ("mean over the patch;",)
    if rule.saliency.score == "bits":
        return ("in bits of the residual;",)
    return ("1: motion and residual at", "their 95th percentiles;")


def _last_selected(why: Explanation) -> str:
    """The lowest score of a selected patch that has one."""
    if why.is_static:
        return "not used: a static clip"
    ranked = why.selected & ~why.is_first[:, None, None]
    if not ranked.any():
        return "no patch selected by it"
    return f"lowest selected: {_number(float(why.scores[ranked].min()))}"


def _bright(values: np.ndarray, floor: float) -> float:
    """The value that is drawn at full brightness, of a field [P-frames, ...]; at least the floor.

    Three of four frames stay below with all but their brightest cells, so that a scene cut or a
    single wrong vector does not darken the others.
    """
    if values.size == 0:
        return floor
    of_frames = np.percentile(values.reshape(len(values), -1), CELL_PERCENTILE, axis=1)
    return max(float(np.percentile(of_frames, BRIGHT_PERCENTILE)), floor)


def _heading(why: Explanation) -> Heading:
    """Name, sizes, and the settings by which patches are selected."""
    clip = why.clip
    count, height, width, _ = clip.frames.shape
    duration = clip.seconds[-1] - clip.seconds[0]
    num_selected = int(why.selected.sum())
    # in short lines: an animation of a tall clip is narrow
    sizes = (
        f"{width} x {height} px, patches of {why.config.patch_size} px, {count} frames over "
        f"{duration:.2f} s"
    )
    share = num_selected / why.selected.size
    selected = f"{num_selected:,} of {why.selected.size:,} patches selected ({share:.1%})"
    rule = why.rule
    settings = [f"rule {rule.rule}"]
    if rule.rule == "i_frames_first":
        settings.append(f"score {rule.saliency.score}")
        if rule.saliency.score != "bits":
            settings.append(f"camera {rule.saliency.camera}")
    settings.append(f"vectors {rule.vectors}")
    if rule.vectors == "canonical":
        selected += f", GOP {why.config.gop}"
    if why.is_static:
        selected += ", static: whole frames at even times"
    # what changes the order of the scores that are drawn
    order = asdict(rule.order)
    changed = [name for name, value in asdict(Order()).items() if order[name] != value]
    settings += [f"{name} {order[name]}" for name in changed]
    return Heading(why.name, lines=(sizes, selected, ", ".join(settings)))


def _colour_key(why: Explanation, titles: list[str], width: int) -> Image.Image:
    """What the colours of these rows mean."""
    shades = np.linspace(0, 1, 90)[None].repeat(16, axis=0)
    entries = []
    if "Motion as coded" in titles:
        entries.append((wheel_swatch(), "direction of motion"))
    for title in ("Residual", "Difference"):
        if title in titles:
            text = f"{title.lower()}, 0 to {_luma(why.strongest)}"
            entries.append((ramp("magma", shades), text))
    entries.append((_heat(shades), f"score, 0 to {_number(why.highest)}"))
    if why.is_first.any():
        entries.append((swatch(INTRA), "selected before all others"))
    text = "selected, at even times" if why.is_static else "selected by score"
    entries.append((swatch(CHOSEN), text))
    return colour_key(entries, width=width)
