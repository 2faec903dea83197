"""Everything a start goes on from is bound: files of a commit, records of a run, names of heads.

Trainings run in this process, on synthetic patches: eight steps, a commit after every second.
"""

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import faulty
import pytest
import torch
import torch.distributed as dist
from conftest import alone
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from model_factory.files import json_bytes, write_json
from training.checkpoint.files import write_tensors
from training.checkpoint.folder import (
    Commit,
    read_manifest,
    verify_checkpoint,
    write_manifest,
    write_state,
)
from training.checkpoint.resume import find_commit
from training.config.presets import preset
from training.errors import BadCheckpoint, ConfigMismatch, StorageError
from training.record.files import RecordFile, restore_records
from training.record.report import write_report
from training.run_folder import read_run_file
from training.stop_signals import StopSignals
from training.trainer import Trainer

LOGGER = logging.getLogger("bound")
STEPS, EVERY, BATCH = 8, 2, 8
RECORDS = ("metrics.jsonl", "consumed-00000.jsonl")


def train(output: Path, **changes) -> Trainer:
    """A run of one process, as far as it goes; what it says goes to the logger `bound`."""
    config = preset("debug")
    every = dataclasses.replace(config.checkpoint, every=EVERY)
    schedule = dataclasses.replace(config.schedule, total_samples=STEPS * BATCH)
    settings = {"output": str(output), "schedule": schedule, "checkpoint": every, "log_every": 3}
    config = dataclasses.replace(config, **{**settings, **changes})
    output.mkdir(parents=True, exist_ok=True)
    with alone() as ranks:
        datasets = {head.name: None for head in config.heads}
        trainer = Trainer(config, datasets, ranks, StopSignals(), LOGGER)
        trainer.train()
    return trainer


def found_by(resume: str, output: Path) -> Commit:
    """The commit that a start goes on from."""
    with alone() as ranks:
        return find_commit(output, resume, ranks, LOGGER)


def restored(output: Path) -> dict:
    """What is on record of other ranks after all records were cut back to the commit."""
    with alone() as ranks:
        return restore_records(output, find_commit(output, "auto", ranks, LOGGER), ranks, LOGGER)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train(output)
    return output


