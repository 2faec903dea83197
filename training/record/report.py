"""report.md of a finished run, with its curves as pictures: OUTPUT/report/*.png.

Reads what every run leaves: run.json, metrics.jsonl (every step), speed.jsonl (every log line). A
run of several rounds gets one report per round and a page that names them. Cost: a second.
"""

import statistics
from collections import Counter
from pathlib import Path

from model_factory.command_line.plain_text import in_code, in_markdown, in_plot

from ..run_folder import read_run_file
from .files import METRICS_NAME, SPEED_NAME, read_line

REPORT_NAME = "report.md"
CURVES = {"tokens_per_s": "tokens per second", "data_wait": "share of time waiting for data"}


def write_report(output: Path) -> Path:
    """Write report.md and its pictures; returns its path."""
    rounds = sorted(output.glob("round_*"), key=lambda path: int(path.name.split("_")[1]))
    sections = [f"# Run in {in_markdown(output.name)}", _facts(output)]
    sections += [_training(folder, output) for folder in rounds or [output]]
    path = output / REPORT_NAME
    path.write_text("\n\n".join(section for section in sections if section) + "\n")
    return path


def _facts(output: Path) -> str:
    config = read_run_file(output / "config.json")
    run = read_run_file(output / "run.json")
    lines = [
        f"- encoder: {in_markdown(config.get('model', {}).get('name'))}",
        *(f"- data set: {in_markdown(head['dataset'])}" for head in config.get("heads", [])),
        f"- arguments: {in_code(' '.join(run.get('argv', [])))}",
        f"- git revision: {in_markdown(run.get('git_revision'))}",
        f"- ranks: {run.get('world_size')}, starts: {run.get('starts')}",
        *(f"- {name}: {in_markdown(version)}" for name, version in run.get("versions", {}).items()),
    ]
    return "\n".join(lines)


def _training(folder: Path, output: Path) -> str:
    records, damage = _lines(folder / METRICS_NAME)
    speeds, damage_of_speeds = _lines(folder / SPEED_NAME)
    if not records:
        return "\n".join(damage + damage_of_speeds)
    pictures = output / "report"
    pictures.mkdir(exist_ok=True)
    prefix = "" if folder == output else f"{folder.name}_"
    # a name that a damaged line alone has is no curve
    counted = Counter(name for record in records for name in record if name.startswith("loss/"))
    losses = sorted(name for name, count in counted.items() if 2 * count > len(records))
    curves = {name: [record.get(name) for record in records] for name in losses}
    drawn = {
        "loss": ([record["step"] for record in records], curves),
        "throughput": _curve(speeds, "tokens_per_s"),
        "data_wait": _curve(speeds, "data_wait"),
    }
    lines = [f"## {folder.name if prefix else 'Training'}", "", *damage, *damage_of_speeds]
    lines += _numbers(records, speeds, losses)
    for name, (steps, curves) in drawn.items():
        if steps:
            _draw(pictures / f"{prefix}{name}.png", steps, curves, name.replace("_", " "))
            lines += ["", f"![{name}](report/{prefix}{name}.png)"]
    return "\n".join(lines)


def _curve(speeds: list[dict], name: str) -> tuple[list[int], dict[str, list[float]]]:
    return [s["step"] for s in speeds], {CURVES[name]: [s.get(name) for s in speeds]}


def _numbers(records: list[dict], speeds: list[dict], losses: list[str]) -> list[str]:
    tenth = max(1, len(records) // 10)
    rows = ["| figure | value |", "| --- | ---: |", f"| steps | {records[-1]['step']} |"]
    for name in losses:
        first, last = (
            statistics.fmean(r[name] for r in part if r.get(name) is not None)
            for part in (records[:tenth], records[-tenth:])
        )
        rows.append(f"| {in_markdown(name)}, first and last tenth | {first:.4f}, {last:.4f} |")
    for name, text in {
        "samples_per_s": "samples per second",
        "tokens_per_s": "tokens per second",
        "model_flops_per_s": "model FLOPs per second",
        "mfu": "MFU",
        "data_wait": "share of time waiting for data",
        "memory_gb": "memory of rank 0, GB",
    }.items():
        known = [s[name] for s in speeds if s.get(name) is not None]
        if known:
            rows.append(f"| {text}, median | {statistics.median(known):.4g} |")
        elif speeds:
            rows.append(f"| {text}, median | not known |")
    if speeds:
        rows.append(f"| bad samples, skipped steps | {_last(speeds)} |")
    return rows


def _last(speeds: list[dict]) -> str:
    return f"{speeds[-1].get('bad_samples')}, {speeds[-1].get('skipped_steps')}"


def _draw(path: Path, steps: list[int], curves: dict[str, list[float]], title: str) -> None:
    """One picture, without a display and without the state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(steps, values, linewidth=1, label=in_plot(name))
    axes.set(xlabel="step", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def _lines(path: Path) -> tuple[list[dict], list[str]]:
    """(readable lines, what there is to say of the others, as lines of the report)."""
    if not path.is_file():
        return [], []
    found = [read_line(line) for line in path.read_bytes().splitlines(keepends=True)]
    readable = [record for record in found if record is not None and _is_numbers(record)]
    left_out = len(found) - len(readable)
    if not left_out:
        return readable, []
    return readable, [f"{path.name}: {left_out} of {len(found)} lines are damaged, left out.", ""]


def _is_numbers(record: dict) -> bool:
    return all(value is None or type(value) in (int, float) for value in record.values())
