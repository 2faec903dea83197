"""A name that came with data is shown, never obeyed: one hostile name through every place that
shows names.
"""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from eval_encoder.lmm.scoring.scorers import Score, format_table
from eval_encoder.lmm.scoring.table import markdown
from eval_encoder.probe.compare import compare
from eval_encoder.probe.report import _probe
from model_factory.command_line.plain_text import (
    LINES,
    RUNNING,
    PlainFormatter,
    in_code,
    in_html,
    in_plot,
    printable,
    show,
)
from model_factory.export_folder import _table
from model_factory.files import write_json
from model_factory.llava.tower_card import tower_card
from training.log import setup_logging
from training.record.report import write_report

# clears the screen, forges a row and a heading, runs a script, turns the text around, breaks a
# formula of matplotlib and a span of code
HOSTILE = "a\x1b[2J|b\n# forged\n| x | <script>alert(1)</script> \u202e $\\frac$ ``c`` \udcff"
ACTS = ("\x1b", "\u202e", "\n# forged", "\n| x |", "\udcff")


def assert_shown(text: str, is_markdown: bool = True) -> None:
    """No part of HOSTILE acts in Markdown or a terminal, and the name is there."""
    outside_code = re.sub(r"(?<!\\)(`+)[^`].*?[^`]\1(?!`)", "", text)
    assert not is_markdown or "<script" not in outside_code
    assert not [part for part in ACTS if part in text], text
    assert "x1b" in text and "forged" in text
    text.encode()  # what a file of UTF-8 can hold


def cells(line: str) -> int:
    """Columns of a row of a Markdown table, by the bars that no backslash stands before."""
    return line.replace("\\|", "").count("|") - 1


def test_own_line_breaks_stay_where_they_are_asked_for():
    assert printable("a\n\tb\r\x1b", keep=LINES) == "a\n\\tb\\r\\x1b"
    assert printable("a\n\tb\u200c\u200d\u202e", keep=RUNNING) == "a\n\tb\u200c\u200d\\u202e"
    assert in_html("<\n\x1b", keep=RUNNING) == "&lt;\n\\x1b"


@pytest.mark.parametrize("text", ["plain", "`", "a ``b`` c", "```", "``` ends `", HOSTILE])
def test_code_of_markdown_is_closed_by_its_own_end_alone(text):
    code = in_code(text)
    fence = code[: len(code) - len(code.lstrip("`"))]
    inner = code.removeprefix(fence).removesuffix(fence)
    assert fence and fence not in inner and inner.strip() == printable(text).strip()


def test_a_line_of_the_log_is_shown_and_keeps_its_own_breaks(capsys):
    handler = setup_logging().handlers[0]
    record = logging.LogRecord(
        "univit", logging.WARNING, "", 0, "quarantined %s:\nsecond", (HOSTILE.split("\n")[0],), None
    )
    line = handler.format(record)
    assert "a\\x1b[2J|b:\nsecond" in line and "\x1b" not in line


def test_a_traceback_in_the_log_is_shown_too():
    try:
        raise ValueError("\x1b[2J")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), info)
    text = PlainFormatter("%(message)s").format(record)
    assert "\x1b" not in text and "\nValueError: \\x1b[2J" in text


def test_what_a_command_prints_is_shown(capsys):
    show(f"rejected {HOSTILE!s}".replace("\n", " "))
    show("\x1b[2J", error=True)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\\udcff" in out and err == "\\x1b[2J\n"


def test_the_report_of_a_run_shows_names(tmp_path):
    head = {"dataset": HOSTILE}
    write_json(tmp_path / "config.json", {"model": {"name": "m"}, "heads": [head]})
    argv = ["--list_datasets", HOSTILE]
    write_json(tmp_path / "run.json", {"argv": argv, "versions": {"torch": HOSTILE}})
    loss = f"loss/{HOSTILE}"
    lines = [json.dumps({"step": step, loss: 1.0}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    report = write_report(tmp_path).read_text()
    assert_shown(report)
    rows = [line for line in report.splitlines() if line.startswith("|")]
    assert {cells(row) for row in rows} == {2}
    assert (tmp_path / "report" / "loss.png").is_file()  # its legend holds the name


@pytest.mark.parametrize("text", [HOSTILE, "$", "$a_$b", "$$", "a$\\frac$"])
def test_texts_of_plots_are_no_formulas(tmp_path, text):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], label=in_plot(text))
    axes.legend()
    figure.savefig(tmp_path / "plot.png")


def record_of(name: str) -> dict:
    """A line of results.jsonl whose every name is `name`."""
    return {
        "encoder_sha256": "0",
        "config": {},
        "clips": {"train": 1, "val": 1},
        "dataset": name,
        "is_benchmark": False,
        "family": name,
        "view": "frame",
        "weight": name,
        "model": name,
        "num_frames": 8,
        "num_tokens": 8,
        "head": name,
        "metric": "top1",
        "last_epoch": {"top1": 50.0, "ci95_clips": 1.0, "seeds": [50.0]},
        "best_epoch": None,
        "unreadable": {"val": {}},
        "costs": {"tokens_per_clip": 8.0},
    }


def test_the_comparison_of_probes_shows_names(tmp_path):
    (tmp_path / "probe").mkdir()
    name = f"../{HOSTILE}"
    (tmp_path / "probe" / "results.jsonl").write_text(json.dumps(record_of(name)) + "\n")
    table = compare([tmp_path / "probe"], tmp_path / "out")
    text = table.read_text()
    assert_shown(text)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {cells(row) for row in rows} == {10}
    [plot] = (tmp_path / "out").glob("*.png")
    assert f"]({plot.name})" in text


def test_the_demos_report_shows_names(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(
        json.dumps(record_of("motion_shapes") | {"weight": HOSTILE.replace("/", "")}) + "\n"
    )
    text = _probe(path)
    assert_shown(text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({cells(row) for row in rows}) == 1


def test_model_cards_show_names():
    vision = CLIPVisionConfig(hidden_size=12, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(hidden_size=32))
    card = tower_card(config, side=32, source=Path("runs", HOSTILE), whole_processor=True)
    assert_shown(card)
    table = _table("fact", {"weights": HOSTILE})
    assert_shown(table)
    assert {cells(row) for row in table.splitlines()} == {2}


def test_tables_of_the_multimodal_probe_show_names():
    table = markdown([{"model": HOSTILE, "tokens": 4}])
    assert_shown(table)
    assert {cells(row) for row in table.splitlines()} == {2}
    figures = format_table(Score("seed", 1, {HOSTILE: 50.0}))
    assert_shown(figures, is_markdown=False)
    assert len(figures.splitlines()) == 2


def test_the_caption_of_a_cluster_holds_numbers_alone():
    from data_pipeline.clustering.browse import summarise

    labels = np.zeros((4, 1), np.int32)
    [summary] = summarise(labels, num_classes=1, truth=np.array([0, 0, 1, -1]))
    assert summary.caption("largest") == "largest: cluster 0, 4 samples, purity 67%"
