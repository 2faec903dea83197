"""The public contract: names that must import, commands that must parse, files that must exist."""

import argparse
import importlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, run

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

PUBLIC_TRAINER_FLAGS = """
--output --list_datasets --list_batch_sizes --list_batch_size --list_sample_rates --list_margins
--list_filters
--list_lr_pfc_weights --list_loss_weights --list_init_partial_fc_paths --model_name --embedding_size
--image_size
--image_size_video --num_frames --lr --opt --weight_decay --weight_decay_pfc --warmup_ratio
--backward_passes_per_step --init_backbone --num_sampled_data --frequent --ckpt_interval --workers
--use_synthetic_data --use_fastpfc --debug --target_num --num_tokens_per_frame --residual_ratio
--frame_sampling_ratio --total_indices --must_num --enable_multi_frame --multi_frame_list
--base_num_frames
--dataloader-type --dali_is_training --input_gray --random_diff --model_weight --gradient_checkpoint
--mask
--repeat_pfc --save_pfc --visualize --vis_samples --vis_interval --finetune_backbone
""".split()
OWN_TRAINER_FLAGS = [
    "--preset",
    "--resume",
    "--resume_allow",
    "--rounds",
    "--seed",
    "--set",
    "--fsdp",
    "--compile",
    "--max_skipped_steps",
    "--profile",
    "--print_config",
    "--print-config",
    "--dry_run",
    "--dry-run",
    "--help",
    "-h",
]


def documented_commands() -> list[str]:
    """Shell lines of fenced blocks, continuation lines joined."""
    commands = []
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", document.read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            commands += [
                line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")
            ]
    return commands


def parsers() -> dict:
    """What builds the argument parser of each of our commands."""
    from data_pipeline.__main__ import build_parser as data_parser
    from eval_encoder.lmm.chat import build_parser as chat_parser
    from eval_encoder.lmm.config import parse_arguments
    from eval_encoder.lmm.demo.question_set import build_parser as demo_set_parser
    from eval_encoder.lmm.demo.tiny import build_parser as tiny_parser
    from eval_encoder.lmm.questions import build_parser as questions_parser
    from eval_encoder.lmm.scoring.answers import build_parser as answers_parser
    from eval_encoder.lmm.scoring.scorers import build_parser as scorers_parser
    from eval_encoder.lmm.scoring.table import build_parser as table_parser
    from eval_encoder.lmm.web.page import build_parser as page_parser
    from eval_encoder.probe.compare import build_parser as compare_parser
    from eval_encoder.probe.config import build_parser as probe_parser
    from eval_encoder.probe.prepare import build_parser as prepare_parser
    from eval_encoder.probe.report import build_parser as report_parser
    from model_factory.convert_llava_vit_packing_to_hf import build_parser as convert_parser
    from model_factory.export_llava_tower import build_parser as tower_parser
    from training.config.cli import build_parser as train_parser
    from training.doctor import build_parser as doctor_parser
    from training.export import build_parser as export_parser

    return {
        "training.doctor": doctor_parser,
        "training.export": export_parser,
        "training.train_univit": train_parser,
        "data_pipeline": data_parser,
        "eval_encoder.lmm.demo.question_set": demo_set_parser,
        "eval_encoder.lmm.scoring.table": table_parser,
        "eval_encoder.lmm.demo.tiny": tiny_parser,
        "eval_encoder.lmm.scoring.answers": answers_parser,
        "eval_encoder/lmm_chat.py": chat_parser,
        "eval_encoder/lmm_eval.py": questions_parser,
        # what is left is transformers' own
        "eval_encoder/lmm_probe.py": lambda: SimpleNamespace(parse_args=parse_arguments),
        "eval_encoder.lmm.scoring.scorers": scorers_parser,
        "eval_encoder/lmm_web.py": page_parser,
        "eval_encoder.probe.prepare": prepare_parser,
        "eval_encoder.probe.report": report_parser,
        "eval_encoder/attentive_probe.py": probe_parser,
        "eval_encoder.probe.compare": compare_parser,
        "model_factory/convert_llava_vit_packing_to_hf.py": convert_parser,
        "model_factory/export_llava_tower.py": tower_parser,
    }


def parser_of(words: list[str]):
    """Argument parser and arguments of one of our commands,
    or None for a command that is not ours.
    """
    for name, build in parsers().items():
        if name in words:
            return build(), words[words.index(name) + 1 :]
    return None


@pytest.mark.parametrize("command", documented_commands())
def test_documented_command_parses(command):
    words = shlex.split(command)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
    found = parser_of(words)
    if found:
        parser, arguments = found
        parser.parse_args(arguments)


@pytest.mark.parametrize(
    "command",
    [
        "torchrun --nproc_per_node 8 -m training.train_univit --list_batch_size 64 --output "
        "./output/baseline",
        "torchrun --nproc_per_node 8 -m training.train_univit --list_batch_sizes 64 32 "
        "--list_datasets a b",
        "torchrun --nproc_per_node 8 --master_port 15555 eval_encoder/attentive_probe.py "
        "--eval_freq 1 "
        "--default_lr_list 0.0003 --batch_size 16 --default_weight_decay 0 --dali_py_num_workers 8 "
        "--model_family llava_vit_sampling --dataset ssv2",
        "python model_factory/convert_llava_vit_packing_to_hf.py llava_vit_large_ln backbone.pt "
        "--output_dir DIR",
        "python -m data_pipeline pack a.mp4 folder list.csv --output DIR",
        "python -m data_pipeline cluster DIR --num-centroids 5 --output DIR2",
        "python -m data_pipeline label DIR --centroids DIR2",
    ],
)
def test_public_contract_command_parses(command):
    parser, arguments = parser_of(shlex.split(command))
    parser.parse_args(arguments)


