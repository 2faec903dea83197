"""What two objectives do to the same samples, drawn over training steps: a PNG and a GIF.

    python eval_encoder/visualize_clusters.py --features FOLDER --shards DIR --output clusters.gif

Left, batch-contrastive: a sample is pulled to another view of itself and pushed from the others of
its batch, also from those that show the same. Right, cluster discrimination: a sample is pulled to
the centre of its cluster and pushed from all other centres of the set. Both train the same small
head on the same stored vectors; embeddings lie on a sphere of three dimensions, drawn from a side.
Colours are clusters (or true labels, with --truth). Beside the GIF, its last picture is written as
PNG. Cost: seconds.
"""

import argparse
import colorsys
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path

SIDE, GAP, CAPTION = 360, 12, 40
BATCH, NOISE, TEMPERATURE, SCALE = 64, 0.3, 0.2, 8.0


@dataclass(frozen=True)
class Snapshot:
    """Embeddings float32 [N, 3] on the unit sphere at a step, and centres [K, 3] if any."""

    step: int
    embeddings: np.ndarray
    centers: np.ndarray | None = None


def train(features, labels, objective: str, steps: int, every: int, seed: int) -> list[Snapshot]:
    """Snapshots of a small head trained on unit features float32 [N, D] by `contrastive` or
    `clusters` (labels int64 [N])."""
    import torch
    import torch.nn.functional as F

    generator = torch.manual_seed(seed)
    rows, classes = torch.from_numpy(features), torch.from_numpy(labels)
    head = torch.nn.Sequential(
        torch.nn.Linear(rows.shape[1], 64), torch.nn.GELU(), torch.nn.Linear(64, 3)
    )
    centers = torch.nn.Parameter(torch.randn(int(classes.max()) + 1, 3, generator=generator))
    optimizer = torch.optim.AdamW([*head.parameters(), centers], lr=3e-3)
    spread = NOISE * rows.std(dim=0)

    def view(chosen):
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
            logits, target = SCALE * view(chosen) @ F.normalize(centers).T, classes[chosen]
        else:
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
    return float(cosines[same].mean() - cosines[other].mean())


def picture(left: Snapshot, right: Snapshot, groups: np.ndarray):
    """Both panels at one step, an RGB image."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (2 * SIDE + 3 * GAP, SIDE + CAPTION + GAP), "white")
    draw = ImageDraw.Draw(image)
    names = ("batch-contrastive", "global centres")
    for place, (name, snapshot) in enumerate(zip(names, (left, right), strict=True)):
        x = GAP + place * (SIDE + GAP)
        apart = separation(snapshot.embeddings, groups)
        text = f"{name}, step {snapshot.step}\nsame minus other clusters: {apart:+.2f}"
        draw.text((x, 6), text, fill="black")
        _panel(draw, x, CAPTION, snapshot, groups)
    return image


def _panel(draw, x: int, y: int, snapshot: Snapshot, groups: np.ndarray) -> None:
    draw.ellipse((x, y, x + SIDE, y + SIDE), outline="lightgray")
    depth = np.argsort(snapshot.embeddings[:, 2])  # those in front last
    for sample in depth:
        _dot(draw, x, y, snapshot.embeddings[sample], 3, _colour(int(groups[sample])))
    if snapshot.centers is not None:
        for center in snapshot.centers[np.argsort(snapshot.centers[:, 2])]:
            _dot(draw, x, y, center, 5, "black")


def _dot(draw, x: int, y: int, point: np.ndarray, radius: int, colour) -> None:
    across, down = (x + SIDE * (point[0] + 1) / 2, y + SIDE * (1 - point[1]) / 2)
    draw.ellipse((across - radius, down - radius, across + radius, down + radius), fill=colour)


def _colour(group: int) -> tuple[int, int, int]:
    """Colours far apart for neighbouring numbers."""
    red, green, blue = colorsys.hsv_to_rgb(group * 0.618 % 1, 0.75, 0.85)
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
        train(features, labels, objective, args.steps, args.every, args.seed)
        for objective in ("contrastive", "clusters")
    ]
    pictures = [picture(left, right, groups) for left, right in zip(*runs, strict=True)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = pictures
    first.save(args.output, save_all=True, append_images=rest, duration=150, loop=0)
    pictures[-1].save(args.output.with_suffix(".png"))
    for name, snapshots in zip(("batch-contrastive", "global centres"), runs, strict=True):
        apart = [separation(snapshots[place].embeddings, groups) for place in (0, -1)]
        print(f"{name}: same minus other groups {apart[0]:+.3f} -> {apart[1]:+.3f}")
    print(args.output, args.output.with_suffix(".png"))


def _check(args) -> None:
    if args.output.suffix.lower() != ".gif":
        raise ValueError(f"--output {args.output}: the animation is written as FILE.gif")
    for name in ("samples", "clusters", "steps", "every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")


def _load(args) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(unit features, cluster numbers 0.., colour groups) of the samples that are drawn."""
    from data_pipeline.clustering.browse import read_truth
    from data_pipeline.clustering.features import load_features
    from data_pipeline.clustering.labels import load_labels
    from data_pipeline.clustering.projection import fit_projection
    from data_pipeline.shards.manifest import load_manifest

    manifest = load_manifest(args.shards)
    raw, _ = load_features(manifest, args.features)
    labels, _ = load_labels(args.labels or args.shards, manifest)
    nearest = labels[labels[:, 0] >= 0, 0]
    largest = np.argsort(-np.bincount(nearest, minlength=1), kind="stable")[: args.clusters]
    chosen = np.flatnonzero(np.isin(labels[:, 0], largest))
    chosen = np.sort(np.random.default_rng(args.seed).permutation(chosen)[: args.samples])
    features = fit_projection(raw)(raw)[chosen]
    clusters = np.searchsorted(np.sort(largest), labels[chosen, 0])
    if len(np.unique(clusters)) < 2:
        raise ValueError(f"{len(chosen)} samples of one cluster: two show what is apart")
    groups = clusters if args.truth is None else read_truth(manifest, args.truth)[chosen]
    return features, clusters, groups


if __name__ == "__main__":
    sys.exit(main())
