"""What two objectives do to the same samples, drawn over training steps: a PNG and a GIF.

    python eval_encoder/visualize_clusters.py --features FOLDER --shards DIR --output clusters.gif

Left, batch-contrastive: a sample is pulled to another view of itself and pushed from the others of
its batch, also from those that show the same. Right, cluster discrimination: a sample is pulled to
the centre of its cluster and pushed from all other centres of the set. Both train the same small
head on the same stored vectors. Embeddings lie on a sphere of three dimensions, which turns slowly
so that its depth can be seen: what is behind is pale. Below, how far each objective has separated
the groups. Colours are clusters (or true labels, with --truth). Beside the GIF, its last image is
written as PNG. Cost: seconds.
"""

import argparse
import colorsys
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.picture_text import INK, MUTED, font
from data_pipeline.side_files import write_picture
from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path

Colour = tuple[int, int, int]

# pixels of the result: side of a sphere's square, margins, heights of the titles and the curves
SIDE = 364
GAP = 16
TITLE = 58
CURVES = 92
SHARPNESS = 2  # images are drawn at twice their size and shrunk, which smooths edges
TURN = np.pi / 2  # of the sphere from the first image to the last
TILT = 0.35  # of the view from above, in radians
PALETTE = 64  # colours of a GIF, one table for all images: three times smaller than tables of 128
# milliseconds that an image of the animation is shown, and its last one
PICTURE_MS = 120
HOLD_MS = 2500
OBJECTIVES = ("contrastive", "clusters")
TITLES = ("Batch-contrastive", "Cluster discrimination")
LINES = ((140, 149, 159), (9, 105, 218))
BATCH = 64  # samples of a step, for both objectives
NOISE = 0.3  # of a view, in standard deviations of each feature
TEMPERATURE = 0.2  # of the contrastive softmax
SCALE = 8.0  # of the cosines with the centres


@dataclass(frozen=True)
class Snapshot:
    """Embeddings float32 [N, 3] on the unit sphere at a step, and centres [K, 3] if any."""

    step: int
    embeddings: np.ndarray
    centers: np.ndarray | None = None


def train(
    features: np.ndarray, labels: np.ndarray, objective: str, steps: int, every: int, seed: int
) -> list[Snapshot]:
    """Snapshots of a small head trained on unit features float32 [N, D] by `contrastive` or
    `clusters` (labels int64 [N])."""
    import torch
    import torch.nn.functional as F

    generator = torch.manual_seed(seed)
    rows = torch.from_numpy(features)
    classes = torch.from_numpy(labels)
    head = torch.nn.Sequential(
        torch.nn.Linear(rows.shape[1], 64), torch.nn.GELU(), torch.nn.Linear(64, 3)
    )
    # contrastive training gives them no gradient, so that AdamW passes over them
    num_classes = int(classes.max()) + 1
    centers = torch.nn.Parameter(torch.randn(num_classes, 3, generator=generator))
    optimizer = torch.optim.AdamW([*head.parameters(), centers], lr=3e-3)
    spread = NOISE * rows.std(dim=0)

    def view(chosen: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(len(chosen), rows.shape[1], generator=generator)
        return F.normalize(head(rows[chosen] + spread * noise))

    snapshots = []
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            with torch.no_grad():
                drawn = F.normalize(head(rows)).numpy()
                middle = F.normalize(centers).numpy() if objective == "clusters" else None
            snapshots.append(Snapshot(step, drawn, middle))
        chosen = torch.randperm(len(rows), generator=generator)[:BATCH]
        if objective == "clusters":
            logits = SCALE * view(chosen) @ F.normalize(centers).T
            target = classes[chosen]
        else:
            # two views of a batch: the positive pairs lie on the diagonal
            logits = view(chosen) @ view(chosen).T / TEMPERATURE
            target = torch.arange(len(chosen))
        optimizer.zero_grad()
        F.cross_entropy(logits, target).backward()
        optimizer.step()
    return snapshots


def separation(embeddings: np.ndarray, groups: np.ndarray) -> float:
    """Mean cosine of samples with others of their group minus that with other groups."""
    cosines = embeddings @ embeddings.T
    same = groups[:, None] == groups[None]
    np.fill_diagonal(same, False)
    other = groups[:, None] != groups[None]
    within = cosines[same].mean()
    between = cosines[other].mean()
    return float(within - between)


def animation(
    runs: list[list[Snapshot]], groups: np.ndarray, coloured_by: str = "clusters"
) -> list[Image.Image]:
    """An image of both objectives for every snapshot of `runs`, in the order of TITLES.

    groups int64 [N] are the colours, and `coloured_by` the word for them.
    """
    curves = [[separation(snapshot.embeddings, groups) for snapshot in run] for run in runs]
    return [
        _picture(runs, curves=curves, groups=groups, place=index, coloured_by=coloured_by)
        for index in range(len(runs[0]))
    ]


def _picture(
    runs: list[list[Snapshot]],
    curves: list[list[float]],
    groups: np.ndarray,
    place: int,
    coloured_by: str,
) -> Image.Image:
    # all lengths below are in pixels of the result, scaled when they are drawn
    width = 2 * SIDE + 3 * GAP
    height = TITLE + SIDE + CURVES + GAP
    image = Image.new("RGB", (width * SHARPNESS, height * SHARPNESS), "white")
    draw = ImageDraw.Draw(image)
    last = max(len(runs[0]) - 1, 1)
    angle = TURN * place / last
    for number, (title, run) in enumerate(zip(TITLES, runs, strict=True)):
        left = GAP + number * (SIDE + GAP)
        title_colour = LINES[number] if number else INK
        _text(draw, (left, 8), text=title, size=15, colour=title_colour, bold=True)
        centers = run[place].centers
        note = "pushed from every other sample of its batch, similar ones too"
        if centers is not None:
            note = f"pulled to the centre (ring) of its cluster, one of {len(centers)}"
        _text(draw, (left, 30), text=note, size=11, colour=MUTED)
        _sphere(draw, x=left, y=TITLE, snapshot=run[place], groups=groups, angle=angle)
    # the steps of all runs are the same
    _curves(draw, steps=runs[0], curves=curves, place=place, coloured_by=coloured_by)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    colour: Colour,
    bold: bool = False,
) -> None:
    scaled = (SHARPNESS * place[0], SHARPNESS * place[1])
    draw.text(scaled, text, fill=colour, font=font(SHARPNESS * size, bold))


