"""Data that were moved or renamed go on; and what an error advises is tried, word by word.

Trainings run in this process, on real shards: six steps of two heads, a commit after every second.
"""

import json
import logging
import re
import shlex
import shutil
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from data_pipeline.clustering.labels import save_labels
from data_pipeline.datasets import resolve_dataset
from data_pipeline.shards.manifest import load_manifest
from training.config.cli import build_config, build_parser
from training.distributed import process_group
from training.errors import BadCheckpoint, ConfigMismatch, StorageError
from training.stop_signals import StopSignals
from training.trainer import Trainer

STEPS, EVERY = 6, 2
LOGGER = logging.getLogger("advice")
NOISE = ("--preset", "debug", "--list_batch_size", 8, "--num_sampled_data", STEPS * 8)
pytestmark = pytest.mark.dali


def configured(output: Path, *flags):
    """The configuration of a command line."""
    common = ("--ckpt_interval", EVERY, "--frequent", 1, "--output", output)
    return build_config(build_parser().parse_args([*map(str, (*flags, *common))]))


def train(output: Path, *flags) -> None:
    """Run a command line in this process, as one rank."""
    config = configured(output, *flags)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with process_group() as ranks:
            datasets = {
                head.name: None if config.synthetic_data else resolve_dataset(head.dataset).load()
                for head in config.heads
            }
            Trainer(config, datasets, ranks, StopSignals(), LOGGER).train()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def heads(*folders: Path) -> tuple:
    """Flags of a run on these folders."""
    sizes = ("--list_batch_sizes", *[4] * len(folders))
    total = ("--num_sampled_data", STEPS * 4 * len(folders))
    return ("--preset", "demo", *sizes, *total, "--list_datasets", *folders)


def tensors(output: Path) -> dict[str, torch.Tensor]:
    (file,) = (output / "checkpoints" / f"step_{STEPS:08d}").glob("*.safetensors")
    return load_file(file)


def same_end(first: Path, second: Path) -> bool:
    """Whether two runs have the same records, weights and moments, bit by bit."""
    one, two = tensors(first), tensors(second)
    names = ("metrics.jsonl", "consumed-00000.jsonl")
    return (
        one.keys() == two.keys()
        and all(torch.equal(one[name], two[name]) for name in one)
        and all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    )


@pytest.fixture(scope="module")
def whole(packed, tmp_path_factory) -> Path:
    """Output of an undisturbed run on two folders, in the order train, val."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(output, *heads(packed / "train", packed / "val"))
    return output


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """Output of an undisturbed run on synthetic patches."""
    output = tmp_path_factory.mktemp("noise") / "run"
    train(output, *NOISE)
    return output


def without_newest(run: Path, output: Path) -> Path:
    """A copy of a run that has two steps to go."""
    shutil.copytree(run, output)
    shutil.rmtree(output / "checkpoints" / f"step_{STEPS:08d}")
    return output


def advised(error: Exception) -> list[str]:
    """The flags that an error says let the run go on."""
    return shlex.split(str(error).rpartition("to go on all the same, add ")[2])


# ---- moved and renamed


def test_data_folders_under_other_names_go_on_bitwise(packed, whole, tmp_path, caplog):
    caplog.set_level(logging.INFO, "advice")
    output = without_newest(whole, tmp_path / "run")
    shutil.copytree(packed / "train", tmp_path / "disk" / "renamed")
    shutil.copytree(packed / "val", tmp_path / "other" / "train")  # a name that the first had
    train(output, *heads(tmp_path / "disk" / "renamed", tmp_path / "other" / "train"))
    assert same_end(output, whole)
    told = [r.message for r in caplog.records if "the name stays" in r.message]
    assert len(told) == 2 and "head motion_shapes-train" in told[0] and "renamed" in told[0]


def test_names_that_changed_places_follow_the_data(packed, whole, tmp_path):
    """The folder that is called as the other head was has its own head's data."""
    output = without_newest(whole, tmp_path / "run")
    parent = tmp_path / packed.name
    shutil.copytree(packed / "train", parent / "val")
    shutil.copytree(packed / "val", parent / "train")
    train(output, *heads(parent / "val", parent / "train"))
    assert same_end(output, whole)


def test_the_same_data_in_another_order_are_refused_with_the_order(packed, whole, tmp_path):
    output = without_newest(whole, tmp_path / "run")
    with pytest.raises(ConfigMismatch, match="heads in another order: motion") as error:
        train(output, *heads(packed / "val", packed / "train"))
    order = re.search(r"another order: ([^;]*);", str(error.value))[1].split(", ")
    train(output, *heads(*(packed / name.rpartition("-")[2] for name in order)))
    assert same_end(output, whole)


