"""One training, spread in many ways: the same loss curve, whatever the ranks and the strategy, and
checkpoints that any of them goes on from.
"""

import json
import shutil
from pathlib import Path

import pytest
from forked import forked_ranks

STEPS, BATCH = 12, 8
LOSS = "loss/motion_shapes-train"


def train(packed: Path, output: Path, world: int, *flags, steps: int = STEPS) -> list[dict]:
    """Records of a run on `world` ranks with a global batch of BATCH."""
    forked_ranks(
        world,
        *("-m", "training.train_univit", "--preset", "demo", "--list_datasets", packed / "train"),
        *("--list_batch_size", BATCH // world, "--num_sampled_data", steps * BATCH),
        *("--frequent", 4, "--ckpt_interval", 6, "--output", output, *flags),
    )
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(found: list[dict], wanted: list[dict]) -> None:
    for one, two in zip(found, wanted, strict=True):
        assert one[LOSS] == pytest.approx(two[LOSS], rel=1e-5), one["step"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3), one["step"]


@pytest.fixture(scope="module")
def on_one_rank(packed, tmp_path_factory) -> list[dict]:
    """The curve of one rank."""
    return train(packed, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def on_two_ranks(packed, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Output and curve of two ranks with DDP."""
    output = tmp_path_factory.mktemp("two")
    return output, train(packed, output, 2)


@pytest.mark.e2e
@pytest.mark.dali
@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (4, ()),
        (1, ("--fsdp",)),
        (2, ("--fsdp", "--gradient_checkpoint", 1)),
        (2, ("--gradient_checkpoint", 1)),
    ],
)
def test_ranks_strategies_and_recomputation_do_not_change_the_curve(
    packed, on_one_rank, tmp_path, world, flags
):
    assert_same_curve(train(packed, tmp_path, world, *flags), on_one_rank)


@pytest.mark.e2e
@pytest.mark.dali
def test_accumulated_micro_steps_agree_between_strategies(packed, tmp_path):
    """Micro steps draw their own negatives, so they are compared with each other, not with one
    large step."""
    flags = ("--backward_passes_per_step", 2, "--list_sample_rates", 0.5)
    curves = [
        train(packed, tmp_path / name, world, *flags, *more)
        for name, world, more in (("ddp1", 1, ()), ("ddp2", 2, ()), ("fsdp2", 2, ("--fsdp",)))
    ]
    assert len(curves[0]) == STEPS // 2
    for curve in curves[1:]:
        assert_same_curve(curve, curves[0])


@pytest.mark.e2e
@pytest.mark.dali
def test_a_checkpoint_goes_on_under_another_strategy_and_number_of_ranks(
    packed, on_two_ranks, soak, tmp_path
):
    straight, wanted = on_two_ranks
    output = tmp_path / "run"
    spread = [(2, ("--fsdp",)), (1, ("--fsdp",))]
    if soak:
        spread.append((4, ()))
    for world, flags in spread:
        if not output.exists():
            shutil.copytree(straight, output)
        shutil.rmtree(output / "checkpoints" / f"step_{STEPS:08d}")
        assert_same_curve(train(packed, output, world, *flags), wanted)


@pytest.mark.e2e
@pytest.mark.dali
def test_compiled_blocks_train_alike(packed, on_one_rank, tmp_path):
    """On one rank: each rank compiles for itself, half a minute when nothing is cached."""
    found = train(packed, tmp_path, 1, "--compile")
    for one, two in zip(found, on_one_rank, strict=True):
        assert one[LOSS] == pytest.approx(two[LOSS], rel=1e-3), one["step"]


@pytest.mark.e2e
@pytest.mark.dali
def test_heads_that_share_a_forward_pass_train_as_apart(packed, mixed, tmp_path):
    curves = []
    for room in (0, 10_000):
        output = tmp_path / str(room)
        forked_ranks(
            2,
            *("-m", "training.train_univit", "--preset", "demo", "--num_sampled_data", 8 * 16),
            *("--list_datasets", packed / "train", mixed, "--list_batch_size", 4, 4),
            *("--set", f"parallel.forward_tokens={room}", "--output", output),
        )
        lines = (output / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
    for apart, together in zip(*curves, strict=True):
        for name in (n for n in apart if n.startswith("loss/")):
            assert together[name] == pytest.approx(apart[name], rel=1e-5), apart["step"]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("saved_on", "loaded_on"), [(1, (2, 4)), (2, (3, 1)), (3, (4,)), (4, (1, 3))]
)
def test_centres_and_moments_reshard_over_any_ranks(tmp_path, saved_on, loaded_on):
    """Eleven classes divide by no number of ranks."""
    script = "tests/training/checkpoint/checkpoint_ranks.py"
    done = forked_ranks(saved_on, script, "save", tmp_path, "sparse")
    assert done.stdout.count("save ok") == saved_on
    for world in loaded_on:
        done = forked_ranks(world, script, "load", tmp_path, "sparse")
        assert done.stdout.count("load ok") == world
