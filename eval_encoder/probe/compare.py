"""Records of probes (probe_record.py) as rows and pictures, and how several are compared.

    python -m eval_encoder.probe.compare compare A B ... [--output DIR]

writes compare.md and, per data set, a plot of accuracy against tokens per clip, of the results in
folders A, B, ...; published figures stand in a block of their own.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

from eval_encoder.probe.config import VIDEO_FAMILIES
from eval_encoder.probe.published import SOURCE, anchors_of
from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.plain_text import in_markdown, in_plot
from model_factory.files import parse_json_line

COLUMNS = ("dataset", "encoder", "input", "tokens", "head", "figure", "last epoch", "best epoch",
           "seeds", "clips")  # fmt: skip


def table_row(record: dict) -> str:
    """One line of a Markdown table."""
    metric, last = record["metric"], record["last_epoch"]
    best, missed = record["best_epoch"], len(record["unreadable"]["val"])
    cells = [
        record["dataset"],
        encoder_name(record),
        input_name(record),
        f"{record['costs']['tokens_per_clip']:g}",
        record["head"],
        metric,
        with_interval(last, metric),
        f"{best[metric]:.1f} ({best['epoch']})" if best else "-",
        str(len(last.get("seeds", [0]))),
        f"{record['clips']['val']}" + f" - {missed}" * (missed > 0),
    ]
    return f"| {' | '.join(map(in_markdown, cells))} |"


def encoder_name(record: dict) -> str:
    """Family and weights, short; `random` with the model it is of."""
    family = "" if record["family"] in VIDEO_FAMILIES else f"{record['family']} "
    path = Path(record["weight"])
    if record["weight"] == "random":
        return f"random {record['model']}"
    if path.name.startswith("step_"):
        return f"{family}{path.absolute().parents[1].name}/{path.name}"
    general = path.name in ("hf", "backbone.pt", "model.safetensors", "checkpoints")
    return f"{family}{path.parent.name}/{path.name}" if general else f"{family}{path.name}"


def input_name(record: dict) -> str:
    """`8 frames` or `codec 2048`."""
    if record["view"] == "codec":
        return f"codec {record['num_tokens']}"
    return f"{record['num_frames']} frame{'s' * (record['num_frames'] != 1)}"


def with_interval(figures: dict, metric: str) -> str:
    """`71.2 +- 2.9`: mean, and half of the larger of the two 95 % intervals, that which the choice
    of clips leaves and that over the seeds."""
    return f"{figures[metric]:.1f} ± {half_interval(figures):.1f}"


def half_interval(figures: dict) -> float:
    """Half of the 95 % interval that counts."""
    return max(figures["ci95_clips"], figures.get("ci95_seeds") or 0.0)


def draw_confusion(counts: np.ndarray, path: Path) -> None:
    """Shares of every true class as a picture; numbers too while there are few classes."""
    from matplotlib.figure import Figure

    classes = len(counts)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side = min(14.0, 3 + 0.35 * classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="predicted class", ylabel="true class", title="share of the true class")
    figure.colorbar(image, shrink=0.8)
    if classes <= 20:
        axes.set(xticks=range(classes), yticks=range(classes))
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share < 0.6 else "black"
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, size=8)
    figure.savefig(path, dpi=100)


def compare(folders: list[Path], output: Path) -> Path:
    """Write compare.md and the plots; returns the table's path. ValueError for a folder without
    results."""
    records = [record for folder in folders for record in read_results(folder)]
    output.mkdir(parents=True, exist_ok=True)
    parts = ["# Probes compared"]
    for dataset, metric in sorted({(r["dataset"], r["metric"]) for r in records}):
        own = [r for r in records if (r["dataset"], r["metric"]) == (dataset, metric)]
        own.sort(key=lambda r: (encoder_name(r), r["view"], r["costs"]["tokens_per_clip"]))
        parts += [
            f"\n## {in_markdown(dataset)}\n",
            table_head() + "\n".join(table_row(r) for r in own),
        ]
        comparable = metric == "top1" and own[0]["is_benchmark"]
        anchors = anchors_of(dataset) if comparable else []
        # a name of any signs becomes one that names a file here and needs no escape in a link
        plot = output / f"compare_{re.sub(r'[^A-Za-z0-9.-]', '_', dataset)}_{metric}.png"
        _draw(own, anchors, plot)
        parts.append(f"\n![accuracy against tokens per clip]({plot.name})")
        parts += _published(anchors)
    parts.append(
        "\n± is half of a 95 % interval, the larger of that which the choice of validation clips "
        "leaves and that over the seeds. The setting "
        "and, for `best epoch`, the epoch (in brackets) were chosen on held-out training clips."
    )
    table = output / "compare.md"
    table.write_text("\n".join(parts) + "\n")
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
        config = {k: v for k, v in record["config"].items() if not k.startswith(("cache", "rep"))}
        same = [record["encoder_sha256"], config, record["clips"], record.get("read_from")]
        records[json.dumps(same, sort_keys=True)] = record
    if not records:
        raise ValueError(f"{path} holds no result")
    return list(records.values())


def table_head() -> str:
    """The two lines above the rows."""
    return f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"


def _published(anchors: list) -> list[str]:
    if not anchors:
        return []
    lines = [f"| {a.encoder} | {a.input} | {a.tokens} | {value} |" for a, value in anchors]
    return [
        f"\nPublished by others ({SOURCE}), best epoch on the validation set, one seed, another "
        "part of the set; not measured here:\n",
        "| encoder | input | tokens | top-1 |\n| --- | --- | ---: | ---: |",
        *lines,
    ]


def _draw(records: list[dict], anchors: list, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    curves: dict[str, list] = {}
    for record in records:
        name = f"{encoder_name(record)}, {record['view']}, {record['head']}"
        last = record["last_epoch"]
        point = (record["costs"]["tokens_per_clip"], last[record["metric"]], half_interval(last))
        curves.setdefault(name, []).append(point)
    for name, points in curves.items():
        tokens, values, halves = zip(*sorted(points), strict=True)
        axes.errorbar(tokens, values, yerr=halves, marker="o", capsize=3, label=in_plot(name))
    for anchor, value in anchors:
        label = f"published: {anchor.encoder}, {anchor.input}"
        axes.plot(anchor.tokens, value, "x", alpha=0.6, label=label)
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
    one.add_argument(
        "folders",
        nargs="+",
        type=Path,
        help="report folders (--output of a probe)",
    )
    one.add_argument("--output", type=output_path, default=Path("output/probe_compare"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Compare; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_compare, argv=argv)


def _compare(args: argparse.Namespace) -> None:
    print(compare(args.folders, args.output))


if __name__ == "__main__":
    sys.exit(main())