def test_other_classes_are_refused_and_restored_labels_go_on(packed, whole, tmp_path):
    output = without_newest(whole, tmp_path / "run")
    data = tmp_path / "data"
    shutil.copytree(packed / "val", data)
    labels = np.load(data / "labels.npy")
    save_labels(data, labels, load_manifest(data), 9, {})
    with pytest.raises(ConfigMismatch, match="8 classes in the checkpoint, .* has 9: restore its"):
        train(output, *heads(packed / "train", data))
    for name in ("labels.npy", "labels.json"):
        shutil.copyfile(packed / "val" / name, data / name)
    train(output, *heads(packed / "train", data))
    assert same_end(output, whole)


def test_two_folders_of_one_name_can_be_told_apart_by_a_link_as_advised(packed, tmp_path):
    shutil.copytree(packed / "train", tmp_path / "a" / "clips")
    shutil.copytree(packed / "val", tmp_path / "b" / "clips")
    with pytest.raises(ValueError, match="rename or link one"):
        configured(tmp_path / "run", *heads(tmp_path / "a" / "clips", tmp_path / "b" / "clips"))
    (tmp_path / "others").symlink_to(tmp_path / "b" / "clips")
    config = configured(tmp_path / "run", *heads(tmp_path / "a" / "clips", tmp_path / "others"))
    assert [head.name for head in config.heads] == ["clips", "others"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "."])
def test_a_name_of_a_head_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="give a plain name without a slash"):
        configured(Path("run"), *NOISE, "--set", f'heads.0.head_name="{name}"')


# ---- advice of a mismatch


def test_flags_for_other_labels_in_another_folder_work_as_printed(packed, whole, tmp_path, caplog):
    output = without_newest(whole, tmp_path / "run")
    data = tmp_path / "relabelled"
    shutil.copytree(packed / "val", data)
    labels = np.load(data / "labels.npy")[::-1]
    save_labels(data, labels, load_manifest(data), 8, {})
    flags = heads(packed / "train", data)
    with pytest.raises(ConfigMismatch, match="shards or labels changed") as error:
        train(output, *flags)
    assert str(data) in str(error.value)
    assert advised(error.value) == ["--set", "resume_data=new-epoch"]
    train(output, *flags, *advised(error.value))
    assert "resuming all the same, data of" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        ("--lr", "5e-4"),
        ("--list_batch_size", 4, "--seed", 3),
        ("--set", "optimizer.betas=[0.8,0.9]"),
    ],
    ids=str,
)
def test_flags_for_other_settings_work_as_printed(noise, tmp_path, changed):
    output = without_newest(noise, tmp_path / "run")
    with pytest.raises(ConfigMismatch, match="belongs to another configuration") as error:
        train(output, *NOISE, *changed)
    train(output, *NOISE, *changed, *advised(error.value))
    assert (output / "hf").is_dir()


def test_a_setting_that_changes_the_tensors_has_no_such_flag_and_starting_over_works(
    noise, tmp_path
):
    output = without_newest(noise, tmp_path / "run")
    other = (*NOISE, "--list_sample_rates", 0.5)
    with pytest.raises(ConfigMismatch, match="or start over with --resume never or") as error:
        train(output, *other)
    assert "add" not in str(error.value)
    with pytest.raises(BadCheckpoint, match="has not the tensors of this run: [^\n]*$"):
        train(output, *other, "--resume_allow", "heads.0.loss.sample_rate")
    train(output, *other, "--resume", "never")
    assert list((output / "checkpoints").glob("superseded_*")), "nothing was removed"


# ---- advice of other ends


