"""The demo's report: what was packed, the loss of every round, what each round of clustering
changed, the probe's results, and where files are.

`python -m eval_encoder.probe.report OUTPUT --shards DIR` prints it and writes OUTPUT/report.md.
"""

import argparse
import sys
from pathlib import Path

from eval_encoder.tables import markdown_table
from model_factory.command_line.command import run_command
from model_factory.command_line.plain_text import in_code, in_markdown
from model_factory.files import parse_json_line, read_json, write_atomically

BARS = "▁▂▃▄▅▆▇█"
MAX_BARS = 24  # of a loss curve, so that a row of the table fits a line
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
        _rounds(output / "train", shards=shards, truth=truth),
    ]
    results = output / "probe" / "results.jsonl"
    if results.is_file():  # videos without labels are not probed
        sections.append(_probe(results))
    sections.append(
        "## Where things are\n\n"
        "- contact sheet (frames, motion, selected patches): "
        f"{in_code(output / 'contact_sheet.png')}\n"
        f"- TensorBoard log: {in_code(output / 'train' / 'round_*' / 'tensorboard')}\n"
        f"- exported model: {in_code(output / 'export')}\n"
        f"- this report: {in_code(output / 'report.md')}"
    )
    if seconds:
        sections.append(f"Took {seconds // 60} min {seconds % 60} s without the installation.")
    return "\n\n".join(sections) + "\n"


def _packed(shards: Path) -> str:
    from data_pipeline.shards.manifest import load_manifest
    from data_pipeline.shards.statistics import statistics

    manifest = load_manifest(shards)
    stats = statistics(manifest)
    lines = [
        "## Data",
        "",
        f"Packed: {stats['videos']} videos and {stats['images']} images, "
        f"{stats['bytes'] / 1e6:.1f} MB in {stats['shards']} shards, "
        f"{stats['tokens']['mean']} selected patches per sample, "
        f"{stats['static_videos']} static clips, "
        f"{sum(stats['rejected'].values())} inputs rejected.",
    ]
    for shard in manifest.shards:
        for entry in shard["rejected"]:
            source = in_code(entry["source"])
            reason = in_markdown(entry["reason"])
            lines.append(f"- rejected {source}: {reason}")
    return "\n".join(lines)


def _rounds(run: Path, shards: Path, truth: Path | None) -> str:
    """A row per round of training: its classes, how they differ from those before, its loss."""
    changes = read_json(run / ROUNDS_NAME, {"rounds": list})["rounds"]
    rows = []
    for number, change in enumerate([None, *changes], start=1):
        labels_folder = shards  # the first round's labels are beside the shards
        source = "codec descriptor"
        agreement = "-"
        if change:
            head = _only_head(change, name=f"{run / ROUNDS_NAME} round {number - 1}")
            labels_folder = run / f"round_{number - 1}" / "clusters" / head
            source = f"encoder of round {number - 1}"
            agreement = f"{change[head]['nmi_with_labels_before']:.3f}"
        losses = [
            sum(value for key, value in record.items() if key.startswith("loss/"))
            for record in _records(run / f"round_{number}" / "metrics.jsonl")
        ]
        purity = "-" if truth is None else _purity(shards, labels_folder, truth=truth)
        rows.append((number, source, purity, agreement, len(losses), _sparkline(losses)))
    table = markdown_table(
        ("round", "classes made from", "purity", "NMI with the classes before", "steps", "loss"),
        rows,
        right_aligned=("purity", "NMI with the classes before", "steps"),
    )
    return f"## Training\n\n{table.rstrip()}"


def _only_head(change: dict, name: str) -> str:
    """Name of the head that a clustering between two rounds changed: the demo trains on one packed
    set. ValueError for another number of heads."""
    heads = [key for key in change if key != "after_round"]
    if len(heads) != 1:
        raise ValueError(
            f"{name} names {len(heads)} heads, the demo trains one: run the demo again, into "
            "another folder"
        )
    return heads[0]


def _purity(shards: Path, labels_folder: Path, truth: Path) -> str:
    """Purity of the classes in a folder by the labels that `truth` names."""
    from data_pipeline.clustering.browse import overall_purity, read_truth, summarise
    from data_pipeline.clustering.labels import load_labels
    from data_pipeline.shards.manifest import load_manifest

    manifest = load_manifest(shards)
    labels, num_classes = load_labels(labels_folder, manifest)
    clusters = summarise(labels, num_classes, truth=read_truth(manifest, truth))
    purity = overall_purity(clusters)
    assert purity is not None  # labels were named
    return f"{100 * purity:.1f} %"


def _records(path: Path) -> list[dict]:
    """Objects of a file of JSON lines; ValueError where the file has no line, or a damaged
    one, FileNotFoundError where there is no file."""
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    records = [parse_json_line(line, name=f"{path} line {number}") for number, line in lines]
    if not records:
        raise ValueError(f"{path} has no line: run the demo again")
    return records


def _sparkline(losses: list[float]) -> str:
    """First and last mean of equal parts of a loss curve, and a bar for each part between them."""
    width = min(MAX_BARS, len(losses))
    # rounded edges make parts that differ by one step at most
    edges = [round(part * len(losses) / width) for part in range(width + 1)]
    means = [
        sum(losses[start:end]) / (end - start) for start, end in zip(edges, edges[1:], strict=False)
    ]
    low = min(means)
    spread = max(max(means) - low, 1e-9)  # a flat curve has the lowest bar throughout
    highest = len(BARS) - 1
    heights = [round((mean - low) / spread * highest) for mean in means]
    bars = "".join(BARS[height] for height in heights)
    first = means[0]
    last = means[-1]
    return f"{first:.3f} {bars} {last:.3f}"


def _probe(results: Path) -> str:
    """A row per input and a column per encoder, the untrained one last."""
    from .benchmarks import find_benchmark
    from .compare import with_interval

    records = _records(results)
    # the demo may have been run again into the same folder
    latest = {}
    for record in records:
        latest[record["view"], Path(record["weight"]).name] = record
    trained = sorted({name for _, name in latest} - {UNTRAINED})
    weights = [*trained, UNTRAINED]
    chance = 100 / find_benchmark(records[-1]["dataset"]).num_classes
    rows = []
    for view, name in INPUTS.items():
        found = [latest.get((view, weight)) for weight in weights]
        figures = [with_interval(r["last_epoch"], "top1") if r else "-" for r in found]
        rows.append((name, *figures, f"{chance:.1f}"))
    table = markdown_table(
        ("input (equal token budget)", *weights, "chance"),
        rows,
        right_aligned=(*weights, "chance"),
    )
    seeds = [record["last_epoch"]["seeds"] for record in latest.values()]
    heads = max(map(len, seeds))
    return (
        f"## Attentive probe, top-1 on held-out clips\n\n{table}\n"
        f"Percent at the last epoch, mean of {heads} heads, ± half of a 95 % interval, the larger "
        "of clips and seeds; the learning rate was chosen on held-out training clips."
    )


def main(argv: list[str] | None = None) -> int:
    """Print and write the report; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_report, argv=argv)


def _report(args: argparse.Namespace) -> None:
    report = compose(args.output, args.shards, truth=args.truth, seconds=args.seconds)
    write_atomically(args.output / "report.md", report.encode())
    print(report)


if __name__ == "__main__":
    sys.exit(main())
