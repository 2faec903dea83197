"""What a probe leaves behind: one record of everything it did and found.

results.jsonl       the record: one line per probe, fields in docs/evaluation.md
table.md            one row per probe
NAME_confusion.png  shares of predicted classes
NAME_predictions.csv    clip, class, and what each seed of the chosen setting predicted
NAME_classes.csv    lines of `number,class`, where classes have names
report_attentive_probe_<weights>.txt    the public one-line report
"""

import csv
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from model_factory.command_line.plain_text import printable
from model_factory.files import json_line

from ..intervals import seed_half_width
from ..tables import table_head, table_row
from .benchmarks import BENCHMARKS, LabelledList
from .compare import COLUMNS, cells_of, draw_confusion
from .config import ProbeConfig
from .metrics import Evaluation
from .trainer import EpochFigures, History

DIGITS = 4  # of figures in percent: one of a million clips would still be seen


@dataclass(frozen=True)
class Costs:
    """What one probe cost.

    wall_s, encoder_s   seconds in all, and inside of the encoder on rank 0
    tokens_per_clip     of all crops of a clip together, mean over the clips
    encoder_passes      looks that rank 0 encoded
    """

    wall_s: float
    encoder_s: float
    tokens_per_clip: float
    encoder_passes: int
    world_size: int
    device: str


def summarise(config: ProbeConfig, history: History, num_clips: dict[str, int]) -> dict:
    """The record of a bank of heads: figures of the setting that the held-out part of train chose,
    mean over its seeds. See docs/evaluation.md for every field."""
    assert history.last is not None  # the trainer evaluates its last epoch
    last_epoch = history.epochs[-1]
    held_out = last_epoch.held
    setting = _chosen_setting(history, held_out)
    heads = _heads_of(history, setting)
    metric = history.last.metric
    # The best epoch, too, is chosen on held-out clips: the validation list chooses nothing.
    held_figures = [epoch.held for epoch in history.epochs if epoch.held is not None]
    held_means = [np.mean(figures[heads]) for figures in held_figures]
    best_epoch = None
    # an epoch without held-out figures might have been the best
    if len(held_means) == len(history.epochs):
        best = history.epochs[int(np.argmax(held_means))]
        best_epoch = _figures(history, heads, epoch=best)
    return _facts(config, num_clips) | {
        "metric": metric,
        "chosen": {
            "lr": setting[0],
            "weight_decay": setting[1],
            "held_out": None if held_out is None else _rounded(np.mean(held_out[heads])),
        },
        "last_epoch": _figures(history, heads, epoch=last_epoch),
        "best_epoch": best_epoch,
        "best_epoch_on_validation": _best_on_validation(history),
        "per_class": history.last.per_class(heads),
        "grid": [
            asdict(tried)
            | {
                metric: _rounded(last_epoch.main[head]),
                "held_out": None if held_out is None else _rounded(held_out[head]),
                # the field keeps the name that records on disk have
                "astray": head in history.diverged,
            }
            for head, tried in enumerate(history.settings)
        ],
    }


def chosen_heads(history: History, record: dict) -> Evaluation:
    """Results at the last epoch of the setting that `summarise` chose, a head for each seed."""
    assert history.last is not None
    chosen = record["chosen"]
    heads = _heads_of(history, setting=(chosen["lr"], chosen["weight_decay"]))
    return history.last.of_heads(heads)


def summarise_neighbours(
    config: ProbeConfig,
    k: int,
    held_out: Evaluation | None,
    evaluation: Evaluation,
    num_clips: dict[str, int],
) -> dict:
    """The record of nearest neighbours."""
    top5 = evaluation.top5()
    return _facts(config, num_clips) | {
        "metric": evaluation.metric,
        "chosen": {
            "k": k,
            "held_out": None if held_out is None else _rounded(held_out.main()[0]),
        },
        "last_epoch": {
            evaluation.metric: _rounded(evaluation.main()[0]),
            "top5": None if top5 is None else _rounded(top5[0]),
            "ci95_clips": _rounded(evaluation.clip_interval([0])),
        },
        "best_epoch": None,
        "per_class": evaluation.per_class([0]),
    }


