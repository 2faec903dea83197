"""Whole trainings on real ranks and real shards:
resume is bitwise, data is exact, faults are named.
"""

import json
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import kill_group, start_torchrun, torchrun
from safetensors.torch import load_file

STEPS, SAVE_EVERY = 24, 5


def command(packed: Path, output: Path, *extra, batch: int = 4, world: int = 2, steps: int = STEPS):
    return (
        *("-m", "training.train_univit", "--preset", "demo", "--list_datasets", packed / "train"),
        *("--list_batch_size", batch, "--num_sampled_data", steps * batch * world),
        *("--frequent", 3, "--ckpt_interval", SAVE_EVERY, "--output", output, *extra),
    )


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def ledger(output: Path, rank: int) -> list[dict]:
    return [
        json.loads(line)
        for line in (output / f"consumed-{rank:05d}.jsonl").read_text().splitlines()
    ]


def final_tensors(output: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted((output / "checkpoints" / f"step_{STEPS:08d}").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[f"{file.name}/{name}"] = tensor
    return tensors


@pytest.fixture(scope="module")
def straight(packed, tmp_path_factory) -> Path:
    """Output of an uninterrupted run on two ranks."""
    output = tmp_path_factory.mktemp("straight")
    torchrun(2, *command(packed, output))
    return output


@pytest.mark.e2e
@pytest.mark.dali
def test_a_run_killed_at_any_step_continues_bitwise_and_loses_no_sample(packed, straight, tmp_path):
    output = tmp_path / "killed"
    for kill_after_steps in (2, 9, 16):  # before the first checkpoint, between two, late
        process = start_torchrun(2, *command(packed, output))
        consumed = output / "consumed-00000.jsonl"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            lines = consumed.read_text().splitlines() if consumed.exists() else []
            if (
                lines
                and json.loads(lines[-1] if lines[-1].endswith("}") else lines[-2])["step"]
                >= kill_after_steps
            ):
                break
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
        kill_group(process)
        assert not (output / "exit.json").exists()
    torchrun(2, *command(packed, output))

    assert metrics(output) == metrics(straight)
    assert [record["step"] for record in metrics(output)] == list(range(1, STEPS + 1))
    for rank in (0, 1):
        assert ledger(output, rank) == ledger(straight, rank)
    resumed, want = final_tensors(output), final_tensors(straight)
    assert resumed.keys() == want.keys()
    assert all(torch.equal(resumed[name], want[name]) for name in want)
    backbones = [torch.load(o / "backbone.pt", weights_only=True) for o in (output, straight)]
    assert all(torch.equal(backbones[0][name], backbones[1][name]) for name in backbones[1])


@pytest.mark.e2e
@pytest.mark.dali
def test_every_epoch_consumes_every_sample_once_over_the_ranks(straight):
    by_epoch: dict[int, Counter] = {}
    for rank in (0, 1):
        for record in ledger(straight, rank):
            by_epoch.setdefault(record["epoch"], Counter()).update(record["ids"])
    assert set(by_epoch) == set(range(STEPS * 8 // 24))
    assert all(counts == Counter(range(24)) for counts in by_epoch.values())


@pytest.mark.e2e
@pytest.mark.dali
def test_loss_of_one_rank_equals_that_of_two(packed, straight, tmp_path):
    torchrun(1, *command(packed, tmp_path, batch=8, world=1))
    for one, two in zip(metrics(tmp_path), metrics(straight), strict=True):
        assert one["loss/train"] == pytest.approx(two["loss/train"], rel=1e-5), one["step"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


@pytest.mark.e2e
@pytest.mark.dali
def test_a_checkpoint_of_two_ranks_continues_on_one(packed, straight, tmp_path):
    output = tmp_path / "resharded"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:08d}")
    torchrun(1, *command(packed, output, batch=8, world=1))
    for one, two in zip(metrics(output), metrics(straight), strict=True):
        assert one["loss/train"] == pytest.approx(two["loss/train"], rel=1e-5), one["step"]


@pytest.mark.e2e
@pytest.mark.dali
def test_a_damaged_newest_checkpoint_falls_back_loudly_and_none_left_stops(
    packed, straight, tmp_path
):
    output = tmp_path / "damaged"
    shutil.copytree(straight, output)
    checkpoints = sorted((output / "checkpoints").iterdir(), reverse=True)
    assert [path.name for path in checkpoints] == [f"step_{s:08d}" for s in (24, 20, 15)]

    def damage(path):
        victim = next(path.glob("*.safetensors"))
        data = bytearray(victim.read_bytes())
        data[-10] ^= 1
        victim.write_bytes(data)

    damage(checkpoints[0])
    done = torchrun(2, *command(packed, output))
    assert "DAMAGED CHECKPOINT" in done.stderr and "resuming after step 20" in done.stderr
    assert metrics(output) == metrics(straight)

    for path in (output / "checkpoints").iterdir():
        damage(path)
    done = torchrun(2, *command(packed, output), check=False)
    assert done.returncode != 0
    outcome = json.loads((output / "exit.json").read_text())
    assert outcome["code"] == 6 and "sha256 differs" in outcome["message"]


@pytest.mark.e2e
@pytest.mark.dali
def test_another_configuration_does_not_resume(packed, straight, tmp_path):
    output = tmp_path / "other"
    shutil.copytree(straight, output)
    done = torchrun(2, *command(packed, output, "--list_margins", "0.1"), check=False)
    assert done.returncode != 0
    outcome = json.loads((output / "exit.json").read_text())
    assert outcome["code"] == 7
    assert "heads.0.loss.margin: checkpoint 0.3, now 0.1" in outcome["message"]


@pytest.mark.e2e
@pytest.mark.dali
def test_a_non_finite_loss_stops_before_the_optimizer(packed, tmp_path):
    done = torchrun(2, *command(packed, tmp_path, "--lr", "1e20"), check=False)
    assert done.returncode != 0
    outcome = json.loads((tmp_path / "exit.json").read_text())
    assert outcome["code"] == 5 and "No weight was changed" in outcome["message"]
    assert not list((tmp_path / "checkpoints").glob("step_*"))


@pytest.mark.e2e
@pytest.mark.dali
def test_gradient_accumulation_sees_the_same_samples_per_step(packed, tmp_path):
    torchrun(1, *command(packed, tmp_path, "--backward_passes_per_step", 2, batch=4, steps=3))
    steps = Counter(record["step"] for record in ledger(tmp_path, 0))
    assert steps == {1: 2, 2: 2, 3: 2}
    assert len(metrics(tmp_path)) == 3


@pytest.mark.e2e
def test_the_debug_preset_learns_its_synthetic_patterns(tmp_path):
    torchrun(2, "-m", "training.train_univit", "--preset", "debug", "--output", tmp_path)
    losses = [record["loss/synthetic"] for record in metrics(tmp_path)]
    assert len(losses) == 20 and losses[-1] < 0.1 * losses[0]
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["synthetic_data"] is True
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.e2e
@pytest.mark.dali
def test_the_public_command_makes_its_own_data_when_none_is_named(tmp_path):
    done = torchrun(
        *(2, "-m", "training.train_univit", "--list_batch_size", 8, "--output", tmp_path),
        *("--num_sampled_data", 48, "--set", "embedded_clips=[16,8]"),
    )
    assert done.stderr.count("making, packing and clustering the embedded motion_shapes set") == 1
    assert "step 3/3 | motion_shapes" in done.stderr