def _sphere(
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
    snapshot: Snapshot,
    groups: np.ndarray,
    angle: float,
) -> None:
    """Embeddings as dots and centres as rings, those behind first and paler."""
    box = [SHARPNESS * edge for edge in (x, y, x + SIDE, y + SIDE)]
    draw.ellipse(box, fill=(246, 248, 250), outline=(216, 222, 228))
    points = _turned(snapshot.embeddings, angle)
    dots: list[tuple[np.ndarray, float, Colour, bool]] = [
        (point, 3.2, _colour(int(group)), False)
        for point, group in zip(points, groups, strict=True)
    ]
    if snapshot.centers is not None:
        dots += [(point, 6.5, INK, True) for point in _turned(snapshot.centers, angle)]
    # by depth, the third coordinate: what is in front is drawn over what is behind
    for point, radius, colour, ring in sorted(dots, key=lambda dot: dot[0][2]):
        _dot(draw, x=x, y=y, point=point, radius=radius, colour=colour, ring=ring)


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
    """Points [N, 3] seen after a turn about the upright axis, from slightly above."""
    cosine = np.cos(angle)
    sine = np.sin(angle)
    around = np.array(
        [
            [cosine, 0, sine],
            [0, 1, 0],
            [-sine, 0, cosine],
        ]
    )
    cosine = np.cos(TILT)
    sine = np.sin(TILT)
    above = np.array(
        [
            [1, 0, 0],
            [0, cosine, -sine],
            [0, sine, cosine],
        ]
    )
    # points are rows, so the rotations are applied transposed
    return points @ (above @ around).T


def _dot(
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
    point: np.ndarray,
    radius: float,
    colour: Colour,
    ring: bool,
) -> None:
    # coordinates from -1 to 1 become pixels; those of images grow downwards
    across = SHARPNESS * (x + SIDE * (point[0] + 1) / 2)
    down = SHARPNESS * (y + SIDE * (1 - point[1]) / 2)
    depth = (point[2] + 1) / 2
    size = SHARPNESS * radius * (0.7 + 0.3 * depth)
    # the far side is seen through the sphere, whose gray of 246 it is mixed with
    strength = 0.3 + 0.7 * depth
    red, green, blue = (int(246 + (value - 246) * strength) for value in colour)
    shade = (red, green, blue)
    box = (across - size, down - size, across + size, down + size)
    if ring:
        draw.ellipse(box, outline=shade, width=2 * SHARPNESS)
    else:
        draw.ellipse(box, fill=shade)


def _curves(
    draw: ImageDraw.ImageDraw,
    steps: list[Snapshot],
    curves: list[list[float]],
    place: int,
    coloured_by: str,
) -> None:
    """Separation of both objectives up to this image's step, below the spheres."""
    left = GAP + 210  # room for the captions in front of it
    right = 2 * SIDE + 2 * GAP
    top = TITLE + SIDE + 22
    foot = TITLE + SIDE + CURVES
    step = f"step {steps[place].step}"
    _text(draw, (GAP, top - 4), text=step, size=15, colour=INK, bold=True)
    caption = "cosine within minus between"
    _text(draw, (GAP, top + 18), text=caption, size=11, colour=MUTED)
    caption = f"groups; colours are {coloured_by}"
    _text(draw, (GAP, top + 32), text=caption, size=11, colour=MUTED)
    # of all steps, so that the axis is the same in all images; zero is always on it
    low = min([0.0, *map(min, curves)])
    high = max([0.1, *map(max, curves)])
    last = len(steps) - 1

    def at(number: int, value: float) -> tuple[float, float]:
        # 60 pixels on the right are for the figures behind the curves
        width = right - 60 - left
        across = left + width * number / max(last, 1)
        down = foot - (foot - top) * (value - low) / (high - low)
        return SHARPNESS * across, SHARPNESS * down

    zero_line = [at(0, 0.0), at(last, 0.0)]
    draw.line(zero_line, fill=(216, 222, 228), width=SHARPNESS)
    labels = []
    for curve, colour in zip(curves, LINES, strict=True):
        so_far = enumerate(curve[: place + 1])
        points = [at(number, value) for number, value in so_far]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2 * SHARPNESS, joint="curve")
        x, y = points[-1]
        size = 3 * SHARPNESS
        box = (x - size, y - size, x + size, y + size)
        draw.ellipse(box, fill=colour)
        figure = f"{curve[place]:+.2f}"
        # a little to the right of the dot, at its height
        across = x / SHARPNESS + 7
        down = y / SHARPNESS - 8
        labels.append((down, across, figure, colour))
    lowest = -np.inf  # the upper label first, so that the lower one can make room
    for down, across, text, colour in sorted(labels):
        lowest = max(down, lowest + 14)
        _text(draw, (across, lowest), text=text, size=12, colour=colour, bold=True)


