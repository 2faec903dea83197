"""Whole trainings on real ranks and real shards:
resume is bitwise, data is exact, faults are named.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import kill_group, last_step, wait_until
from forked import forked, forked_ranks, start_forked_ranks
from safetensors.torch import load_file

from model_factory.files import check_checksums

STEPS, SAVE_EVERY = 24, 5
LOSS = "loss/motion_shapes-train"


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
    forked_ranks(2, *command(packed, output))
    return output


@pytest.mark.e2e
@pytest.mark.dali
def test_a_run_killed_at_any_step_continues_bitwise_and_loses_no_sample(packed, straight, tmp_path):
    output = tmp_path / "killed"
    for kill_after_steps in (2, 9, 16):  # before the first checkpoint, between two, late
        process = start_forked_ranks(2, *command(packed, output))
        consumed = output / "consumed-00000.jsonl"
        step = kill_after_steps
        wait_until(lambda f=consumed, s=step: last_step(f) >= s, process, f"step {step}")
        kill_group(process)
        assert not (output / "exit.json").exists()
    forked_ranks(2, *command(packed, output))

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
    forked_ranks(1, *command(packed, tmp_path, batch=8, world=1))
    for one, two in zip(metrics(tmp_path), metrics(straight), strict=True):
        assert one[LOSS] == pytest.approx(two[LOSS], rel=1e-5), one["step"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


@pytest.mark.e2e
@pytest.mark.dali
def test_a_checkpoint_of_two_ranks_continues_on_one(packed, straight, tmp_path):
    output = tmp_path / "resharded"
    shutil.copytree(straight, output)
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:08d}")
    forked_ranks(1, *command(packed, output, batch=8, world=1))
    for one, two in zip(metrics(output), metrics(straight), strict=True):
        assert one[LOSS] == pytest.approx(two[LOSS], rel=1e-5), one["step"]


@pytest.mark.e2e
@pytest.mark.dali
def test_a_damaged_newest_checkpoint_falls_back_loudly_and_none_left_stops(
    packed, straight, tmp_path
):
    output = tmp_path / "damaged"
    shutil.copytree(straight, output)
    checkpoints = sorted((output / "checkpoints").iterdir(), reverse=True)
    assert [path.name for path in checkpoints] == [f"step_{s:08d}" for s in (24, 20, 15)]

    def corrupt(path):
        victim = next(path.glob("*.safetensors"))
        data = bytearray(victim.read_bytes())
        data[-10] ^= 1
        victim.write_bytes(data)

    corrupt(checkpoints[0])
    done = forked_ranks(2, *command(packed, output))
    assert "DAMAGED CHECKPOINT" in done.stderr and "resuming after step 20" in done.stderr
    assert metrics(output) == metrics(straight)

    for path in (output / "checkpoints").iterdir():
        corrupt(path)
    done = forked_ranks(2, *command(packed, output), check=False)
    assert done.returncode != 0
    outcome = json.loads((output / "exit.json").read_text())
    assert outcome["code"] == 6 and "sha256 differs" in outcome["message"]


@pytest.mark.e2e
@pytest.mark.dali
def test_starting_over_sets_old_checkpoints_aside_and_keeps_the_new(packed, straight, tmp_path):
    output = tmp_path / "over"
    shutil.copytree(straight, output)
    forked_ranks(2, *command(packed, output, "--resume", "never", "--lr", "5e-4", steps=6))
    names = sorted(path.name for path in (output / "checkpoints").glob("step_*"))
    assert names == ["step_00000005", "step_00000006"]
    assert len(list((output / "checkpoints").glob("superseded_*"))) == 3
    assert [record["step"] for record in metrics(output)] == list(range(1, 7))
    assert len(ledger(output, 1)) == 6


@pytest.mark.e2e
@pytest.mark.dali
def test_other_labels_do_not_resume(packed, straight, tmp_path):
    import numpy as np

    from data_pipeline.clustering.labels import save_labels
    from data_pipeline.shards.manifest import load_manifest

    data, output = tmp_path / "motion_shapes", tmp_path / "run"
    shutil.copytree(packed / "train", data / "train")
    shutil.copytree(straight, output)
    manifest = load_manifest(data / "train")
    labels = np.load(data / "train" / "labels.npy")
    save_labels(data / "train", labels[::-1], manifest, 8, {})
    done = forked_ranks(2, *command(data, output), check=False)
    assert done.returncode != 0
    outcome = json.loads((output / "exit.json").read_text())
    assert outcome["code"] == 7 and "shards or labels changed" in outcome["message"]


def damage(folder: Path, *samples: int) -> None:
    """Flip a byte of the stored patches and of the frames of some samples."""
    from data_pipeline.shards.manifest import load_manifest

    for sample in samples:
        for member in ("tiles.jpg", "frames.jpg"):
            place = load_manifest(folder).member(sample, member)
            with open(place.path, "r+b") as tar:
                tar.seek(place.offset + 99)
                byte = tar.read(1)[0]
                tar.seek(place.offset + 99)
                tar.write(bytes([byte ^ 255]))


@pytest.mark.e2e
@pytest.mark.dali
def test_a_bad_sample_is_replaced_on_record_and_a_resume_replaces_it_alike(packed, tmp_path):
    data, output, resumed = tmp_path / "data" / "train", tmp_path / "run", tmp_path / "resumed"
    shutil.copytree(packed / "train", data)
    damage(data, 13)
    done = forked_ranks(2, *command(tmp_path / "data", output))
    assert done.stderr.count("quarantined sample 13: ") >= 1
    pairs = [p for rank in (0, 1) for r in ledger(output, rank) for p in r.get("replaced", [])]
    assert len(pairs) == 8 and {bad for bad, _ in pairs} == {13}  # once in each of 8 epochs
    for rank in (0, 1):
        for record in ledger(output, rank):
            assert 13 not in record["ids"]
            assert {stand_in for _, stand_in in record.get("replaced", [])} <= set(record["ids"])
    by_epoch: dict[int, Counter] = {}
    for rank in (0, 1):
        for record in ledger(output, rank):
            back = Counter({stand_in: -1 for _, stand_in in record.get("replaced", [])})
            counts = by_epoch.setdefault(record["epoch"], Counter())
            counts.update(record["ids"])
            counts.update(back)
            counts.update(bad for bad, _ in record.get("replaced", []))
    assert all(counts == Counter(range(24)) for counts in by_epoch.values())

    shutil.copytree(output, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step_{STEPS:08d}")
    forked_ranks(2, *command(tmp_path / "data", resumed))
    assert metrics(resumed) == metrics(output)
    assert all(ledger(resumed, rank) == ledger(output, rank) for rank in (0, 1))


@pytest.mark.e2e
@pytest.mark.dali
def test_too_many_bad_samples_stop_all_ranks_with_the_whole_list(packed, tmp_path):
    data, output = tmp_path / "data" / "train", tmp_path / "run"
    shutil.copytree(packed / "train", data)
    damage(data, 3, 13)  # of two shards: each rank alone may never meet more than is allowed
    done = forked_ranks(2, *command(tmp_path / "data", output), check=False)
    assert done.returncode != 0
    outcome = json.loads((output / "exit.json").read_text())
    assert outcome["code"] == 4
    assert "2 bad samples in epoch 0" in outcome["message"]
    assert "sample 3: " in outcome["message"] and "sample 13: " in outcome["message"]


def on_rank_1(folder: Path, fault: str) -> Path:
    """The entry point, in which something happens to the fourth read of rank 1."""
    script = folder / "faulty.py"
    script.write_text(
        "import os, sys, training.train_univit as entry\n"
        "from data_pipeline.loading.samples import SampleReader\n"
        "reads = []\n"
        "def read(self, *args, **named):\n"
        "    reads.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(reads) > 3:\n"
        "        self.shards.reading = 'video-000001.tar'\n"
        f"        {fault}\n"
        "    return original(self, *args, **named)\n"
        "original, SampleReader.read = SampleReader.read, read\n"
        "sys.exit(entry.main(sys.argv[1:]))\n"
    )
    return script


@pytest.mark.e2e
@pytest.mark.dali
def test_what_one_rank_cannot_go_on_from_ends_all_at_the_same_step(packed, tmp_path):
    script = on_rank_1(tmp_path, "raise MemoryError('no room')")
    _, _, *arguments = command(packed, tmp_path / "run")
    done = forked_ranks(2, script, *arguments, check=False)
    assert done.returncode != 0 and "another rank stopped: MemoryError: no room" in done.stderr
    assert "Connection closed" not in done.stderr


@pytest.mark.e2e
@pytest.mark.dali
def test_ranks_that_see_other_data_do_not_start(packed, tmp_path):
    script = tmp_path / "other.py"
    script.write_text(
        "import os, sys, training.train_univit as entry\n"
        "from data_pipeline.loading.stream import HeadStream\n"
        "original = HeadStream._identity\n"
        "HeadStream._identity = lambda *a: original(*a) + os.environ['RANK']\n"
        "sys.exit(entry.main(sys.argv[1:]))\n"
    )
    _, _, *arguments = command(packed, tmp_path / "run")
    done = forked_ranks(2, script, *arguments, check=False)
    assert done.returncode != 0 and "ranks [1] plan other batches than rank 0" in done.stderr


@pytest.mark.e2e
@pytest.mark.dali
def test_storage_that_stops_answering_ends_the_run_with_the_file(packed, tmp_path):
    data, output = tmp_path / "data" / "train", tmp_path / "run"
    shutil.copytree(packed / "train", data)
    script = on_rank_1(tmp_path, "__import__('time').sleep(1000)")
    _, _, *arguments = command(tmp_path / "data", output)
    done = forked_ranks(
        2, script, *arguments, "--set", "data_timeout_s=8", "--set", "data_warning_s=1", check=False
    )
    assert done.returncode != 0 and "waiting for data for " in done.stderr
    outcome = json.loads((output / "exit.json").read_text())
    assert outcome["code"] == 8 and "reading" in outcome["message"]
    assert "video-00000" in outcome["message"]


@pytest.mark.e2e
@pytest.mark.dali
def test_rounds_cluster_again_with_the_trained_encoder_and_start_from_it(packed, tmp_path):
    import numpy as np

    from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

    forked_ranks(2, *command(packed, tmp_path, "--rounds", 2, steps=6))
    (report,) = json.loads((tmp_path / "rounds.json").read_text())["rounds"]
    assert check_checksums(tmp_path, listing="backbone.pt.sha256")
    assert check_checksums(tmp_path / "hf")
    head = report["motion_shapes-train"]
    assert report["after_round"] == 1 and head["classes"] == 8
    assert 0 <= head["nmi_with_labels_before"] <= 1
    clusters = tmp_path / "round_1" / "clusters" / "motion_shapes-train"
    centroids = np.load(clusters / "centroids.npy")
    config = json.loads((tmp_path / "round_2" / "config.json").read_text())
    assert config["heads"][0]["init_from"] == str(clusters / "centroids.npy")
    second = metrics(tmp_path / "round_2")
    assert all(record[LOSS] > 0 and record["grad_norm"] > 0.1 for record in second)
    assert centroids.shape == (8, 128) and (clusters / "labels.npy").is_file()
    encoders = [
        LlavaViTPackingModel.from_pretrained(folder / "hf").state_dict()
        for folder in (tmp_path, tmp_path / "round_2", tmp_path / "round_1")
    ]
    assert all(torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0])
    assert any(not torch.equal(encoders[0][name], encoders[2][name]) for name in encoders[0])
    before = (clusters / "centroids.npy").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "round_2" / "checkpoints" / "step_00000006")
    moved = tmp_path.with_name("moved")
    shutil.move(tmp_path, moved)  # found again wherever it lies
    forked_ranks(2, *command(packed, moved, "--rounds", 2, steps=6))
    clusters = moved / "round_1" / "clusters" / "motion_shapes-train"
    assert (clusters / "centroids.npy").stat().st_mtime_ns == before, "clustered once"
    again = LlavaViTPackingModel.from_pretrained(moved / "hf").state_dict()
    assert all(torch.equal(encoders[0][name], again[name]) for name in again)

    done = forked_ranks(
        2,
        *command(packed, moved, "--rounds", 2, "--resume", "never", "--seed", 5, steps=6),
    )
    assert "clusters of other weights removed" in done.stderr
    outside = command(packed, moved, "--rounds", 2, "--resume", moved / "hf", steps=6)
    done = forked_ranks(1, *outside, check=False)
    assert done.returncode and "lies in no round" in done.stderr


def test_mutual_information_of_partitions():
    import numpy as np

    from training.rounds import normalised_mutual_information

    left = np.array([0, 0, 1, 1, 2, 2])
    assert normalised_mutual_information(left, left + 5) == 1.0
    assert normalised_mutual_information(left, np.zeros(6, int)) == 0.0
    assert 0.5 < normalised_mutual_information(left, np.array([0, 0, 1, 1, 1, 1])) < 0.9
    many = np.arange(1_000_000)  # as many classes: nothing quadratic in them
    assert normalised_mutual_information(many, many[::-1]) == 1.0


def mixture(packed: Path, mixed: Path, output: Path, world: int, *extra):
    """A head of clips counted in samples, and one of clips and pictures counted in packs."""
    settings = (
        "pack_tokens=600",
        "heads.1.stream.token_share=0.5",
        "heads.1.stream.label_width=100",
    )
    return (
        *("-m", "training.train_univit", "--preset", "demo", "--output", output),
        *("--list_datasets", packed / "train", mixed, "--list_batch_sizes", 4 // world, 4 // world),
        *("--num_sampled_data", 160, "--frequent", 2, "--ckpt_interval", 3),
        *(part for setting in settings for part in ("--set", setting)),
        *extra,
    )


@pytest.mark.e2e
@pytest.mark.dali
def test_a_mixture_with_packs_gives_one_curve_on_any_ranks_and_resumes_bitwise(
    packed, mixed, tmp_path
):
    for world in (1, 2):
        forked_ranks(world, *mixture(packed, mixed, tmp_path / str(world), world))
    one, two = (metrics(tmp_path / str(world)) for world in (1, 2))
    assert len(one) == len(two) >= 6
    for left, right in zip(one, two, strict=True):
        for name in (LOSS, "loss/packed"):
            assert left[name] == pytest.approx(right[name], rel=1e-5), left["step"]
    counts = [
        [len(r["ids"]) for r in ledger(tmp_path / "2", rank) if r["head"] == "packed"]
        for rank in (0, 1)
    ]
    assert counts[0] != counts[1], "packs differ in samples, so ranks do"

    output = tmp_path / "resumed"
    shutil.copytree(tmp_path / "2", output)
    newest = max((output / "checkpoints").iterdir())
    shutil.rmtree(newest)
    forked_ranks(2, *mixture(packed, mixed, output, 2))
    assert metrics(output) == two
    assert all(ledger(output, rank) == ledger(tmp_path / "2", rank) for rank in (0, 1))


@pytest.mark.e2e
@pytest.mark.dali
def test_the_exported_folder_gives_the_trained_encoders_outputs_in_a_fresh_process(
    straight, tmp_path
):
    from model_factory.registry import create_model

    trained = create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary").eval()
    shards = (straight / "checkpoints" / f"step_{STEPS:08d}").glob("*.safetensors")
    tensors = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    trained.load_state_dict(
        {k.removeprefix("encoder."): v for k, v in tensors.items() if k.startswith("encoder.")}
    )
    rows, grid = torch.randn(30, 768), torch.tensor([[2, 3, 5]])
    torch.save(rows, tmp_path / "rows.pt")
    code = (
        "import sys, torch\n"
        "from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel as Model\n"
        "model = Model.from_pretrained(sys.argv[1], torch_dtype=torch.float32).eval()\n"
        "rows = torch.load(sys.argv[2] + '/rows.pt', weights_only=True)\n"
        "with torch.no_grad(): out = model(rows, torch.tensor([[2, 3, 5]]))\n"
        "torch.save([out.last_hidden_state, out.pooler_output], sys.argv[2] + '/out.pt')\n"
    )
    forked("-c", code, straight / "hf", tmp_path)
    tokens, pooled = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        want = trained(rows, grid)
    assert torch.allclose(tokens, want.last_hidden_state, atol=1e-5)
    assert torch.allclose(pooled, want.pooler_output, atol=1e-5)


@pytest.mark.e2e
@pytest.mark.dali
def test_another_configuration_does_not_resume(packed, straight, tmp_path):
    output = tmp_path / "other"
    shutil.copytree(straight, output)
    done = forked_ranks(2, *command(packed, output, "--list_margins", "0.1"), check=False)
    assert done.returncode != 0
    outcome = json.loads((output / "exit.json").read_text())
    assert outcome["code"] == 7
    assert "heads.0.loss.margin: checkpoint 0.3, now 0.1" in outcome["message"]


@pytest.mark.e2e
@pytest.mark.dali
def test_a_non_finite_loss_stops_before_the_optimizer(packed, tmp_path):
    done = forked_ranks(2, *command(packed, tmp_path, "--lr", "1e20"), check=False)
    assert done.returncode != 0
    outcome = json.loads((tmp_path / "exit.json").read_text())
    assert outcome["code"] == 5 and "No weight was changed" in outcome["message"]
    assert not list((tmp_path / "checkpoints").glob("step_*"))


@pytest.mark.e2e
@pytest.mark.dali
def test_gradient_accumulation_sees_the_same_samples_per_step(packed, tmp_path):
    forked_ranks(1, *command(packed, tmp_path, "--backward_passes_per_step", 2, batch=4, steps=3))
    steps = Counter(record["step"] for record in ledger(tmp_path, 0))
    assert steps == {1: 2, 2: 2, 3: 2}
    assert len(metrics(tmp_path)) == 3


@pytest.mark.e2e
def test_the_debug_preset_learns_its_synthetic_patterns(tmp_path):
    forked_ranks(2, "-m", "training.train_univit", "--preset", "debug", "--output", tmp_path)
    losses = [record["loss/synthetic"] for record in metrics(tmp_path)]
    assert len(losses) == 20 and losses[-1] < 0.1 * losses[0]
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["synthetic_data"] is True
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.e2e
@pytest.mark.dali
def test_the_public_command_makes_its_own_data_when_none_is_named(tmp_path):
    done = forked_ranks(
        *(2, "-m", "training.train_univit", "--list_batch_size", 8, "--output", tmp_path),
        *("--num_sampled_data", 48, "--set", "embedded_clips=[16,8]"),
    )
    assert done.stderr.count("making, packing and clustering the embedded motion_shapes set") == 1
    assert "step 3/3 | motion_shapes" in done.stderr
