"""What a probe leaves behind, and how several are compared.

    results.jsonl       the record: one line per probe
    table.md            one row per probe
    NAME_confusion.png  counts of true against predicted classes
    report_attentive_probe_<weights>.txt    the public one-line report

    python eval_encoder/probe_results.py compare A B ... [--output DIR]

writes compare.md and, per data set, a plot of accuracy against tokens per clip, of the results in
folders A, B, ...; published figures stand in a block of their own.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from eval_encoder.probe_anchors import SOURCE, anchors_of
from eval_encoder.probe_config import VIDEO_FAMILIES, ProbeConfig

COLUMNS = ("dataset", "encoder", "input", "tokens", "head", "figure", "last epoch", "best epoch",
           "seeds", "clips")  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """Of one probe: seconds in all and inside of the encoder (rank 0), tokens per clip that
    entered the heads, encoder passes, ranks and device."""

    wall_s: float
    encoder_s: float
    tokens_per_clip: float
    encoder_passes: int
    world_size: int
    device: str


def summarise(config: ProbeConfig, history, num_clips: dict[str, int]) -> dict:
    """The record of a bank of heads: figures of the setting that the held-out part of train chose,
    mean over its seeds. See docs/evaluation.md for every field."""
    settings = history.settings
    chosen, held = _chosen(history)
    heads = [i for i, s in enumerate(settings) if (s.lr, s.weight_decay) == chosen]
    metric = history.last.metric
    record = _facts(config, num_clips) | {
        "metric": metric,
        "chosen": {"lr": chosen[0], "weight_decay": chosen[1], "held_out": held},
        "last_epoch": _figures(history, heads, len(history.epochs) - 1, metric),
        "best_epoch": None,
        "best_epoch_on_validation": _flattering(history, metric),
        "per_class": history.last.per_class(heads),
        "grid": _grid(history, metric),
    }
    if history.held:
        means = [np.mean(values[heads]) for values in history.held]
        best = int(np.argmax(means))
        record["best_epoch"] = _figures(history, heads, best, metric)
    return record


def summarise_neighbours(config: ProbeConfig, k: int, held, judged, num_clips) -> dict:
    """The record of nearest neighbours."""
    main = float(judged.main()[0])
    top5 = float(judged.top(5)[0]) if judged.scores is None else main
    return _facts(config, num_clips) | {
        "metric": judged.metric,
        "chosen": {"k": k, "held_out": None if held is None else round(float(held.main()[0]), 4)},
        "last_epoch": {
            judged.metric: round(main, 4),
            "top5": round(top5, 4),
            "ci95_clips": round(judged.clip_interval([0]), 4),
        },
        "best_epoch": None,
        "per_class": judged.per_class([0]),
    }


def write_results(
    config: ProbeConfig, record: dict, confusion: np.ndarray | None, costs: Costs, unreadable: dict
) -> dict:
    """Append to the files of the report folder; returns the whole record."""
    from importlib.metadata import version

    folder = config.report_dir
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    number = len(results.read_text().splitlines()) if results.is_file() else 0
    software = {name: version(name) for name in ("torch", "av", "transformers")}
    record |= {"unreadable": unreadable, "costs": asdict(costs)}
    record |= {"software": {"python": platform.python_version(), **software}}
    if confusion is not None:
        name = f"{number:03d}_{record['dataset']}_confusion.png"
        record["confusion"] = name
        draw_confusion(confusion, folder / name)
    with open(results, "a") as stream:
        stream.write(json.dumps(record) + "\n")
    table = folder / "table.md"
    header = "" if table.is_file() else _table_head()
    with open(table, "a") as stream:
        stream.write(header + table_row(record) + "\n")
    weights = Path(config.model_weight).name
    with open(folder / f"report_attentive_probe_{weights}.txt", "a") as stream:
        stream.write(f"{record['dataset']} {record['last_epoch'][record['metric']]:.2f}\n")
    return record


def table_row(record: dict) -> str:
    """One line of a Markdown table."""
    metric, last = record["metric"], record["last_epoch"]
    best = record.get("best_epoch")
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
        f"{record['clips']['val']}" + (f" - {n}" if (n := len(record["unreadable"])) else ""),
    ]
    return f"| {' | '.join(cells)} |"


def encoder_name(record: dict) -> str:
    """Family and weights, short."""
    family = "" if record["family"] in VIDEO_FAMILIES else f"{record['family']} "
    return f"{family}{Path(record['weight']).name}"


def input_name(record: dict) -> str:
    """`8 frames` or `codec 2048`."""
    if record["view"] == "codec":
        return f"codec {record['num_tokens']}"
    return f"{record['num_frames']} frame{'s' * (record['num_frames'] != 1)}"


def with_interval(figures: dict, metric: str) -> str:
    """`71.2 +- 2.9`: mean, and half of the 95 % interval that the choice of clips leaves."""
    return f"{figures[metric]:.1f} ± {figures['ci95_clips']:.1f}"


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
    for dataset in sorted({record["dataset"] for record in records}):
        own = [record for record in records if record["dataset"] == dataset]
        own.sort(key=lambda r: (encoder_name(r), r["view"], r["costs"]["tokens_per_clip"]))
        parts += [f"\n## {dataset}\n", _table_head() + "\n".join(table_row(r) for r in own)]
        plot = output / f"compare_{dataset.replace('/', '_')}.png"
        _draw(own, anchors_of(dataset), plot)
        parts.append(f"\n![accuracy against tokens per clip]({plot.name})")
        parts += _published(dataset)
    parts.append(
        "\n± is half of the 95 % interval that the choice of validation clips leaves. The setting "
        "and, for `best epoch`, the epoch (in brackets) were chosen on held-out training clips."
    )
    table = output / "compare.md"
    table.write_text("\n".join(parts) + "\n")
    return table


def read_results(folder: Path) -> list[dict]:
    """Records of a report folder; of the same probe the latest."""
    path = folder / "results.jsonl" if folder.is_dir() else folder
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give folders that --save_report named")
    records = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        record = json.loads(line)
        if "costs" not in record or "view" not in record:
            raise ValueError(f"{path} line {number} is no record of this probe: probe again")
        same = ("dataset", "family", "weight", "num_frames", "num_tokens", "head", "seed")
        records[tuple(record[name] for name in same)] = record
    return list(records.values())


def _facts(config: ProbeConfig, num_clips: dict[str, int]) -> dict:
    return {
        "dataset": Path(config.dataset).name if "/" in config.dataset else config.dataset.lower(),
        "family": config.input.family,
        "view": config.input.view,
        "weight": config.model_weight,
        "model": config.model_name,
        "num_frames": config.input.num_frames,
        "num_tokens": config.input.num_tokens,
        "head": config.heads.kind,
        "seed": config.heads.seed,
        "epochs": config.heads.epochs,
        "clips": num_clips,
        "config": json.loads(json.dumps(asdict(config), default=str)),
    }


def _chosen(history) -> tuple[tuple[float, float], float | None]:
    """((lr, weight decay), its figure) of the largest mean over the seeds on the held-out clips at
    the last epoch; settings with a head that went astray are out."""
    values: dict[tuple, list[float]] = {}
    for number, s in enumerate(history.settings):
        found = history.held[-1][number] if history.held else 0.0
        bad = number in history.astray
        values.setdefault((s.lr, s.weight_decay), []).append(-np.inf if bad else found)
    means = {setting: float(np.mean(found)) for setting, found in values.items()}
    chosen = max(means, key=means.get)
    return chosen, round(means[chosen], 4) if history.held else None


def _figures(history, heads: list[int], place: int, metric: str) -> dict:
    from eval_encoder.probe_metrics import seed_interval

    values = history.main[place][heads]
    interval = seed_interval(values)
    figures = {
        metric: round(float(values.mean()), 4),
        "top5": round(float(history.top5[place][heads].mean()), 4),
        "epoch": history.epochs[place],
        "seeds": [round(float(value), 4) for value in values],
        "ci95_seeds": None if interval is None else round(interval, 4),
    }
    if place == len(history.epochs) - 1:
        figures["ci95_clips"] = round(history.last.clip_interval(heads), 4)
    return figures


def _flattering(history, metric: str) -> dict:
    """The largest figure of any head at any epoch, as published protocols report it."""
    values = np.array(history.main)
    values[:, sorted(history.astray)] = -np.inf
    epoch, head = np.unravel_index(np.argmax(values), values.shape)
    setting = history.settings[head]
    return {
        metric: round(float(values[epoch, head]), 4),
        "epoch": history.epochs[epoch],
        "lr": setting.lr,
    }


def _grid(history, metric: str) -> list[dict]:
    """Every head at the last epoch."""
    return [
        asdict(setting)
        | {
            metric: round(float(history.main[-1][i]), 4),
            "held_out": round(float(history.held[-1][i]), 4) if history.held else None,
            "astray": i in history.astray,
        }
        for i, setting in enumerate(history.settings)
    ]


def _table_head() -> str:
    return f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"


def _published(dataset: str) -> list[str]:
    rows = anchors_of(dataset)
    if not rows:
        return []
    lines = [f"| {a.encoder} | {a.input} | {a.tokens} | {value} |" for a, value in rows]
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
        point = (record["costs"]["tokens_per_clip"], last[record["metric"]], last["ci95_clips"])
        curves.setdefault(name, []).append(point)
    for name, points in curves.items():
        tokens, values, halves = zip(*sorted(points), strict=True)
        axes.errorbar(tokens, values, yerr=halves, marker="o", capsize=3, label=name)
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
    parser = argparse.ArgumentParser(prog="python eval_encoder/probe_results.py")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("compare", help="table and plots of several probes")
    one.add_argument("folders", nargs="+", type=Path, help="report folders (--save_report)")
    one.add_argument("--output", type=Path, default=Path("output/probe_compare"))
    return parser


def main(argv: list[str] | None = None) -> None:
    """Compare; a user's mistake ends with its message."""
    args = build_parser().parse_args(argv)
    try:
        print(compare(args.folders, args.output))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