def write_results(
    config: ProbeConfig,
    record: dict,
    evaluation: Evaluation,
    clips: LabelledList,
    costs: Costs,
    facts: Mapping[str, object],
) -> dict:
    """Append to the files of the report folder; returns the whole record.

    evaluation: of the validation `clips`, a head for each seed of the setting that is reported.
    facts: further entries, among them `unreadable` {split: {name: reason}}.
    """
    folder = config.report_dir
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    number = len(results.read_text().splitlines()) if results.is_file() else 0
    software = {name: version(name) for name in ("torch", "av", "transformers")}
    record |= {
        **facts,
        "costs": asdict(costs),
        "software": {"python": platform.python_version(), **software},
    }

    # Files of several probes lie in one folder: the line of the record tells them apart.
    prefix = f"{number:03d}_{record['dataset']}"
    confusion = evaluation.confusion(list(range(len(evaluation.predicted))))
    if confusion is not None:
        record["confusion"] = f"{prefix}_confusion.png"
        draw_confusion(confusion, folder / record["confusion"])
        record["predictions"] = f"{prefix}_predictions.csv"
        _write_rows(folder / record["predictions"], _predictions(evaluation, clips))
    if clips.classes:
        record["classes"] = f"{prefix}_classes.csv"
        _write_rows(folder / record["classes"], enumerate(clips.classes))

    with open(results, "ab") as stream:
        line = {key: _without_nan(value) for key, value in record.items()}
        stream.write(json_line(line))
    table = folder / "table.md"
    head = "" if table.is_file() else table_head(COLUMNS)
    with open(table, "a") as stream:
        stream.write(head + table_row(cells_of(record)))
    weights = Path(config.model_weight).name
    with open(folder / f"report_attentive_probe_{weights}.txt", "a") as stream:
        figure = record["last_epoch"][record["metric"]]
        dataset = printable(record["dataset"])
        stream.write(f"{dataset} {figure:.2f}\n")
    return record


def _predictions(evaluation: Evaluation, clips: LabelledList) -> Iterator[list]:
    """Rows of the evaluated clips: name, class, the class that each head predicted."""
    seeds = range(1, len(evaluation.predicted) + 1)
    yield ["clip", "class", *(f"predicted_{seed}" for seed in seeds)]
    for index in np.flatnonzero(evaluation.evaluated):
        predicted = evaluation.predicted[:, index].tolist()
        yield [clips.names[index], int(evaluation.labels[index]), *predicted]


def _write_rows(path: Path, rows: Iterable[Iterable]) -> None:
    # A clip's or class folder's name may hold bytes that are no UTF-8: they are written as they are
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        csv.writer(stream).writerows(rows)


def _without_nan(value: object) -> object:
    """The same, with null for figures that could not be computed: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _facts(config: ProbeConfig, num_clips: dict[str, int]) -> dict:
    """Entries of any record: what was probed, of which clips, under which configuration."""
    # A folder of one's own is known by its last part, as a benchmark is by its name.
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
        # through JSON, which turns paths into texts and tuples into lists, as a reader finds them
        "config": json.loads(json.dumps(asdict(config), default=str)),
    }


def _chosen_setting(history: History, held_out: np.ndarray | None) -> tuple[float, float]:
    """(lr, weight decay) of the largest mean over the seeds on the held-out clips at the last
    epoch, or the first setting without held-out clips. Diverged heads do not count."""
    means = {}
    for head in history.settings:
        setting = (head.lr, head.weight_decay)
        heads = _heads_of(history, setting)
        if heads:
            means[setting] = 0.0
            if held_out is not None:
                means[setting] = float(np.mean(held_out[heads]))
    # of equal means the first setting, as `max` and dictionaries keep the order of the flags
    return max(means, key=means.__getitem__)


def _heads_of(history: History, setting: tuple[float, float]) -> list[int]:
    """Indices of the heads of a setting (lr, weight decay) that did not diverge."""
    return [
        index
        for index, head in enumerate(history.settings)
        if (head.lr, head.weight_decay) == setting and index not in history.diverged
    ]


def _figures(history: History, heads: list[int], epoch: EpochFigures) -> dict:
    """Figures of some heads at an evaluated epoch: means over their seeds."""
    assert history.last is not None
    values = epoch.main[heads]
    half_width = seed_half_width(values) if history.seeds_matter else None
    figures = {
        history.last.metric: _rounded(values.mean()),
        "top5": None if epoch.top5 is None else _rounded(epoch.top5[heads].mean()),
        "epoch": epoch.epoch,
        "seeds": [_rounded(value) for value in values],
        "ci95_seeds": None if half_width is None else _rounded(half_width),
    }
    if epoch is history.epochs[-1]:  # results clip by clip are stored for the last epoch alone
        figures["ci95_clips"] = _rounded(history.last.clip_interval(heads))
    return figures


def _best_on_validation(history: History) -> dict:
    """The largest figure of any head at any epoch, as published protocols report it. It is chosen
    on the validation list, so it flatters; it is there to compare with published figures."""
    assert history.last is not None
    values = np.array([epoch.main for epoch in history.epochs])
    values[:, sorted(history.diverged)] = -np.inf
    index, head = np.unravel_index(np.argmax(values), values.shape)
    return {
        history.last.metric: _rounded(values[index, head]),
        "epoch": history.epochs[index].epoch,
        "lr": history.settings[head].lr,
    }


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)
