"""Tables, plots and verdicts of the cells that are there.

Accuracies are means over training seeds; intervals hold 95 % of bootstrap samples, which draw the
training seeds and the validation clips anew. Two inputs are compared seed by seed and clip by clip.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.evidence_plan import BUDGETS, GROUPS, HYPOTHESES, NEGLIGIBLE, Group, Hypothesis
from eval_encoder.intervals import bootstrap_bounds
from eval_encoder.tables import markdown_table
from model_factory.files import parse_json_line, read_json

RESAMPLINGS = 2000
REFERENCE = "codec"


class Results:
    """Shares of right heads, float [seeds, clips], of each (set, input, budget)."""

    def __init__(self, output: Path):
        found = defaultdict(dict)
        self.costs: dict[tuple, dict] = {}
        self._listings: dict[str, str] = {}
        for path in sorted((output / "cells").glob("*.json")):
            facts = read_json(path, {"cell": dict, "clips_sha256": str, "hits": str})
            cell = facts["cell"]
            key = (cell["dataset"], cell["input"], cell["budget"])
            heads = facts["recipe"]["probe_seeds"]
            hits = np.array([int(digit) for digit in facts["hits"]])
            found[key][cell["seed"]] = hits / heads
            self.costs[key] = {"tokens": facts["tokens"], "gflops": facts["gflops"]}
            listing = self._listings.setdefault(cell["dataset"], facts["clips_sha256"])
            if listing != facts["clips_sha256"]:
                raise ValueError(f"{path} evaluated other clips than the cells before it")
        self._by_seed = found
        self._facts = {name: _facts(output, name) for name in self._listings}

    def keys(self) -> list[tuple[str, str, int]]:
        """(set, input, budget) of which there is a cell."""
        return list(self._by_seed)

    def seeds(self, key: tuple[str, str, int]) -> set[int]:
        """Seeds of which there is a cell."""
        return set(self._by_seed.get(key, {}))

    def shares(self, key: tuple[str, str, int], seeds: set[int], group: Group) -> np.ndarray:
        """Shares of right heads [seeds, clips] on the clips of a group."""
        stacked = np.stack([self._by_seed[key][seed] for seed in sorted(seeds)])
        facts = self._facts[key[0]]
        if not facts:  # a set without events has no groups
            return stacked
        held = [group.holds(row) for row in facts]
        return stacked[:, held]


def _facts(output: Path, dataset: str) -> list[dict]:
    """Lines of events.jsonl of the validation clips, in the order of their list; none for a set
    without events."""
    path = output / "sets" / dataset / "events.jsonl"
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    rows = [parse_json_line(line, name=f"{path} line {i}") for i, line in enumerate(lines, 1)]
    return [row for row in rows if row["file"].startswith("clips/val_")]


def mean_with_bounds(shares: np.ndarray, purpose: str) -> tuple[float, float, float]:
    """(mean, lower, upper) in percent of shares [seeds, clips], or of their differences."""
    num_seeds, num_clips = shares.shape

    def resampled(draw: np.random.Generator) -> Mapping[str, float]:
        seeds = draw.integers(0, num_seeds, num_seeds)
        clips = draw.integers(0, num_clips, num_clips)
        return {"mean": 100 * float(shares[seeds][:, clips].mean())}

    bounds = bootstrap_bounds(resampled, purpose=purpose, resamplings=RESAMPLINGS)
    return 100 * float(shares.mean()), *bounds["mean"]


def difference(
    results: Results, dataset: str, rival: str, budget: int, group: Group
) -> tuple[float, float, float, int] | None:
    """(mean, lower, upper, seeds) of codec - rival in points; None where a cell is missing."""
    ours = (dataset, REFERENCE, budget)
    theirs = (dataset, rival, budget)
    seeds = results.seeds(ours) & results.seeds(theirs)
    if not seeds:
        return None
    differences = results.shares(ours, seeds, group) - results.shares(theirs, seeds, group)
    purpose = f"{dataset} {rival} {budget} {group.name}"
    return *mean_with_bounds(differences, purpose), len(seeds)


def verdict(results: Results, hypothesis: Hypothesis) -> tuple[str, str]:
    """(difference as text, holds / does not hold / undecided / not run)."""
    found = difference(
        results,
        dataset=hypothesis.dataset,
        rival=hypothesis.rival,
        budget=hypothesis.budget,
        group=hypothesis.group,
    )
    if found is None:
        return "-", "not run"
    mean, lower, upper, seeds = found
    text = f"{mean:+.1f} ({lower:+.1f} to {upper:+.1f}), {seeds} seeds"
    if hypothesis.expected == "more":
        outcome = "holds" if lower > 0 else "does not hold" if upper <= 0 else "undecided"
    else:
        outcome = "does not hold" if lower > 0 else "holds" if upper < NEGLIGIBLE else "undecided"
    return text, outcome if seeds > 1 else f"{outcome} on one seed"


def report(output: Path) -> str:
    """The report as Markdown; plots are written beside it."""
    results = Results(output)
    parts = ["# Evidence\n", "## Hypotheses\n", _hypotheses(results)]
    for dataset in sorted({key[0] for key in results.keys()}):
        parts.append(f"## {dataset}\n")
        for group in GROUPS[dataset]:
            parts += [f"### {group.name}\n", _accuracies(results, dataset, group)]
            parts.append(_differences(results, dataset, group))
            _plot(results, dataset, group, output / _plot_name(dataset, group))
    return "\n".join(parts)


def _hypotheses(results: Results) -> str:
    rows = []
    for item in HYPOTHESES:
        text, outcome = verdict(results, item)
        where = f"{item.dataset}, {item.group.name}, {item.budget} tokens, against {item.rival}"
        rows.append([item.text, where, text, outcome])
    return markdown_table(("hypothesis", "where", "codec - rival, points", "verdict"), rows)


def _accuracies(results: Results, dataset: str, group: Group) -> str:
    """Top-1 of every input at every budget."""
    inputs = sorted({key[1] for key in results.keys() if key[0] == dataset})
    rows = []
    for name in inputs:
        row = [name]
        for budget in BUDGETS:
            key = (dataset, name, budget)
            seeds = results.seeds(key)
            row.append("-" if not seeds else _cell(results, key, seeds, group))
        rows.append(row)
    columns = ("input", *(f"{budget} tokens" for budget in BUDGETS))
    return markdown_table(columns, rows, right_aligned=columns[1:])


def _cell(results: Results, key: tuple[str, str, int], seeds: set[int], group: Group) -> str:
    shares = results.shares(key, seeds, group)
    mean, lower, upper = mean_with_bounds(shares, f"{key} {group.name}")
    cost = results.costs[key]
    exact = "" if cost["tokens"] == key[2] else f", {cost['tokens']} tokens"
    return f"{mean:.1f} ({lower:.1f}-{upper:.1f}; {len(seeds)} seeds, {cost['gflops']} GF{exact})"


def _differences(results: Results, dataset: str, group: Group) -> str:
    """codec - rival at every budget."""
    rivals = sorted({key[1] for key in results.keys() if key[0] == dataset} - {REFERENCE})
    rows = []
    for rival in rivals:
        row = [f"codec - {rival}"]
        for budget in BUDGETS:
            found = difference(results, dataset, rival, budget, group)
            row.append(
                "-" if found is None else f"{found[0]:+.1f} ({found[1]:+.1f} to {found[2]:+.1f})"
            )
        rows.append(row)
    columns = ("difference, points", *(f"{budget} tokens" for budget in BUDGETS))
    return markdown_table(columns, rows, right_aligned=columns[1:])


def _plot_name(dataset: str, group: Group) -> str:
    return f"{dataset}-{group.name.replace(' ', '_')}.png"


def _plot(results: Results, dataset: str, group: Group, path: Path) -> None:
    """Accuracy against tokens, a line per input."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name in sorted({key[1] for key in results.keys() if key[0] == dataset}):
        points = []
        for budget in BUDGETS:
            key = (dataset, name, budget)
            if results.seeds(key):
                shares = results.shares(key, results.seeds(key), group)
                mean, lower, upper = mean_with_bounds(shares, f"{key} {group.name}")
                points.append((results.costs[key]["tokens"], mean, mean - lower, upper - mean))
        tokens, means, below, above = zip(*points, strict=True)
        axes.errorbar(tokens, means, yerr=(below, above), label=name, marker="o", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.set_xlabel("tokens of a clip")
    axes.set_ylabel("top-1, %")
    axes.set_title(f"{dataset}, {group.name}")
    axes.legend()
    figure.savefig(path)
