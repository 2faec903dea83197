"""Rows and plots of the records that probes leave behind (record.py), and how several are compared.

    python -m eval_encoder.probe.compare compare A B ... [--output DIR]

writes compare.md and, per data set, a plot of accuracy against tokens per clip, of the results in
folders A, B, ...; published figures (published.py) have a block of their own.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

from eval_encoder.intervals import half_interval, with_half_width
from eval_encoder.probe.config import VIDEO_FAMILIES
from eval_encoder.probe.published import SOURCE, Anchor, anchors
from eval_encoder.tables import markdown_table
from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.plain_text import in_markdown, in_plot
from model_factory.files import parse_json_line

COLUMNS = ("dataset", "encoder", "input", "tokens", "head", "figure", "last epoch", "best epoch",
           "seeds", "clips")  # fmt: skip
# Names that weights of any encoder have: the name of the folder around them goes before.
GENERAL_NAMES = ("hf", "backbone.pt", "model.safetensors", "checkpoints")
MAX_NUMBERED_CLASSES = 20  # beyond it, numbers in the cells of a confusion matrix overlap


def cells_of(record: dict) -> list[str]:
    """Cells of a record's row in a table of COLUMNS."""
    metric = record["metric"]
    best = record["best_epoch"]
    num_unreadable = len(record["unreadable"]["val"])
    clips = str(record["clips"]["val"])
    return [
        record["dataset"],
        encoder_name(record),
        input_name(record),
        f"{record['costs']['tokens_per_clip']:g}",
        record["head"],
        metric,
        with_interval(record["last_epoch"], metric),
        f"{best[metric]:.1f} ({best['epoch']})" if best else "-",
        str(len(record["last_epoch"].get("seeds", [0]))),
        f"{clips} - {num_unreadable}" if num_unreadable else clips,
    ]


def encoder_name(record: dict) -> str:
    """Family and weights, short; `random` with the model it is of."""
    family = "" if record["family"] in VIDEO_FAMILIES else f"{record['family']} "
    path = Path(record["weight"])
    if record["weight"] == "random":
        return f"random {record['model']}"
    if path.name.startswith("step_"):  # RUN/checkpoints/step_00000010
        run = path.absolute().parents[1]
        return f"{family}{run.name}/{path.name}"
    if path.name in GENERAL_NAMES:
        return f"{family}{path.parent.name}/{path.name}"
    return f"{family}{path.name}"


def input_name(record: dict) -> str:
    """`8 frames` or `codec 2048`."""
    if record["view"] == "codec":
        return f"codec {record['num_tokens']}"
    plural = "" if record["num_frames"] == 1 else "s"
    return f"{record['num_frames']} frame{plural}"


def with_interval(figures: dict, metric: str) -> str:
    """`71.2 ± 2.9`: mean, and half of the 95 % interval that is reported."""
    return with_half_width(figures[metric], half_interval(figures))


def draw_confusion(counts: np.ndarray, path: Path) -> None:
    """Draw the share of every predicted class among the clips of each true class, [K true,
    K predicted], with numbers while there are few classes."""
    from matplotlib.figure import Figure

    classes = len(counts)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    # inches: cells stay legible for some thirty classes, and the file stays small beyond
    side = min(14.0, 3 + 0.35 * classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="predicted class", ylabel="true class", title="share of the true class")
    figure.colorbar(image, shrink=0.8)
    if classes <= MAX_NUMBERED_CLASSES:
        axes.set(xticks=range(classes), yticks=range(classes))
        for (row, column), share in np.ndenumerate(shares):
            # viridis is dark below about 0.6
            colour = "white" if share < 0.6 else "black"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, size=8)
    figure.savefig(path, dpi=100)


