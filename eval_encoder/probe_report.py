"""The demo's last word: what was packed, how the loss went, what the probe says, where things are.

`python -m eval_encoder.probe_report OUTPUT --shards DIR` prints it and writes OUTPUT/report.md.
"""

import argparse
import json
from pathlib import Path

from .probe_datasets import find_benchmark

BARS = "▁▂▃▄▅▆▇█"
INPUTS = {"llava_vit_sampling": "whole frames", "llava_vit_codec": "codec patches"}


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.probe_report", description="Write the demo's report."
    )
    parser.add_argument("output", type=Path, help="folder of the demo")
    parser.add_argument(
        "--shards", type=Path, required=True, help="packed folder that was trained on"
    )
    parser.add_argument("--seconds", type=int, default=0, help="duration of the demo")
    return parser


def compose(output: Path, shards: Path, seconds: int) -> str:
    """The report as Markdown."""
    sections = [
        "# Demo report",
        _packed(shards),
        _losses(output / "train" / "metrics.jsonl"),
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
    lines += [f"- rejected `{entry['source']}`: {entry['reason']}" for entry in rejected]
    return "\n".join(["## Data", "", *lines])


def _losses(metrics: Path) -> str:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [sum(value for key, value in r.items() if key.startswith("loss/")) for r in records]
    width = min(60, len(losses))
    edges = [round(i * len(losses) / width) for i in range(width + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    bars = "".join(BARS[round((m - low) / max(high - low, 1e-9) * (len(BARS) - 1))] for m in means)
    return "\n".join(
        [
            "## Training",
            "",
            f"{len(records)} steps; loss {means[0]:.3f} -> {means[-1]:.3f}",
            "",
            f"    {bars}",
        ]
    )


def _probe(results: Path) -> str:
    if not results.is_file():
        return ""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    latest = {(r["family"], r["weight"] == "random"): r for r in records}
    chance = 100 / find_benchmark(records[-1]["dataset"]).num_classes
    lines = [
        "## Attentive probe, top-1 on held-out clips",
        "",
        "| input (equal token budget) | trained | untrained | chance |",
        "| --- | ---: | ---: | ---: |",
    ]
    for family, name in INPUTS.items():
        cells = []
        for untrained in (False, True):
            record = latest.get((family, untrained))
            cells.append(f"{record['last_epoch']['top1']:.1f} %" if record else "-")
        lines.append(f"| {name} | {' | '.join(cells)} | {chance:.1f} % |")
    seeds = sorted({record["seed"] for record in latest.values()})
    lines += ["", f"Last epoch, best of the learning rates tried; probe seed {seeds}."]
    return "\n".join(lines)


def _paths(output: Path) -> str:
    places = {
        "contact sheet (frames, motion, kept patches)": output / "contact_sheet.png",
        "TensorBoard log": output / "train" / "tensorboard",
        "exported model": output / "export",
        "this report": output / "report.md",
    }
    return "\n".join(
        ["## Where things are", "", *(f"- {name}: {path}" for name, path in places.items())]
    )


def main(argv: list[str] | None = None) -> None:
    """Print and write the report."""
    args = build_parser().parse_args(argv)
    report = compose(args.output, args.shards, args.seconds)
    (args.output / "report.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
