"""What a probe leaves behind: one record of everything it did and found.

results.jsonl       the record: one line per probe, fields in docs/evaluation.md
table.md            one row per probe
NAME_confusion.png  shares of predicted classes
NAME_classes.csv    lines of `number,class`, where classes have names
report_attentive_probe_<weights>.txt    the public one-line report
"""

import csv
import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from model_factory.command_line.plain_text import printable
from model_factory.files import json_line

from .benchmarks import BENCHMARKS
from .compare import draw_confusion, table_head, table_row
from .config import ProbeConfig
from .metrics import seed_interval


@dataclass(frozen=True)
class Costs:
    """Of one probe: seconds in all and inside of the encoder (rank 0), tokens of a clip (of all its
    crops), encoder passes of rank 0, ranks and device."""

    wall_s: float
    encoder_s: float
    tokens_per_clip: float
    encoder_passes: int
    world_size: int
    device: str


def summarise(config: ProbeConfig, history, num_clips: dict[str, int]) -> dict:
    """The record of a bank of heads: figures of the setting that the held-out part of train chose,
    mean over its seeds. See docs/evaluation.md for every field."""
    chosen, held = _chosen(history)
    heads = heads_of(history, chosen)
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
    if len(history.held) == len(history.epochs):  # held-out clips could be read in every epoch
        means = [np.mean(values[heads]) for values in history.held]
        best = int(np.argmax(means))
        record["best_epoch"] = _figures(history, heads, best, metric)
    return record


def heads_of(history, chosen: tuple[float, float]) -> list[int]:
    """The heads of a setting (lr, weight decay) that did not go astray."""
    return [
        i
        for i, s in enumerate(history.settings)
        if (s.lr, s.weight_decay) == chosen and i not in history.astray
    ]


def summarise_neighbours(config: ProbeConfig, k: int, held, judged, num_clips) -> dict:
    """The record of nearest neighbours."""
    main, top5 = float(judged.main()[0]), judged.top5()
    return _facts(config, num_clips) | {
        "metric": judged.metric,
        "chosen": {"k": k, "held_out": None if held is None else round(float(held.main()[0]), 4)},
        "last_epoch": {
            judged.metric: round(main, 4),
            "top5": None if top5 is None else round(float(top5[0]), 4),
            "ci95_clips": round(judged.clip_interval([0]), 4),
        },
        "best_epoch": None,
        "per_class": judged.per_class([0]),
    }


def write_results(
    config: ProbeConfig,
    record: dict,
    confusion: np.ndarray | None,
    costs: Costs,
    facts: dict,
    classes: tuple[str, ...] = (),
) -> dict:
    """Append to the files of the report folder; returns the whole record. facts: what else to
    note, `unreadable` {split: {name: reason}} among it. classes: names in the order of their
    numbers, if classes have names."""
    from importlib.metadata import version

    folder = config.report_dir
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    number = len(results.read_text().splitlines()) if results.is_file() else 0
    software = {name: version(name) for name in ("torch", "av", "transformers")}
    record |= {**facts, "costs": asdict(costs)}
    record |= {"software": {"python": platform.python_version(), **software}}
    if confusion is not None:
        name = f"{number:03d}_{record['dataset']}_confusion.png"
        record["confusion"] = name
        draw_confusion(confusion, folder / name)
    if classes:
        name = f"{number:03d}_{record['dataset']}_classes.csv"
        record["classes"] = name
        _write_classes(folder / name, classes)
    with open(results, "ab") as stream:
        stream.write(json_line(_without_nan(record)))
    table = folder / "table.md"
    header = "" if table.is_file() else table_head()
    with open(table, "a") as stream:
        stream.write(header + table_row(record) + "\n")
    weights = Path(config.model_weight).name
    with open(folder / f"report_attentive_probe_{weights}.txt", "a") as stream:
        stream.write(
            f"{printable(record['dataset'])} {record['last_epoch'][record['metric']]:.2f}\n"
        )
    return record


def _without_nan(value: object) -> object:
    """The same, with null for figures that could not be computed: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_classes(path: Path, classes: tuple[str, ...]) -> None:
    # A class folder's name may hold bytes that are no UTF-8: they are written as they are.
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        csv.writer(stream).writerows(enumerate(classes))


def _facts(config: ProbeConfig, num_clips: dict[str, int]) -> dict:
    is_benchmark = config.dataset.lower() in BENCHMARKS
    return {
        "dataset": config.dataset.lower() if is_benchmark else Path(config.dataset).resolve().name,
        "is_benchmark": is_benchmark,
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
    the last epoch; heads that went astray are out."""
    found = history.held[-1] if history.held else np.zeros(len(history.settings))
    settings = dict.fromkeys((s.lr, s.weight_decay) for s in history.settings)
    heads = {setting: heads_of(history, setting) for setting in settings}
    means = {setting: float(np.mean(found[own])) for setting, own in heads.items() if own}
    chosen = max(means, key=means.get)
    return chosen, round(means[chosen], 4) if history.held else None


def _figures(history, heads: list[int], place: int, metric: str) -> dict:
    values = history.main[place][heads]
    interval = seed_interval(values) if history.seeds_matter else None
    top5 = history.top5[place]
    figures = {
        metric: round(float(values.mean()), 4),
        "top5": None if top5 is None else round(float(top5[heads].mean()), 4),
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