def compare(folders: list[Path], output: Path) -> Path:
    """Write compare.md and the plots; returns the table's path. Raises ValueError for a folder
    without results."""
    records = [record for folder in folders for record in read_results(folder)]
    output.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        key = (record["dataset"], record["metric"])
        groups.setdefault(key, []).append(record)

    sections = ["# Probes compared"]
    for (dataset, metric), group in sorted(groups.items()):
        group.sort(
            key=lambda record: (
                encoder_name(record),
                record["view"],
                record["costs"]["tokens_per_clip"],
            )
        )
        # A folder of one's own may have a benchmark's name, and mAP is another figure.
        comparable = metric == "top1" and group[0]["is_benchmark"]
        published = [a for a in anchors() if comparable and dataset in a.values]
        # A name of any characters becomes one that names a file here and needs no escape in a link.
        file_name = re.sub(r"[^A-Za-z0-9.-]", "_", dataset)
        plot = output / f"compare_{file_name}_{metric}.png"
        _draw(group, published, path=plot)
        sections += [
            f"\n## {in_markdown(dataset)}\n",
            markdown_table(COLUMNS, map(cells_of, group)).rstrip("\n"),
            f"\n![accuracy against tokens per clip]({plot.name})",
        ]
        if published:
            columns = ("encoder", "input", "tokens", "top-1")
            rows = [
                (anchor.encoder, anchor.input, anchor.tokens, anchor.values[dataset])
                for anchor in published
            ]
            sections += [
                f"\nPublished by others ({SOURCE}), best epoch on the validation set, one seed, "
                "another part of the set; not measured here:\n",
                markdown_table(columns, rows, right_aligned=("tokens", "top-1")).rstrip("\n"),
            ]
    sections.append(
        "\n± is half of a 95 % interval, the larger of that which the choice of validation clips "
        "leaves and that over the seeds. The setting "
        "and, for `best epoch`, the epoch (in brackets) were chosen on held-out training clips."
    )
    table = output / "compare.md"
    table.write_text("\n".join(sections) + "\n")
    return table


def read_results(folder: Path) -> list[dict]:
    """Records of a report folder; of probes that differ in nothing but their time the latest."""
    path = folder / "results.jsonl" if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give folders that --output (--save_report) named")
    records = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        record = parse_json_line(line, name=f"{path} line {number}")
        if "encoder_sha256" not in record:
            raise ValueError(f"{path} line {number} is no record of this probe: probe again")
        # The folders of cache and report, and the size of the cache, change no figure.
        config = {
            name: value
            for name, value in record["config"].items()
            if not name.startswith(("cache", "rep"))
        }
        identity = [record["encoder_sha256"], config, record["clips"], record.get("read_from")]
        # results.jsonl is appended to, so the last of equal probes is the latest
        records[json.dumps(identity, sort_keys=True)] = record
    if not records:
        raise ValueError(f"{path} holds no result")
    return list(records.values())


def _draw(records: list[dict], published: list[Anchor], path: Path) -> None:
    """Plot accuracy against tokens per clip, a curve for each encoder, view and head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    curves: dict[str, list[dict]] = {}
    for record in records:
        encoder = encoder_name(record)
        name = f"{encoder}, {record['view']}, {record['head']}"
        curves.setdefault(name, []).append(record)
    # `compare` has sorted the records by their tokens
    for name, curve in curves.items():
        axes.errorbar(
            [record["costs"]["tokens_per_clip"] for record in curve],
            [record["last_epoch"][record["metric"]] for record in curve],
            yerr=[half_interval(record["last_epoch"]) for record in curve],
            marker="o",
            capsize=3,
            label=in_plot(name),
        )
    for anchor in published:
        label = f"published: {anchor.encoder}, {anchor.input}"
        value = anchor.values[records[0]["dataset"]]
        axes.plot(anchor.tokens, value, "x", alpha=0.6, label=label)
    # budgets are compared at powers of two, as the published ones are
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens per clip", ylabel=f"{records[0]['metric']}, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m eval_encoder.probe.compare")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("compare", help="table and plots of several probes")
    one.add_argument("folders", nargs="+", type=Path, help="report folders (--output of a probe)")
    one.add_argument("--output", type=output_path, default=Path("output/probe_compare"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Compare; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_compare, argv=argv)


def _compare(args: argparse.Namespace) -> None:
    print(compare(args.folders, args.output))


if __name__ == "__main__":
    sys.exit(main())
