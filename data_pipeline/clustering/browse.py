"""A page of what clusters hold: the largest, the smallest and some others, with sample frames.

A cluster's members are the samples whose nearest centroid it is. Where true labels are known, a
cluster's purity is the share of its most frequent one. Cost: one member read per picture shown.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataPipelineError
from ..lists import ids_of_sources, read_labelled_csv, refuse_repeats
from ..loading.shard_reader import ShardReader
from ..shards.manifest import Manifest
from ..shards.schema import SampleInfo, decode_frames, frames_member
from ..side_files import write_picture

SHOWN = 8  # samples of a cluster
# in pixels: a sample's square, the space around it, the line of text above a row
SIDE = 112
GAP = 4
CAPTION = 18


@dataclass(frozen=True)
class ClusterSummary:
    """One cluster: its number, members in the order of sample ids, how many of them have a known
    truth, and the purity of those."""

    cluster: int
    members: np.ndarray
    known: int
    purity: float | None

    def caption(self, group: str) -> str:
        """One line for the picture."""
        purity = "" if self.purity is None else f", purity {self.purity:.0%}"
        return f"{group}: cluster {self.cluster}, {len(self.members)} samples{purity}"


def summarise(
    labels: np.ndarray, num_classes: int, truth: np.ndarray | None = None
) -> list[ClusterSummary]:
    """ClusterSummary of every cluster, largest first. labels int32 [N, L], nearest first; truth
    int [N], -1 unknown.
    """
    nearest = labels[:, 0]
    # sorted by cluster once, instead of one search through all samples for each cluster; stable, so
    # that members stay in the order of their ids
    order = np.argsort(nearest, kind="stable")
    bounds = np.searchsorted(nearest[order], np.arange(num_classes + 1))
    summaries = []
    for cluster in range(num_classes):
        members = order[bounds[cluster] : bounds[cluster + 1]]
        known = []
        purity = None
        if truth is not None:
            known = [label for label in truth[members].tolist() if label >= 0]
        if known:
            _, count = Counter(known).most_common(1)[0]
            purity = count / len(known)
        summaries.append(ClusterSummary(cluster, members=members, known=len(known), purity=purity))
    return sorted(summaries, key=lambda summary: (-len(summary.members), summary.cluster))


def overall_purity(summaries: list[ClusterSummary]) -> float | None:
    """Share of the samples of known truth whose truth is the most frequent one of their cluster;
    None when no truth is known."""
    known = sum(summary.known for summary in summaries)
    # purity times known samples is the number of those with the most frequent truth
    right = sum(s.purity * s.known for s in summaries if s.purity is not None)
    return right / known if known else None


def read_truth(manifest: Manifest, path: Path) -> np.ndarray:
    """True labels int64 [N] from a list of `relative path,label`; -1 where it names no label.

    The list may name more than the samples. DataPipelineError when it names none of them, names one
    twice, or has a line of another form.
    """
    ids = ids_of_sources(manifest)
    rows = read_labelled_csv(path, exists=ids.__contains__)
    refuse_repeats(rows, "a sample has one true label, so keep one line")
    label_of = {row.name: row.label for row in rows if row.label}
    names = sorted(set(label_of.values()))
    numbers = {label: number for number, label in enumerate(names)}
    truth = [numbers.get(label_of.get(source, ""), -1) for source in ids]
    if max(truth, default=-1) < 0:
        raise DataPipelineError(
            f"{path} names none of the samples of {manifest.directory}, e.g. "
            f"{manifest.sources()[0]!r}: write lines of `relative path,label`"
        )
    return np.array(truth)


def save_page(
    manifest: Manifest,
    summaries: list[ClusterSummary],
    output: Path,
    count: int = 4,
    seed: int = 0,
) -> None:
    """Write a PNG with a row of sample frames for the `count` largest, smallest (not empty) and
    random clusters."""
    from PIL import Image

    filled = [summary for summary in summaries if len(summary.members)]
    if not filled:
        raise DataPipelineError(f"no sample of {manifest.directory} has a label: nothing to draw")
    rng = np.random.default_rng(seed)
    middle = rng.permutation(len(filled))[:count]
    groups = {
        "largest": filled[:count],
        "smallest": filled[-count:][::-1],  # the smallest first
        "random": [filled[i] for i in sorted(middle)],
    }
    rows = []
    with ShardReader(manifest) as reader:
        for group, chosen in groups.items():
            for summary in chosen:
                members = summary.members
                spread = np.linspace(0, len(members) - 1, min(SHOWN, len(members)))
                shown = members[np.unique(spread.astype(int))].tolist()
                pictures = [_picture(reader, manifest=manifest, sample_id=i) for i in shown]
                rows.append(_row(summary.caption(group), pictures))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_picture(output, Image.fromarray(np.concatenate(rows)))


def _picture(reader: ShardReader, manifest: Manifest, sample_id: int) -> np.ndarray:
    """The middle frame of a clip, or a picture, fitted into a square of SIDE pixels."""
    from PIL import Image

    _, sample = manifest.locate(sample_id)
    info = SampleInfo.from_bytes(reader.read(sample_id, "json"), sample["key"])
    data = reader.read(sample_id, frames_member(info.kind))
    frames = decode_frames(info, member=data, name=sample["key"])
    small = Image.fromarray(frames[len(frames) // 2])
    small.thumbnail((SIDE, SIDE))
    square = Image.new("RGB", (SIDE, SIDE), "white")
    left = (SIDE - small.width) // 2
    top = (SIDE - small.height) // 2
    square.paste(small, (left, top))
    return np.asarray(square)


def _row(caption: str, pictures: list[np.ndarray]) -> np.ndarray:
    from PIL import Image, ImageDraw

    width = SHOWN * (SIDE + GAP)
    row = Image.new("RGB", (width, CAPTION + SIDE + GAP), "white")
    ImageDraw.Draw(row).text((GAP, 3), caption, fill="black")
    for i, picture in enumerate(pictures):
        row.paste(Image.fromarray(picture), (i * (SIDE + GAP), CAPTION))
    return np.asarray(row)