def test_trainer_flags_are_exactly_the_frozen_list():
    from training.config.cli import build_parser

    flags = {option for action in build_parser()._actions for option in action.option_strings}
    assert flags == set(PUBLIC_TRAINER_FLAGS) | set(OWN_TRAINER_FLAGS)


WRITTEN = re.compile(r"--(output|output_dir|save_report|cache_dir|feature_cache|convnext)")


def commands_of(parser) -> list:
    """A parser and those of its commands."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(command for action in below for command in action.choices.values())]


@pytest.mark.parametrize(
    "url", ["s3://bucket/run", "gs://bucket/run", "file:///data/run", "s3:/bucket/run"]
)
def test_no_command_takes_a_url_as_its_output(url):
    """A path of that name would be a folder called s3: below the working directory. A path that was
    joined or normalised has one slash left of two."""
    from eval_encoder.lmm.config import build_parser as lmm_parser
    from model_factory.command_line.local_output import NotLocal
    from training.config.schema import TrainConfig

    found = {**parsers(), "eval_encoder/lmm_probe.py": lmm_parser}
    refused = []
    for name, build in found.items():
        for parser in commands_of(build()):
            for action in parser._actions:
                written = any(WRITTEN.fullmatch(option) for option in action.option_strings)
                # the trainer's is checked in its configuration, which --set reaches too
                idle = name == "training.train_univit" or "no effect" in str(action.help)
                if written and not idle:
                    with pytest.raises(NotLocal, match="is a URL"):
                        action.type(url)
                    refused.append(name)
    writing = ("data_pipeline", "export", "convert", "lmm_probe", "attentive_probe", "prepare")
    assert set(refused) >= {name for name in found if any(word in name for word in writing)}
    with pytest.raises(NotLocal, match="is a URL"):
        TrainConfig(output=url)


def test_a_url_as_output_ends_with_what_to_do_and_writes_nothing(tmp_path, monkeypatch, capsys):
    from data_pipeline.__main__ import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["pack", "clip.mp4", "--output", "s3://bucket/run"])
    assert end.value.code == 2 and "copy it there afterwards" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["pack", "clip.mp4", "--output", "file:///data/run"])
    assert "write /data/run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_abbreviated_flags_are_errors():
    from training.config.cli import build_parser

    with pytest.raises(SystemExit):
        build_parser().parse_args(["--list_batch", "64"])


def test_public_names_import_and_give_the_published_values():
    import torch

    from model_factory.convert_llava_vit_packing_to_hf import (
        compute_patch_positions_with_interpolated_temporal,
        interpolate_frame_indices,
    )
    from model_factory.vit_preview_v0_packing_hf import (
        LlavaViTPackingModel,
        compute_patch_positions_from_grid_thw,
    )

    assert LlavaViTPackingModel.config_class.model_type == "llava_vit_packing"
    positions = compute_patch_positions_from_grid_thw(torch.tensor([[1, 14, 14]]))
    assert positions.shape == (196, 3)
    assert positions[1].tolist() == [0, 0, 1] and positions[-1].tolist() == [0, 13, 13]
    times = interpolate_frame_indices(torch.arange(8)[None], torch.tensor([8]))
    assert times.tolist() == [[0, 9, 18, 27, 36, 45, 54, 63]]
    assert compute_patch_positions_with_interpolated_temporal(times, 14, 14).shape == (8 * 196, 3)


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "training.train_univit", "--help"),
        ("-m", "data_pipeline", "--help"),
        ("-m", "data_pipeline", "pack", "--help"),
        ("eval_encoder/attentive_probe.py", "--help"),
        ("-m", "eval_encoder.probe.prepare", "--help"),
        ("-m", "eval_encoder.probe.report", "--help"),
        ("model_factory/convert_llava_vit_packing_to_hf.py", "--help"),
        ("model_factory/export_llava_tower.py", "--help"),
        ("eval_encoder/lmm_probe.py", "--help"),
        ("eval_encoder/lmm_eval.py", "--help"),
        ("-m", "eval_encoder.lmm.demo.tiny", "--help"),
        ("-m", "eval_encoder.lmm.demo.question_set", "--help"),
        ("-m", "eval_encoder.lmm.scoring.table", "--help"),
    ],
    ids=" ".join,
)
def test_help_does_not_import_torch(command):
    """Half a second is the promise; a machine may be slow, but torch alone takes two."""
    done = run("-X", "importtime", *command)
    assert "usage:" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers", "av", "faiss"}


EARLIER_NAMES = {
    "lmm_answers": "lmm.scoring.answers",
    "lmm_demo_set": "lmm.demo.question_set",
    "lmm_lmms_eval": "lmm.scoring.lmms_eval",
    "lmm_scorers": "lmm.scoring.scorers",
    "lmm_table": "lmm.scoring.table",
    "lmm_tiny": "lmm.demo.tiny",
    "probe_prepare": "probe.prepare",
    "probe_report": "probe.report",
    "probe_results": "probe.compare",
}


@pytest.mark.parametrize(("earlier", "present"), EARLIER_NAMES.items())
def test_commands_keep_their_earlier_names(earlier, present):
    """`python -m eval_encoder.probe_prepare` and the like stand in scripts of users."""
    command = importlib.import_module(f"eval_encoder.{earlier}")
    assert command.main is importlib.import_module(f"eval_encoder.{present}").main
    assert "sys.exit(main())" in Path(command.__file__).read_text()


def test_paths_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), f"README links to {path}"
    for folder in (
        "training",
        "model_factory",
        "data_pipeline",
        "eval_encoder",
        "shells",
        "docker",
    ):
        assert (ROOT / folder).is_dir()