def test_after_a_full_disk_the_same_command_goes_on_as_advised(noise, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(noise, output)
    shutil.rmtree(output / "checkpoints" / "step_00000006")
    shutil.rmtree(output / "checkpoints" / "step_00000004")
    with faulty.armed("checkpoint.write:disk_full"):
        with pytest.raises(StorageError, match="start again, the newest commit there is whole"):
            train(output, *NOISE, "--set", "checkpoint.background=false")
    train(output, *NOISE)
    assert same_end(output, noise)


def test_after_a_record_was_removed_the_same_command_goes_on_as_advised(noise, tmp_path):
    from training.train_step import TrainStep

    output = without_newest(noise, tmp_path / "run")
    wrappers = faulty.Wrappers()
    wrappers.before(TrainStep, "run", lambda _: (output / "metrics.jsonl").unlink(missing_ok=True))
    with pytest.raises(StorageError, match="metrics.jsonl was removed .* same command"):
        train(output, *NOISE)
    wrappers.take_off()
    train(output, *NOISE)
    ours, theirs = tensors(output), tensors(noise)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_loss_that_is_not_finite_goes_on_with_each_of_the_advised_flags(noise, tmp_path):
    from training.train_step import NonFiniteLoss

    output = without_newest(noise, tmp_path / "run")
    advice = "--resume_allow optimizer.lr .*--max_skipped_steps"
    with faulty.armed("step.backward@5:nan"):
        with pytest.raises(NonFiniteLoss, match=advice):
            train(output, *NOISE)
        train(without_newest(noise, tmp_path / "b"), *NOISE, "--max_skipped_steps", 1)
    older = output / "checkpoints" / "step_00000002"
    train(output, *NOISE, "--resume", older)
    assert same_end(output, noise)
    lower = without_newest(noise, tmp_path / "c")
    train(lower, *NOISE, "--lr", "5e-4", "--resume_allow", "optimizer.lr")


def test_starting_over_after_every_commit_is_damaged_works_as_advised(noise, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(noise, output)
    for state in output.glob("checkpoints/step_*/state.json"):
        state.unlink()
    with pytest.raises(BadCheckpoint, match="or start over with --resume never"):
        train(output, *NOISE)
    train(output, *NOISE, "--resume", "never")
    assert same_end(output, noise)


def test_labels_without_a_negative_class_are_refused_and_the_advised_number_is_taken(
    packed, tmp_path
):
    flags = (*heads(packed / "train"), "--random_diff", 8)
    wide = tmp_path / "wide"
    shutil.copytree(packed / "train", wide)
    manifest = load_manifest(wide)
    labels = np.tile(np.arange(8, dtype=np.int32), (len(manifest), 1))
    save_labels(wide, labels, manifest, 8, {})
    flags = (*heads(wide), "--random_diff", 8)
    masked = ("--set", "heads.0.loss.mask_co_positives=true", "--set")
    with pytest.raises(ValueError, match="no negative class") as error:
        train(tmp_path / "run", *flags, *masked, "heads.0.stream.labels_per_step=8")
    advice = re.search(r"\(--set (\S+)\)", str(error.value))[1]
    train(tmp_path / "run", *flags, *masked, advice)


def test_crowded_centres_are_refused_and_go_on_with_the_filter_off_as_advised(packed, tmp_path):
    np.save(tmp_path / "centres.npy", np.ones((8, 128), np.float32))
    flags = (*heads(packed / "val"), "--list_init_partial_fc_paths", tmp_path / "centres.npy")
    with pytest.raises(ValueError, match="raise --list_filters, or 0 to switch it off"):
        train(tmp_path / "run", *flags)
    train(tmp_path / "run", *flags, "--list_filters", 0)


def test_the_rotary_rule_of_given_weights_is_taken_as_advised(noise, tmp_path):
    flags = (*NOISE, "--init_backbone", noise / "hf")
    with pytest.raises(ValueError, match="has the rotary rotary rule") as error:
        train(tmp_path / "run", *flags, "--set", "model.rope_pairing=legacy")
    advice = shlex.split(str(error.value).rpartition(": ")[2])
    train(tmp_path / "run", *flags, "--set", "model.rope_pairing=legacy", *advice)


def test_a_budget_of_bad_samples_is_raised_as_advised(packed, tmp_path):
    from data_pipeline.errors import BudgetExceeded

    data = tmp_path / "data"
    shutil.copytree(packed / "train", data)
    manifest = load_manifest(data)
    for sample in (3, 13):
        for member in ("tiles.jpg", "frames.jpg"):
            place = manifest.member(sample, member)
            with open(place.path, "r+b") as tar:
                tar.seek(place.offset + 99)
                tar.write(b"\0\0\0\0")
    with pytest.raises(BudgetExceeded, match="--set heads.0.stream.error_budget.share=") as error:
        train(tmp_path / "run", *heads(data))
    advice = re.search(r"`--set (\S+)=SHARE`", str(error.value))[1]
    train(tmp_path / "run", *heads(data), "--set", f"{advice}=0.2")
    state = json.loads((tmp_path / "run/checkpoints/step_00000006/state.json").read_text())
    (bad,) = [head["bad"] for head in state["data"].values()]
    assert bad["epoch"] == 0 and set(bad["samples"]) <= {3, 13}


def test_the_rounds_after_the_first_call_their_heads_as_the_first_does(tmp_path):
    """Where a folder was renamed between two starts, so that clusters and centres are found."""
    from training.rounds import _named_as, _round_config

    given = configured(tmp_path, *heads(tmp_path / "new"), "--rounds", 2)
    first = configured(tmp_path, *heads(tmp_path / "new"), "--set", "heads.0.head_name=old")
    second = _round_config(_named_as(first, given), 2, tmp_path / "round_2")
    assert second.heads[0].name == "old"
    assert second.heads[0].init_from == str(tmp_path / "round_1" / "centers" / "old.npy")


def test_a_resume_outside_of_all_rounds_is_refused_and_one_inside_is_not(tmp_path):
    from training.rounds import _check_resume

    outside = configured(tmp_path, *NOISE, "--rounds", 2, "--resume", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="lies in no round of .*: name one that does"):
        _check_resume(outside)
    inside = tmp_path / "round_2" / "checkpoints" / "step_00000002"
    _check_resume(configured(tmp_path, *NOISE, "--rounds", 2, "--resume", inside))
