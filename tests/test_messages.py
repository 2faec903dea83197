"""What a user reads: one line with the remedy for what is missing, and no line that is not ours."""

import re
from pathlib import Path

import pytest
import torch
from conftest import run
from forked import forked

from eval_encoder.probe.config import REPORT_DIR, build_config, build_parser

OURS = re.compile(r"^(\d\d:\d\d:\d\d \[rank 0\] |verified: |written: |before saving: |after )")
DEBUG = ("-m", "training.train_univit", "--preset", "debug", "--num_sampled_data", 80)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(output of the debug preset, what it printed)."""
    output = tmp_path_factory.mktemp("messages") / "run"
    return output, run(*DEBUG, "--output", output)


def strange_lines(done) -> list[str]:
    lines = re.split(r"[\n\r]", done.stdout + done.stderr)
    return [line for line in lines if line and not OURS.match(line)]


@pytest.mark.e2e
def test_a_training_prints_no_line_of_a_library(trained):
    assert strange_lines(trained[1]) == []


@pytest.mark.e2e
def test_exports_and_conversions_print_no_line_of_a_library(trained, tmp_path):
    weights, folder = trained[0] / "backbone.pt", tmp_path / "hf"
    convert = "model_factory/convert_llava_vit_packing_to_hf.py"
    done = run(convert, "llava_vit_tiny_ln", weights, "--output_dir", folder)
    tensors = r"^all \d+ tensors of the file are in the folder, bit for bit$"
    assert [line for line in strange_lines(done) if not re.match(tensors, line)] == []
    done = run("model_factory/export_llava_tower.py", folder, "--output_dir", tmp_path / "tower")
    assert strange_lines(done) == []
    done = forked("-m", "training.export", trained[0], "--output", tmp_path / "now")
    (line,) = strange_lines(done)
    assert line.startswith("step 10: ")


@pytest.mark.e2e
def test_a_probe_prints_no_line_of_a_library(packed, trained, tmp_path):
    flags = ("--dataset", "motion_shapes", "--data_root", packed.parent, "--num_frames", 2)
    flags += ("--model_weight", trained[0])
    flags += ("--head", "linear", "--default_epoch", 1, "--output", tmp_path)
    (line,) = strange_lines(run("eval_encoder/attentive_probe.py", *flags))
    assert line.startswith("motion_shapes llava_vit_sampling: top-1 ")
    assert (tmp_path / "results.jsonl").is_file()


def test_without_dali_one_line_has_the_command_before_any_data_is_made(tmp_path):
    code = (
        "import sys; sys.modules['nvidia'] = None\n"
        "from training.train_univit import main; sys.exit(main(sys.argv[1:]))"
    )
    output = tmp_path / "run"
    done = run("-c", code, "--preset", "demo", "--output", output, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert "pip install -e .[cpu]" in line and ".[gpu]" in line
    assert not (output / "data").exists()


def test_a_checkpoint_of_another_size_has_the_hint_first_and_few_names(tmp_path, capsys):
    from model_factory.convert_llava_vit_packing_to_hf import main
    from model_factory.registry import create_model

    path = tmp_path / "weights.pt"
    torch.save(create_model("llava_vit_tiny_ln").state_dict(), path)
    for change in ("size", "layout"):
        if change == "layout":
            names = torch.load(path, weights_only=True)
            path = tmp_path / "others.pt"
            torch.save({f"visual.{name}": tensor for name, tensor in names.items()}, path)
        assert main(["llava_vit_large_ln", str(path), "--output_dir", str(tmp_path / "hf")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        hint, _, names = line.partition("?")
        assert re.search("is the model name right|is this another model's checkpoint", hint)
        assert len(re.findall(r"[\w]+(?:\.\w+)+\.?(?:weight|bias)", names)) <= 20
        assert not re.search(r"layers?\.\d", hint) and re.search(r" and \d+ more", names)


def test_the_probes_folder_has_two_names_that_agree_or_are_refused():
    def folder(*flags) -> Path:
        return build_config(build_parser().parse_args(list(flags))).report_dir

    assert folder() == REPORT_DIR
    assert folder("--output", "a") == folder("--save_report", "a") == Path("a")
    assert folder("--output", "a", "--save_report", "a") == Path("a")
    with pytest.raises(ValueError, match="--save_report b and --output a are one flag"):
        folder("--output", "a", "--save_report", "b")
