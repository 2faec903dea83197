"""The demo's last word: what was packed, how the loss went, what each round of clustering changed,
what the probe says, where things are.

`python -m eval_encoder.probe.report OUTPUT --shards DIR` prints it and writes OUTPUT/report.md.
"""

import argparse
import sys
from pathlib import Path

from model_factory.command_line.command import run_command
from model_factory.command_line.plain_text import in_code, in_markdown
from model_factory.files import parse_json_line, read_json

BARS = "▁▂▃▄▅▆▇█"
ROUNDS_NAME = "rounds.json"
UNTRAINED = "random"
INPUTS = {"frame": "whole frames", "codec": "codec patches"}


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.probe.report", description="Write the demo's report."
    )
    parser.add_argument("output", type=Path, help="folder of the demo")
    parser.add_argument(
        "--shards", type=Path, required=True, help="packed folder that was trained on"
    )
    parser.add_argument("--truth", type=Path, help="lines of `relative path,label`, for purity")
    parser.add_argument("--seconds", type=int, default=0, help="duration of the demo")
    return parser


def compose(output: Path, shards: Path, truth: Path | None = None, seconds: int = 0) -> str:
    """The report as Markdown; purity of the clusters only where `truth` names labels."""
    sections = [
        "# Demo report",
        _packed(shards),
        _rounds(output / "train", shards, truth),
        _probe(output / "probe" / "results.jsonl"),
        _paths(output),
    ]
    if seconds:
        sections.append(f"Took {seconds // 60} min {seconds % 60} s without the installation.")
    return "\n\n".join(section for section in sections if section) + "\n"


def _packed(shards: Path) -> str:
    from data_pipeline.shards.manifest import load_manifest
    from data_pipeline.shards.statistics import statistics

    manifest = load_manifest(shards)
    stats = statistics(manifest)
    lines = [
        f"Packed: {stats['videos']} videos and {stats['images']} images, "
        f"{stats['bytes'] / 1e6:.1f} MB in {stats['shards']} shards, "
        f"{stats['tokens']['mean']} kept patches per sample, "
        f"{stats['static_videos']} static clips, "
        f"{sum(stats['rejected'].values())} inputs rejected."
    ]
    rejected = [entry for shard in manifest.shards for entry in shard["rejected"]]
    lines += [
        f"- rejected {in_code(entry['source'])}: {in_markdown(entry['reason'])}"
        for entry in rejected
    ]
    return "\n".join(["## Data", "", *lines])


def _rounds(run: Path, shards: Path, truth: Path | None) -> str:
    """A row per round of training: its classes, how they differ from those before, its loss."""
    changes = read_json(run / ROUNDS_NAME, {"rounds": list})["rounds"]
    lines = [
        "## Training",
        "",
        "| round | classes made from | purity | NMI with the classes before | steps | loss |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for number, change in enumerate([None, *changes], 1):
        folder, source, shared = shards, "codec descriptor", "-"
        if change:
            (head,) = (change[name] for name in change if name != "after_round")
            (folder,) = (run / f"round_{number - 1}" / "clusters").iterdir()
            source = f"encoder of round {number - 1}"
            shared = f"{head['nmi_with_labels_before']:.3f}"
        losses = _losses(run / f"round_{number}" / "metrics.jsonl")
        lines.append(
            f"| {number} | {source} | {_purity(shards, folder, truth)} | {shared} | "
            f"{len(losses)} | {_sparkline(losses)} |"
        )
    return "\n".join(lines)


def _purity(shards: Path, labels_folder: Path, truth: Path | None) -> str:
    if truth is None:
        return "-"
    from data_pipeline.clustering.browse import overall_purity, read_truth, summarise
    from data_pipeline.clustering.labels import load_labels
    from data_pipeline.shards.manifest import load_manifest

    manifest = load_manifest(shards)
    labels, num_classes = load_labels(labels_folder, manifest)
    purity = overall_purity(summarise(labels, num_classes, read_truth(manifest, truth)))
    return f"{100 * purity:.1f} %"


def _losses(metrics: Path) -> list[float]:
    records = _lines(metrics)
    return [sum(value for key, value in r.items() if key.startswith("loss/")) for r in records]


def _lines(path: Path) -> list[dict]:
    """Objects of a file of JSON lines; ValueError where there is none, or a damaged one."""
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    records = [parse_json_line(line, name=f"{path} line {number}") for number, line in lines]
    if not records:
        raise ValueError(f"{path} has no line: run the demo again")
    return records


def _sparkline(losses: list[float]) -> str:
    width = min(24, len(losses))
    edges = [round(i * len(losses) / width) for i in range(width + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    bars = "".join(BARS[round((m - low) / max(high - low, 1e-9) * (len(BARS) - 1))] for m in means)
    return f"{means[0]:.3f} {bars} {means[-1]:.3f}"


def _probe(results: Path) -> str:
    if not results.is_file():
        return ""
    from .benchmarks import find_benchmark
    from .compare import with_interval

    records = _lines(results)
    latest = {(r["view"], Path(r["weight"]).name): r for r in records}
    weights = sorted({name for _, name in latest} - {UNTRAINED}) + [UNTRAINED]
    chance = 100 / find_benchmark(records[-1]["dataset"]).num_classes
    lines = [
        "## Attentive probe, top-1 on held-out clips",
        "",
        f"| input (equal token budget) | {' | '.join(map(in_markdown, weights))} | chance |",
        f"| --- |{' ---: |' * (len(weights) + 1)}",
    ]
    for view, name in INPUTS.items():
        found = [latest.get((view, weight)) for weight in weights]
        cells = [with_interval(r["last_epoch"], "top1") if r else "-" for r in found]
        lines.append(f"| {name} | {' | '.join(cells)} | {chance:.1f} |")
    heads = max(len(record["last_epoch"]["seeds"]) for record in latest.values())
    lines += [
        "",
        f"Percent at the last epoch, mean of {heads} heads, ± half of a 95 % interval, the larger "
        "of clips and seeds; the learning rate was chosen on held-out training clips.",
    ]
    return "\n".join(lines)


def _paths(output: Path) -> str:
    places = {
        "contact sheet (frames, motion, kept patches)": output / "contact_sheet.png",
        "TensorBoard log": output / "train" / "round_*" / "tensorboard",
        "exported model": output / "export",
        "this report": output / "report.md",
    }
    return "\n".join(
        [
            "## Where things are",
            "",
            *(f"- {name}: {in_code(path)}" for name, path in places.items()),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Print and write the report; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_report, argv=argv)


def _report(args: argparse.Namespace) -> None:
    report = compose(args.output, args.shards, args.truth, args.seconds)
    (args.output / "report.md").write_text(report)
    print(report)


if __name__ == "__main__":
    sys.exit(main())
