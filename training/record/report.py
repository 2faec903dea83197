"""report.md of a finished run, with its curves as images: OUTPUT/report/*.png.

Reads what every run leaves: run.json, metrics.jsonl (every step), speed.jsonl (every log line). A
run of several rounds gets one section per round. Cost: a second.
"""

import math
import statistics
from collections import Counter
from pathlib import Path

from model_factory.command_line.plain_text import in_code, in_markdown, in_plot

from ..run_folder import read_run_file
from .files import METRICS_NAME, SPEED_NAME, read_line

REPORT_NAME = "report.md"
# figures of speed.jsonl: key -> name in the table
SPEED_FIGURES = {
    "samples_per_s": "samples per second",
    "tokens_per_s": "tokens per second",
    "model_flops_per_s": "model FLOPs per second",
    "mfu": "MFU",
    "data_wait": "share of time waiting for data",
    "memory_gb": "memory of rank 0, GB",
}


def write_report(output: Path) -> Path:
    """Write report.md and its images; returns its path."""
    # by number, since by name round_10 would come before round_2
    folders = output.glob("round_*")
    rounds = sorted(folders, key=lambda path: int(path.name.split("_")[1]))
    sections = [f"# Run in {in_markdown(output.name)}", _facts(output)]
    sections += [_training(folder, output) for folder in rounds or [output]]
    path = output / REPORT_NAME
    text = "\n\n".join(section for section in sections if section)
    path.write_text(f"{text}\n")
    return path


def _facts(output: Path) -> str:
    config = read_run_file(output / "config.json")
    run = read_run_file(output / "run.json")
    model = config.get("model", {})
    lines = [f"- encoder: {in_markdown(model.get('name'))}"]
    for head in config.get("heads", []):
        lines.append(f"- data set: {in_markdown(head['dataset'])}")
    arguments = " ".join(run.get("argv", []))
    lines.append(f"- arguments: {in_code(arguments)}")
    lines.append(f"- git revision: {in_markdown(run.get('git_revision'))}")
    world_size = run.get("world_size")
    lines.append(f"- ranks: {world_size}, starts: {run.get('starts')}")
    for name, version in run.get("versions", {}).items():
        lines.append(f"- {name}: {in_markdown(version)}")
    return "\n".join(lines)


def _training(folder: Path, output: Path) -> str:
    """Section of one round, or of the whole run, with its images drawn."""
    records, damage = _lines(folder / METRICS_NAME)
    speeds, damage_of_speeds = _lines(folder / SPEED_NAME)
    if not records:
        return "\n".join(damage + damage_of_speeds)
    # a name that few lines have comes from a damaged line, and is no curve
    counted = Counter(name for record in records for name in record if name.startswith("loss/"))
    half = len(records) / 2
    losses = sorted(name for name, count in counted.items() if count > half)
    title = "Training" if folder == output else folder.name
    lines = [f"## {title}", "", *damage, *damage_of_speeds]
    lines += _table(records, speeds=speeds, losses=losses)

    images = output / "report"
    images.mkdir(exist_ok=True)
    prefix = "" if folder == output else f"{folder.name}_"
    drawn = {
        "loss": (records, {name: name for name in losses}),
        "throughput": (speeds, {"tokens_per_s": SPEED_FIGURES["tokens_per_s"]}),
        "data_wait": (speeds, {"data_wait": SPEED_FIGURES["data_wait"]}),
    }
    for name, (source, labels) in drawn.items():
        if source:
            _draw(
                images / f"{prefix}{name}.png",
                steps=[record["step"] for record in source],
                curves={label: _curve(source, key) for key, label in labels.items()},
                title=name.replace("_", " "),
            )
            lines += ["", f"![{name}](report/{prefix}{name}.png)"]
    return "\n".join(lines)


def _table(records: list[dict], speeds: list[dict], losses: list[str]) -> list[str]:
    steps = records[-1]["step"]
    rows = ["| figure | value |", "| --- | ---: |", f"| steps | {steps} |"]
    tenth = max(1, len(records) // 10)
    for name in losses:
        first = statistics.fmean(_values(records[:tenth], name))
        last = statistics.fmean(_values(records[-tenth:], name))
        label = f"{in_markdown(name)}, first and last tenth"
        rows.append(f"| {label} | {first:.4f}, {last:.4f} |")
    if not speeds:
        return rows
    for name, text in SPEED_FIGURES.items():
        values = _values(speeds, name)
        # a median: the first lines hold compiling and fresh memory
        median = f"{statistics.median(values):.4g}" if values else "not known"
        rows.append(f"| {text}, median | {median} |")
    last_speed = speeds[-1]
    counts = f"{last_speed.get('bad_samples')}, {last_speed.get('skipped_steps')}"
    rows.append(f"| bad samples, skipped steps | {counts} |")
    return rows


def _values(records: list[dict], name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def _curve(records: list[dict], name: str) -> list[float]:
    """Values of every record, NaN where it has none: a gap of the curve."""
    values = [record.get(name) for record in records]
    return [math.nan if value is None else value for value in values]


def _draw(path: Path, steps: list[int], curves: dict[str, list[float]], title: str) -> None:
    """One plot, without a display and without the state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)  # registers itself as the figure's canvas
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(steps, values, linewidth=1, label=in_plot(name))
    axes.set(xlabel="step", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def _lines(path: Path) -> tuple[list[dict], list[str]]:
    """(readable lines, a note on the others as lines of the report)."""
    if not path.is_file():
        return [], []
    lines = path.read_bytes().splitlines(keepends=True)
    readable = []
    for line in lines:
        record = read_line(line)
        if record is not None and all(_is_number(value) for value in record.values()):
            readable.append(record)
    damaged = len(lines) - len(readable)
    if not damaged:
        return readable, []
    note = f"{path.name}: {damaged} of {len(lines)} lines are damaged, left out."
    return readable, [note, ""]


def _is_number(value: object) -> bool:
    return value is None or type(value) in (int, float)
