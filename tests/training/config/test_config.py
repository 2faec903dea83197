"""Configuration: flags become typed fields once, mistakes are named,
every field is read somewhere.
"""

import ast
import dataclasses
import itertools
import logging

import pytest
from conftest import ROOT

from training.config.cli import IDLE_FLAGS, build_config, build_parser, warn_idle
from training.config.override import override
from training.config.presets import PRESETS, preset
from training.config.schema import TrainConfig, fingerprint, fingerprint_difference
from training.optimizer import ScheduleConfig, is_decayed, lr_factor


def config_of(*argv: str) -> TrainConfig:
    return build_config(build_parser().parse_args(argv))


def test_lists_become_heads_with_one_value_for_all():
    config = config_of(
        *("--list_datasets", "a/x", "b/y", "--list_batch_sizes", "4", "8", "--list_margins", "0.2"),
        *("--residual_ratio", "0.5", "--frame_sampling_ratio", "0.4", "--lr", "0.01"),
    )
    assert [head.name for head in config.heads] == ["x", "y"]
    assert [head.stream.batch_size for head in config.heads] == [4, 8]
    assert [head.loss.margin for head in config.heads] == [0.2, 0.2]
    assert config.heads[1].stream.view.codec_ratio == 0.5
    assert config.optimizer.lr == 0.01


def test_a_mere_split_is_named_with_its_parent():
    config = config_of("--list_datasets", "data/k400/train", "data/ssv2/train")
    assert [head.name for head in config.heads] == ["k400-train", "ssv2-train"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--list_datasets", "a", "b", "c", "--list_margins", "1", "2"],
            "--list_margins has 2 values for 3",
        ),
        (["--preset", "large"], "known: baseline, debug, demo"),
        (["--opt", "sgd"], "only adamw"),
        (["--list_datasets", "x", "y/x"], "each name once"),
        (["--warmup_ratio", "1.5"], "--warmup_ratio 1.5"),
        (["--residual_ratio", "0.9", "--frame_sampling_ratio", "0.9"], "exceed 1"),
        (["--set", "optimizer.lrr=1"], "nearest known: lr"),
        (["--set", "optimizer.lr=fast"], "lr takes"),
        (["--set", "heads.3.dataset=x"], "no index of a list of 1"),
        (["--backward_passes_per_step", "0"], "grad_accum_steps is 0"),
        (["--set", "heads=[1]"], "heads has fields of its own"),
        (["--set", "embedded_clips=[1]"], "embedded_clips takes"),
        (["--set", "resume_allow=[1]"], "resume_allow takes"),
        (["--set", "optimizer.lr=NaN"], "no number to work with"),
        (["--set", "optimizer.betas=[0.9,1]"], "optimizer.betas"),
        (["--set", "collective_timeout_s=-1"], "collective_timeout_s is -1.0"),
        (["--list_loss_weights", "-1"], "--list_loss_weights -1.0"),
        (["--lr", "nan"], "optimizer.lr: nan is no number"),
        (["--set", "optimizer"], "write it as field.subfield=value"),
        (["--set", "optimizer=1"], "optimizer has fields of its own"),
        (["--set", "embedded_clips.0=many"], "0 takes int, got 'many'"),
        (["--set", "embedded_clips.2=1"], "'2' is no index of a list of 2"),
        (["--set", "output.name=x"], "unknown field 'name'; nearest known: none"),
        (["--set", "embedded_clips=[1,2]", "--set", "embedded_clips.0=3"], "about the same values"),
        (["--set", "embedded_clips.0=3", "--set", "embedded_clips=[1,2]"], "about the same values"),
    ],
)
def test_mistakes_are_value_errors_that_name_the_flag(argv, message):
    with pytest.raises(ValueError, match=message):
        config_of(*argv)


def test_overrides_reach_any_depth_and_keep_types():
    assigned = ("heads.0.stream.view.max_tokens=49", "optimizer.lr=1", "model.init_from=weights.pt")
    config = override(preset("demo"), assigned)
    assert config.heads[0].stream.view.max_tokens == 49
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.model.init_from == "weights.pt"


# no two of the first three go together, and neither of the others goes alone
TOGETHER = (
    ["heads.0.dataset=data/words", "heads.1.dataset=data/clips", "heads.2.dataset=data/images"],
    ["pack_tokens=4096", "heads.2.stream.token_share=0.75", "heads.0.stream.token_share=0.25"],
    ["heads.1.stream.view.codec_ratio=0.9", "heads.1.stream.view.frame_ratio=0.1", "seed=3"],
)


@pytest.mark.parametrize("assignments", TOGETHER)
def test_settings_that_need_each_other_come_in_any_order(assignments):
    base = preset("large_stage2_video")
    configs = [override(base, order) for order in itertools.permutations(assignments)]
    assert len(configs) == 6 and all(config == configs[0] for config in configs)
    flat = configs[0].flat()
    assert [f"{path}={flat[path]}" for path, _, _ in (a.partition("=") for a in assignments)] == (
        assignments
    )


