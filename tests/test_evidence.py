"""The experiment on evidence: its cells are fair, and its verdicts follow from the cells."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import PATIENCE_S, ROOT

from benchmarks.evidence_plan import (
    BUDGETS,
    FRAME_TOKENS,
    HYPOTHESES,
    INPUTS,
    SMALL,
    Cell,
    cells,
)
from benchmarks.evidence_report import Results, difference, mean_with_bounds, report, verdict
from data_pipeline.__main__ import build_parser
from model_factory.files import write_json

CLIPS = 40


def write_cell(output, cell: Cell, hits: list[int]) -> None:
    (output / "cells").mkdir(parents=True, exist_ok=True)
    parts = {"dataset": cell.dataset, "input": cell.input, "budget": cell.budget, "seed": cell.seed}
    facts = {
        "cell": parts,
        "recipe": {"probe_seeds": 1},
        "tokens": cell.tokens,
        "gflops": 1.0,
        "clips_sha256": "0",
        "hits": "".join(map(str, hits)),
    }
    write_json(output / "cells" / f"{cell.name}.json", facts)


def write_events(output) -> None:
    """Validation clips of alternating radius and duration, behind one of training."""
    folder = output / "sets" / "brief_events"
    folder.mkdir(parents=True)
    rows = [{"file": "clips/train_00000.mp4", "label": 0, "duration": 4, "radius": 3.0}]
    for index in range(CLIPS):
        small, short = index % 2 == 0, index % 4 < 2
        facts = {"duration": 4 if short else 32, "radius": 3.0 if small else 6.0}
        rows.append({"file": f"clips/val_{index:05d}.mp4", "label": 0, **facts})
    lines = [json.dumps(row) for row in rows]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_input_has_at_most_its_tokens_and_hardly_fewer(budget):
    for name in INPUTS:
        cell = Cell("brief_events", name, budget=budget, seed=1)
        assert 0.97 * budget <= cell.tokens <= budget, name
        if cell.frames is not None:
            assert cell.frames.count <= 64


def test_tubes_show_twice_as_many_frames_as_frames_do():
    for budget in BUDGETS:
        tubes = Cell("brief_events", "tubes", budget=budget, seed=1)
        whole = Cell("brief_events", "frames", budget=budget, seed=1)
        assert tubes.frames.count == 2 * whole.frames.count and tubes.tokens == whole.tokens
        assert tubes.packing == whole.packing


def test_every_packing_is_a_command_that_holds_the_budgets_of_its_cells():
    for cell in cells(("brief_events",), INPUTS, BUDGETS, (1,)):
        words = ["pack", "in", "--output", "out", *cell.packing.flags]
        args = build_parser().parse_args(words)
        assert args.budget >= cell.budget or cell.frames is not None
        # what is whole before all others leaves room for others
        whole = FRAME_TOKENS * args.i_frame_share
        assert whole <= args.budget * 0.6
        assert args.num_full_frames == 64 or cell.frames is None


def test_names_of_cells_and_packings_tell_them_apart():
    planned = list(cells(("brief_events", "tempo"), INPUTS, BUDGETS, (1, 2)))
    assert len({cell.name for cell in planned}) == len(planned)
    packings = {cell.packing for cell in planned}
    assert len({packing.name for packing in packings}) == len(packings)


def test_a_difference_is_paired_and_its_interval_holds_seeds_and_clips(tmp_path):
    """Clips that both inputs miss or hit widen an accuracy's interval, and not a difference's."""
    write_events(tmp_path)
    for seed in (1, 2, 3):
        hard = [int(index >= 20) for index in range(CLIPS)]
        write_cell(tmp_path, Cell("brief_events", "frames", 98, seed), hard)
        ours = [1 if index < 4 else right for index, right in enumerate(hard)]
        write_cell(tmp_path, Cell("brief_events", "codec", 98, seed), ours)
    results = Results(tmp_path)
    mean, lower, upper, seeds = difference(
        results, "brief_events", "frames", budget=98, group=HYPOTHESES[0].group
    )
    assert seeds == 3 and mean == pytest.approx(100 * 2 / 20) and 0 <= lower < mean < upper
    alone = mean_with_bounds(
        results.shares(("brief_events", "frames", 98), {1, 2, 3}, HYPOTHESES[0].group), "alone"
    )
    assert alone[2] - alone[1] > upper - lower
    # seeds that differ widen it
    spread = np.repeat([[0.0], [0.5], [1.0]], CLIPS, axis=1)
    mean, lower, upper = mean_with_bounds(spread, "seeds")
    assert mean == 50 and lower < 20 and upper > 80


def test_groups_are_those_of_the_clips_factors(tmp_path):
    write_events(tmp_path)
    small = [int(index % 2 == 0) for index in range(CLIPS)]
    write_cell(tmp_path, Cell("brief_events", "codec", 98, 1), small)
    shares = Results(tmp_path).shares(("brief_events", "codec", 98), {1}, SMALL)
    assert shares.shape == (1, CLIPS // 2) and shares.all()


def test_verdicts_follow_from_the_interval_of_the_difference(tmp_path):
    write_events(tmp_path)
    more, *_ = HYPOTHESES
    assert verdict(Results(tmp_path), more) == ("-", "not run")
    for seed in (1, 2):
        write_cell(tmp_path, Cell("brief_events", "frames", 98, seed), [0] * CLIPS)
        write_cell(tmp_path, Cell("brief_events", "codec", 98, seed), [1] * CLIPS)
        write_cell(tmp_path, Cell("brief_events", "frames", 392, seed), [1] * CLIPS)
        write_cell(tmp_path, Cell("brief_events", "codec", 392, seed), [1] * CLIPS)
    outcomes = {item.text: verdict(Results(tmp_path), item)[1] for item in HYPOTHESES}
    assert outcomes[more.text] == "holds"
    assert outcomes["the gain vanishes as tokens grow"] == "holds"
    assert outcomes["no gain where motion fills the whole clip"] == "not run"
    text = report(tmp_path)
    assert "+100.0 (+100.0 to +100.0), 2 seeds" in text
    assert (tmp_path / "brief_events-all.png").is_file()


def test_a_gain_that_is_only_unseen_is_undecided(tmp_path):
    """Few clips, right by turns: the interval of the difference holds 0 and gains worth having."""
    vanishes = HYPOTHESES[2]
    write_events(tmp_path)
    for seed in (1, 2):
        evens = [int(index % 2 == 0) for index in range(CLIPS)]
        write_cell(tmp_path, Cell("brief_events", "codec", 392, seed), evens)
        write_cell(tmp_path, Cell("brief_events", "frames", 392, seed), [1 - x for x in evens])
    assert verdict(Results(tmp_path), vanishes)[1] == "undecided"


def test_cells_of_other_clips_do_not_mix(tmp_path):
    write_cell(tmp_path, Cell("motion_shapes", "codec", 98, 1), [1] * CLIPS)
    path = tmp_path / "cells" / "motion_shapes-codec-98-1.json"
    facts = json.loads(path.read_text()) | {"clips_sha256": "1"}
    facts.pop("digest", None)
    write_json(tmp_path / "cells" / "motion_shapes-codec-98-2.json", facts)
    with pytest.raises(ValueError, match="evaluated other clips"):
        Results(tmp_path)


@pytest.mark.soak
@pytest.mark.e2e
@pytest.mark.dali
def test_one_cell_from_clips_to_verdict_and_no_cell_runs_twice(tmp_path):
    recipe = "--num-train 32 --num-val 16 --steps 2 --batch 8 --probe-epochs 1 --probe-seeds 2"
    command = [sys.executable, "benchmarks/evidence.py", "--output", str(tmp_path)]
    command += ["--only", "brief_events", "--inputs", "low resolution", "codec"]
    command += ["--budgets", "49", "--seeds", "1", *recipe.split()]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count(" of 2: ") == 2 and "| codec - low resolution |" in first.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 0 and " of " not in again.stdout.split("# Evidence")[0]
    other = subprocess.run(
        [*command, "--lr", "0.1"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert other.returncode != 0 and "other settings" in other.stderr