def _colour(group: int) -> Colour:
    """Colours far apart for neighbouring numbers."""
    # 0.618 is the golden ratio: such steps on the circle of hues keep neighbours far apart
    hue = group * 0.618 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 0.85)
    return int(255 * red), int(255 * green), int(255 * blue)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--features", type=Path, required=True, help="folder written by features")
    parser.add_argument("--shards", type=Path, required=True, help="packed folder they are of")
    parser.add_argument("--labels", type=Path, help="folder of labels.npy (the packed folder)")
    parser.add_argument("--truth", type=Path, help="list of `relative path,label` for the colours")
    parser.add_argument(
        "--output", type=output_path, required=True, help="FILE.gif; FILE.png beside it"
    )
    parser.add_argument("--samples", type=int, default=600, help="samples that are drawn")
    parser.add_argument("--clusters", type=int, default=12, help="largest clusters that are drawn")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--every", type=int, default=20, help="steps between two pictures")
    parser.add_argument("--seed", type=int, default=0, help="of head, batches and noise")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draw; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_draw, argv=argv)


def _draw(args: argparse.Namespace) -> None:
    _check(args)
    features, labels, groups = _load(args)
    runs = [
        train(
            features,
            labels=labels,
            objective=objective,
            steps=args.steps,
            every=args.every,
            seed=args.seed,
        )
        for objective in OBJECTIVES
    ]
    coloured_by = "clusters" if args.truth is None else "true labels"
    pictures = animation(runs, groups=groups, coloured_by=coloured_by)
    colours = pictures[-1].quantize(PALETTE, method=Image.Quantize.MAXCOVERAGE)
    # without dithering flat areas stay flat
    plain = Image.Dither.NONE
    first, *rest = [picture.quantize(palette=colours, dither=plain) for picture in pictures]
    durations = [PICTURE_MS] * len(rest) + [HOLD_MS]
    options = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_picture(args.output, first, **options)
    write_picture(args.output.with_suffix(".png"), pictures[-1])
    for name, snapshots in zip(("batch-contrastive", "global centres"), runs, strict=True):
        before = separation(snapshots[0].embeddings, groups)
        after = separation(snapshots[-1].embeddings, groups)
        print(f"{name}: same minus other groups {before:+.3f} -> {after:+.3f}")
    print(args.output, args.output.with_suffix(".png"))


def _check(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() != ".gif":
        raise ValueError(f"--output {args.output}: the animation is written as FILE.gif")
    for name in ("samples", "clusters", "steps", "every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")


def _load(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(unit features, cluster numbers 0.., colour groups) of the samples that are drawn."""
    from data_pipeline.clustering.browse import read_truth
    from data_pipeline.clustering.features import load_features
    from data_pipeline.clustering.labels import load_labels
    from data_pipeline.clustering.pipeline import fit_projection
    from data_pipeline.shards.manifest import load_manifest

    manifest = load_manifest(args.shards)
    raw, _ = load_features(manifest, args.features)
    labels, _ = load_labels(args.labels or args.shards, manifest)
    nearest = labels[labels[:, 0] >= 0, 0]  # samples without a label have -1
    sizes = np.bincount(nearest, minlength=1)
    # stable, so that equal sizes keep the order of their numbers
    largest = np.argsort(-sizes, kind="stable")[: args.clusters]
    chosen = np.flatnonzero(np.isin(labels[:, 0], largest))
    drawn = np.random.default_rng(args.seed).permutation(chosen)
    chosen = np.sort(drawn[: args.samples])
    features = fit_projection(raw)(raw)[chosen]
    # numbers of the chosen clusters without gaps, as the centres are indexed by them
    clusters = np.searchsorted(np.sort(largest), labels[chosen, 0])
    if len(np.unique(clusters)) < 2:
        raise ValueError(f"{len(chosen)} samples of one cluster: two show what is apart")
    groups = clusters if args.truth is None else read_truth(manifest, args.truth)[chosen]
    return features, clusters, groups


if __name__ == "__main__":
    sys.exit(main())