def test_a_flag_lies_over_its_preset_and_a_setting_over_the_flag():
    flags = ("--preset", "demo", "--lr", "0.5", "--set", "optimizer.lr=0.25")
    assert config_of(*flags[:2]).optimizer.lr == preset("demo").optimizer.lr
    assert config_of(*flags[:4]).optimizer.lr == 0.5
    assert config_of(*flags).optimizer.lr == 0.25
    assert config_of(*flags[:2], *flags[4:], *flags[2:4]).optimizer.lr == 0.25
    assert config_of(*flags, "--set", "optimizer.lr=1").optimizer.lr == 1.0, "the last one counts"


def test_a_flag_that_is_only_valid_with_a_setting_goes_with_it():
    view = config_of(
        *("--preset", "demo", "--residual_ratio", "0.9"),
        *("--set", "heads.0.stream.view.frame_ratio=0.1"),
    ).heads[0].stream.view  # fmt: skip
    assert (view.codec_ratio, view.frame_ratio) == (0.9, 0.1)
    with pytest.raises(ValueError, match="exceed 1"):
        config_of("--preset", "demo", "--residual_ratio", "0.9")


def test_overrides_leave_their_base_alone_and_keep_the_types_of_lists():
    base = preset("progressive")
    rows = "heads.0.stream.stages=[[0,512,2,0.5],[0.5,1024,4,1]]"
    config = override(base, [rows, "optimizer.betas=[0,0.5]", "resume_allow=[]"])
    assert [stage.max_tokens for stage in config.heads[0].stream.stages] == [512, 1024]
    assert config.optimizer.betas == (0.0, 0.5) and isinstance(config.optimizer.betas[0], float)
    assert override(base, ["heads.0.stream.stages.1.max_tokens=99"]).heads[0].stream.stages[1] == (
        dataclasses.replace(base.heads[0].stream.stages[1], max_tokens=99)
    )
    assert base == preset("progressive")


def test_without_a_dataset_the_demo_preset_is_laid_under_the_flags():
    config = config_of("--list_batch_size", "64", "--output", "out")
    assert config.heads[0].dataset == "motion_shapes" and config.heads[0].stream.batch_size == 64
    assert config.model.name == PRESETS["demo"]().model.name


def test_idle_flags_say_once_that_they_are(caplog):
    args = build_parser().parse_args(["--mask", "1", "--image_size", "224"])
    logger = logging.getLogger("idle")
    with caplog.at_level(logging.WARNING, "idle"):
        warn_idle(args, logger)
    assert len(caplog.records) == 2 and "--mask has no effect" in caplog.text
    assert all(reason for reason in IDLE_FLAGS.values())


def test_every_config_field_is_read_somewhere():
    read = set()
    for package in ("training", "data_pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    read.add(node.attr)

    def fields(kind):
        for field in dataclasses.fields(kind):
            yield field.name
            value = (
                field.default_factory()
                if field.default_factory is not dataclasses.MISSING
                else field.default
            )
            for item in value if isinstance(value, tuple) else (value,):
                if dataclasses.is_dataclass(item):
                    yield from fields(type(item))

    unread = [name for name in fields(TrainConfig) if name not in read]
    assert not unread, f"config fields that nothing reads: {unread}"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_say_their_command(name):
    config = preset(name)
    assert "torchrun" in PRESETS[name].__doc__ and config.schedule.total_samples > 0


def test_fingerprint_ignores_what_changes_nothing_and_counts_global_batches():
    one = config_of(
        "--list_datasets", "d", "--list_batch_size", "8", "--output", "a", "--workers", "1"
    )
    two = config_of(
        "--list_datasets", "e/d", "--list_batch_size", "4", "--output", "b", "--workers", "3"
    )
    assert fingerprint_difference(fingerprint(one, 1), fingerprint(two, 2)) == []
    assert fingerprint_difference(fingerprint(one, 1), fingerprint(two, 1)) == [
        "heads.0.stream.batch_size: checkpoint 8, now 4"
    ]


def test_learning_rate_warms_up_and_decays_to_zero():
    schedule = ScheduleConfig(warmup_ratio=0.2, power=1.0)
    factors = [lr_factor(step, 10, schedule) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5) and factors[10] == 0.0
    assert all(a >= b for a, b in zip(factors[1:], factors[2:], strict=False))
    assert lr_factor(6, 10, ScheduleConfig(warmup_ratio=0.2, power=2.0)) == pytest.approx(0.25)
    assert lr_factor(0, 10, ScheduleConfig(warmup_ratio=0.0)) == 1.0


def test_norms_biases_and_probe_do_not_decay():
    from model_factory.registry import create_model

    model = create_model("hf_llava_vit_packing_tiny_ln")
    decayed = {name for name, parameter in model.named_parameters() if is_decayed(name, parameter)}
    assert "encoder.layers.0.mlp.fc1.weight" in decayed and "patch_embed.proj.weight" in decayed
    assert not any(name.endswith(("bias", "probe")) or "norm" in name for name in decayed)