@pytest.fixture
def half(whole, tmp_path) -> Path:
    """A copy of it whose newest commit is that of step 6; its records know of two steps more."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    shutil.rmtree(commit(output, STEPS))
    return output


def commit(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step_{step:08d}"


def records(output: Path) -> list[bytes]:
    return [(output / name).read_bytes() for name in RECORDS]


def weights(output: Path) -> dict[str, torch.Tensor]:
    (file,) = commit(output, STEPS).glob("*.safetensors")
    return load_file(file)


def same_end(first: Path, second: Path) -> bool:
    """Whether two runs end with the same weights, moments and centres, bit by bit."""
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def seal(folder: Path) -> None:
    """Give a folder that was changed by hand a manifest of its own."""
    names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    (folder / "manifest.json").unlink()
    write_manifest(folder, names)


# ---- files of a commit


def add_foreign_tensors(folder: Path) -> None:
    """What the loading library would take for the newest weights."""
    (file,) = folder.glob("*.safetensors")
    save_file(
        {n: torch.zeros_like(t) for n, t in load_file(file).items()}, folder / "z.safetensors"
    )


def add_foreign_folder(folder: Path) -> None:
    (folder / "old").mkdir()


def put_a_folder_in_place(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.unlink()
    file.mkdir()


def put_a_loop_in_place(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.unlink()
    file.symlink_to(file.name)


def put_memory_in_place_of_the_manifest(folder: Path) -> None:
    """A file that the system opens and will not read (EIO)."""
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/proc/self/mem")


def put_a_folder_in_place_of_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


def nest_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": ' + "[" * 100_000)


def write_no_utf8_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe" + (folder / "manifest.json").read_bytes())


def nest_the_state(folder: Path) -> None:
    (folder / "state.json").write_text('{"data": ' + "[" * 100_000)
    seal(folder)


def take_a_field_of_the_state(folder: Path) -> None:
    (folder / "state.json").write_bytes(json_bytes({"step": 8, "data": []}))
    seal(folder)


def list_a_name_that_no_system_takes(folder: Path) -> None:
    files = {**read_manifest(folder), "x" * 300: {"size": 1, "sha256": "0" * 64}}
    (folder / "manifest.json").write_bytes(json_bytes({"version": 2, "files": files}))


def say_a_size_in_words(folder: Path) -> None:
    files = {name: {**entry, "size": "1"} for name, entry in read_manifest(folder).items()}
    (folder / "manifest.json").write_bytes(json_bytes({"version": 2, "files": files}))


FAULTS = {
    add_foreign_tensors: "z.safetensors is not of this checkpoint: move it out of the folder",
    add_foreign_folder: "old is not of this checkpoint",
    put_a_folder_in_place: "is missing or has another size",
    put_a_loop_in_place: "is missing or has another size",
    put_memory_in_place_of_the_manifest: "manifest.json cannot be read (Input/output error)",
    put_a_folder_in_place_of_the_manifest: "manifest.json cannot be read (Is a directory)",
    nest_the_manifest: "manifest.json is no readable JSON",
    write_no_utf8_manifest: "manifest.json is no readable JSON",
    nest_the_state: "state.json is no readable JSON",
    take_a_field_of_the_state: "state.json: 'data' is []",
    list_a_name_that_no_system_takes: "cannot be read (File name too long)",
    say_a_size_in_words: "manifest.json does not describe a checkpoint",
}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_commit_with_a_fault_of_any_kind_is_named_and_the_one_before_is_used(
    whole, tmp_path, caplog, spoil
):
    output = tmp_path / "run"
    shutil.copytree(whole, output, symlinks=True)
    spoil(commit(output, STEPS))
    assert found_by("auto", output).path == commit(output, STEPS - EVERY)
    (line,) = [r.message for r in caplog.records if "DAMAGED CHECKPOINT" in r.message]
    assert FAULTS[spoil] in line and str(commit(output, STEPS)) in line


def test_a_run_with_foreign_tensors_in_its_newest_commit_ends_as_an_undisturbed_one(
    whole, tmp_path, caplog
):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    add_foreign_tensors(commit(output, STEPS))
    train(output)
    assert same_end(output, whole) and records(output) == records(whole)
    assert "DAMAGED CHECKPOINT" in caplog.text and "DAMAGED RECORD" not in caplog.text
    assert list((output / "checkpoints").glob("superseded_*")), "what was damaged is kept"


def test_a_named_commit_with_a_foreign_file_is_refused_until_it_is_moved_as_advised(
    whole, tmp_path, caplog
):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    add_foreign_tensors(commit(output, STEPS - EVERY))
    named = commit(output, STEPS - EVERY)
    with pytest.raises(BadCheckpoint, match="z.safetensors is not of this checkpoint: move it out"):
        found_by(str(named), output)
    with pytest.raises(BadCheckpoint, match="name an intact one with --resume PATH") as error:
        found_by(str(tmp_path), output)
    assert "no manifest.json" in str(error.value)
    os.rename(named / "z.safetensors", tmp_path / "z.safetensors")
    assert found_by(str(named), output).path == named
    assert found_by("never", output) is None


def test_tensors_are_read_from_listed_files_alone(whole, tmp_path):
    """Even of a file that comes after the folder was verified."""
    from training.checkpoint.files import read_tensors

    folder = tmp_path / "commit"
    shutil.copytree(commit(whole, STEPS), folder)
    want = {n: t for n, t in weights(whole).items() if n.startswith("encoder.")}
    add_foreign_tensors(folder)
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in want.items()}
    read_tensors(found, folder, alone=True)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_no_flipped_bit_of_a_manifest_goes_unseen(whole, tmp_path):
    """Nor makes it look like one of the earlier version, which has no digest."""
    folder = tmp_path / "commit"
    folder.mkdir()
    for name in ("a.safetensors", "state.json"):
        (folder / name).write_bytes(b"")
    write_state(folder, {"step": 1, "data": {}, "fingerprint": {}})
    write_manifest(folder, ["a.safetensors", "state.json"])
    text = (folder / "manifest.json").read_bytes()
    assert verify_checkpoint(folder) == []
    for place in range(len(text)):
        spoilt = bytearray(text)
        spoilt[place] ^= 1 << place % 8
        (folder / "manifest.json").write_bytes(spoilt)
        assert verify_checkpoint(folder), place


def test_a_commit_of_the_version_without_digests_is_resumed_from(half, whole):
    """Neither digests, nor heads, nor records: as they were written before."""
    folder = commit(half, STEPS - EVERY)
    state = json.loads((folder / "state.json").read_bytes())
    for new in ("digest", "heads", "records"):
        state.pop(new)
    for head in state["data"].values():
        head.pop("bad")
    state["fingerprint"]["heads.0.dataset"] = "synthetic"
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    seal(folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({"files": manifest["files"]}, indent=1))
    train(half)
    assert same_end(half, whole) and records(half) == records(whole)


def test_a_commit_of_a_later_version_is_refused_with_its_number(whole, tmp_path):
    folder = tmp_path / "commit"
    shutil.copytree(commit(whole, STEPS), folder)
    content = {"version": 3, "files": read_manifest(folder)}
    (folder / "manifest.json").write_bytes(json_bytes(content))
    (problem,) = verify_checkpoint(folder)
    assert "version 3, this code reads 2" in problem


def test_a_file_dropped_into_a_save_fails_it_by_name(tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(b"x")
    (tmp_path / "theirs.safetensors").write_bytes(b"y")
    with pytest.raises(StorageError, match="theirs.safetensors in .*: not written by this save"):
        write_manifest(tmp_path, ["mine.safetensors"])
    assert not (tmp_path / "manifest.json").exists()


def test_an_export_refuses_a_damaged_commit_and_the_one_it_advises_works(whole, tmp_path):
    from training.export import export_checkpoint

    output = tmp_path / "run"
    shutil.copytree(whole, output)
    add_foreign_tensors(commit(output, STEPS))
    with pytest.raises(BadCheckpoint, match="move it out of the folder; name an intact") as error:
        export_checkpoint(output, tmp_path / "out")
    advised = str(error.value).rpartition("intact one: ")[2].split(", ")[0]
    (output / "config.json").write_text("{}")  # of no matter: the checkpoint says which encoder
    assert export_checkpoint(Path(advised), tmp_path / "out") == STEPS - EVERY


def test_exports_have_the_permissions_that_the_umask_leaves(whole):
    modes = {path.stat().st_mode & 0o777 for path in (whole / "hf").iterdir()}
    probe = whole / "probe"
    probe.write_text("")
    assert modes == {probe.stat().st_mode & 0o777}


# ---- records


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def flip_a_digit(path: Path) -> None:
    flip(path, path.read_bytes().index(b'"step": 2') + 8)


def break_a_line(path: Path) -> None:
    flip(path, 0)


def lose_a_line(path: Path) -> None:
    path.write_bytes(b"".join(lines(path)[:2] + lines(path)[3:]))


def lose_the_end(path: Path) -> None:
    path.write_bytes(b"".join(lines(path)[:2]))


def write_no_utf8(path: Path) -> None:
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def remove(path: Path) -> None:
    path.unlink()


def put_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    flip_a_digit: "changed (sha256 differs)",
    break_a_line: "changed (sha256 differs)",
    lose_a_line: "changed (sha256 differs)",
    lose_the_end: "bytes are missing at the end",
    write_no_utf8: "changed (sha256 differs)",
    remove: "it is gone",
    put_a_folder: "it cannot be read (Is a directory)",
}


KEPT = {
    flip_a_digit: [1, 3, 3, 4, 5, 6],
    break_a_line: [2, 3, 4, 5, 6],
    lose_a_line: [1, 2, 4, 5, 6],
    lose_the_end: [1, 2],
    write_no_utf8: [2, 3, 4, 5, 6],
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda spoil: spoil.__name__)
def test_a_damaged_record_is_named_and_kept_and_its_readable_lines_stay(half, caplog, spoil, name):
    spoil(half / name)
    found = (half / name).read_bytes() if (half / name).is_file() else None
    restored(half)
    (line,) = [r.message for r in caplog.records if "DAMAGED RECORD" in r.message]
    assert str(half / name) in line and DAMAGES[spoil] in line and "up to step 6" in line
    if found is not None:
        assert (half / f"{name}.damaged").read_bytes() == found
    steps = [json.loads(text)["step"] for text in lines(half / name)] if found else []
    assert steps == KEPT.get(spoil, [])


def test_damaged_records_change_nothing_that_is_trained(half, whole, caplog):
    for name in RECORDS:
        write_no_utf8(half / name)
    train(half)
    assert caplog.text.count("DAMAGED RECORD") == 2 and same_end(half, whole)
    steps = [json.loads(text)["step"] for name in RECORDS for text in lines(half / name)]
    assert steps == [2, 3, 4, 5, 6, 7, 8] * 2
    caplog.clear()
    restored(half)
    assert caplog.text == "", "the commits after that bind what is there now"


def test_an_undamaged_record_is_cut_to_the_byte_without_a_word(half, whole, caplog):
    with open(half / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    restored(half)
    for name in RECORDS:
        assert lines(half / name) == lines(whole / name)[: STEPS - EVERY]
    assert caplog.text == ""


def test_rates_are_bound_by_nothing_and_block_no_resume(half, whole, caplog):
    (half / "speed.jsonl").write_bytes(b'\xff\xfe{}\n{"step": 2}\n{"step": "3"}\n{"step": 3, "st')
    restored(half)
    assert "speed.jsonl is not as written" in caplog.text
    assert "2 lines are unreadable" in caplog.text
    assert lines(half / "speed.jsonl") == [b'{"step": 2}\n']


def test_a_resume_from_another_runs_commit_takes_no_records_along(whole, tmp_path, caplog):
    output = tmp_path / "new"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 1}\n')  # of a third run
    train(output, resume=str(commit(whole, STEPS - EVERY)))
    assert [json.loads(text)["step"] for text in lines(output / "metrics.jsonl")] == [7, 8]
    assert (output / "metrics.jsonl.damaged").read_text() == '{"step": 1}\n'
    assert "is of another run than" in caplog.text


def test_the_record_of_a_rank_that_is_no_more_stays_bound(half, caplog):
    """As after a resume on fewer ranks."""
    folder = commit(half, STEPS - EVERY)
    shutil.copyfile(half / "consumed-00000.jsonl", half / "consumed-00001.jsonl")
    state = json.loads((folder / "state.json").read_bytes())
    state.pop("digest")
    state["records"]["consumed-00001.jsonl"] = state["records"]["consumed-00000.jsonl"]
    write_state(folder, state)
    seal(folder)
    entry = state["records"]["consumed-00001.jsonl"]
    assert restored(half) == {"consumed-00001.jsonl": entry} and caplog.text == ""
    flip_a_digit(half / "consumed-00001.jsonl")
    others = restored(half)
    assert "consumed-00001.jsonl is not as written" in caplog.text
    assert others["consumed-00001.jsonl"] != entry, "from here on what is there now is bound"


def test_bad_samples_of_the_running_epoch_come_from_the_commit(half):
    """What counts against the error budget needs no record."""
    folder = commit(half, STEPS - EVERY)
    state = json.loads((folder / "state.json").read_bytes())
    state.pop("digest")
    state["data"]["synthetic"]["bad"] = {"epoch": 0, "samples": [3, 5]}
    write_state(folder, state)
    seal(folder)
    for name in RECORDS:
        (half / name).unlink()
    trainer = train(half)
    assert trainer.data.state_dict()["synthetic"]["bad"] == {"epoch": 0, "samples": [3, 5]}
    speeds = [json.loads(line) for line in lines(half / "speed.jsonl")]
    assert speeds[-1]["bad_samples"] == 2


def test_a_report_of_damaged_records_says_so_and_shows_the_rest(whole, tmp_path):
    from training.record.report import write_report

    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "config.json").write_text(preset("debug").to_json())
    text = lines(output / "metrics.jsonl")
    spoilt = [b"\xff\n", text[1].replace(b'"loss/', b'"moss/'), text[2].replace(b": ", b': "', 1)]
    (output / "metrics.jsonl").write_bytes(b"".join([text[0], *spoilt, *text[3:]]))
    report = write_report(output).read_text()
    assert f"metrics.jsonl: 2 of {STEPS + 1} lines are damaged, left out." in report
    assert "| steps | 8 |" in report and "moss" not in report


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_what_a_run_says_of_itself_is_named_and_not_reported_when_it_changed(
    whole, tmp_path, caplog, name
):
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    for file in ("config.json", "run.json"):
        write_json(tmp_path / file, {"starts": 2, "model": {"name": "small"}})
    assert read_run_file(tmp_path / name)["starts"] == 2 and not caplog.messages
    flip(tmp_path / name, (tmp_path / name).read_bytes().index(b'"starts": 2') + 10)
    with caplog.at_level(logging.WARNING, "univit"):
        assert read_run_file(tmp_path / name) == {}
        write_report(tmp_path)
    assert name in caplog.text and "changed since it was written" in caplog.text


# ---- what the system refuses


def test_a_record_on_a_full_disk_is_an_error_with_its_path(tmp_path):
    from training.run_folder import outcome_of

    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    file = RecordFile.__new__(RecordFile)  # /dev/full has no end, so it is not read
    file.path, file._descriptor = tmp_path / "full.jsonl", os.open(tmp_path / "full.jsonl", 2)
    with pytest.raises(OSError) as error:
        file.write([{"step": 1}])
    file.close()
    outcome, message = outcome_of(error.value)
    assert outcome == "storage"
    assert "No space left on device" in message and str(tmp_path / "full.jsonl") in message


def test_a_record_that_was_removed_ends_the_run_with_its_path(tmp_path):
    from training.run_folder import outcome_of

    file = RecordFile(tmp_path / "metrics.jsonl")
    file.write([{"step": 1}])
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(StorageError, match="metrics.jsonl was removed") as error:
        file.write([{"step": 2}])
    file.close()
    assert outcome_of(error.value)[0] == "storage"


def test_an_output_folder_that_is_removed_ends_the_run_and_is_not_made_again(tmp_path):
    """After the third step, as by another process."""
    output = tmp_path / "run"
    wrappers = faulty.Wrappers()

    def remove(arguments):
        if arguments["self"].step == 3:
            # first out of reach of TensorBoard's thread, which may be opening a file in it
            shutil.rmtree(output.rename(tmp_path / "gone"))

    wrappers.after(Trainer, "_end_step", remove)
    try:
        with pytest.raises(StorageError, match="consumed-00000.jsonl was removed"):
            train(output)
    finally:
        wrappers.take_off()
    assert not output.exists()


def test_a_save_whose_folder_is_removed_before_it_writes_fails_and_makes_nothing(tmp_path):
    """The folder of a save is gone when its tensors come, with all folders above it."""
    folder = tmp_path / "run" / "checkpoints" / ".step_00000002.tmp"
    with alone(), pytest.raises(CheckpointException, match="FileNotFoundError"):
        write_tensors({"weight": torch.ones(3)}, folder=folder, group=dist.new_group())
    assert not (tmp_path / "run").exists()


def test_tensorboard_on_a_full_disk_is_told_once_and_the_training_goes_on(
    whole, tmp_path, caplog, monkeypatch, capfd
):
    """Its event file is a device that is always full."""
    from tensorboard.summary.writer import event_file_writer

    class Full:
        """Opens the device in place of a new event file."""

        def __init__(self, path, mode):
            self._file = open("/dev/full", mode, buffering=0)  # noqa: SIM115

        def __getattr__(self, name):
            return getattr(self._file, name)

    monkeypatch.setattr(event_file_writer.tf.io.gfile, "GFile", Full)
    train(tmp_path / "run")
    (line,) = [r.message for r in caplog.records if "TensorBoard" in r.message]
    assert str(tmp_path / "run" / "tensorboard") in line and "No space left" in line
    assert same_end(tmp_path / "run", whole)
    assert "Traceback" not in capfd.readouterr().err


# ---- names of heads


def test_a_head_whose_folder_was_renamed_keeps_its_name_and_goes_on(half, whole, caplog):
    """Its centres, its random draws and its records have the name that it began with."""
    caplog.set_level(logging.INFO, "bound")
    heads = preset("debug").heads
    train(half, heads=(dataclasses.replace(heads[0], dataset="elsewhere/renamed"),))
    assert same_end(half, whole) and records(half) == records(whole)
    (line,) = [r.message for r in caplog.records if "the name stays" in r.message]
    assert "head synthetic" in line and "elsewhere/renamed" in line


def test_another_number_of_heads_is_refused_with_both(half):
    heads = preset("debug").heads
    more = (*heads, dataclasses.replace(heads[0], dataset="b"))
    with pytest.raises(ConfigMismatch, match=r"has 1 heads \(synthetic\), this run 2"):
        train(half, heads=more)
