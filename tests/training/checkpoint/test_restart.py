"""From where a launcher's restart goes on, and what a refused resume advises."""

import dataclasses
import logging

import pytest
from conftest import alone

from training.checkpoint import resume as resume_module
from training.checkpoint.folder import FOLDER_NAME, CheckpointFolder
from training.checkpoint.resume import check_fits, find_commit
from training.config.presets import preset
from training.config.schema import fingerprint
from training.errors import BadCheckpoint, ConfigMismatch

LOGGER = logging.getLogger("restart")


@pytest.fixture
def start(monkeypatch):
    """start(output, resume, restarted) -> name of the commit that it goes on from; every folder
    counts as whole."""
    monkeypatch.setattr(resume_module, "verify_checkpoint", lambda path: [])
    monkeypatch.setattr(resume_module, "read_state", lambda path: {})

    def choose(output, resume, restarted):
        with alone() as ranks:
            ranks = dataclasses.replace(ranks, restarted=restarted)
            commit = find_commit(output, resume, ranks, LOGGER)
        return None if commit is None else str(commit.path)

    return choose


def saved(output, step):
    folder = CheckpointFolder(output / FOLDER_NAME).final(step)
    folder.mkdir(parents=True)
    return str(folder)


def test_a_restart_before_the_first_save_starts_as_it_was_told_to(start, tmp_path, caplog):
    run = tmp_path / "run"
    other = saved(tmp_path / "other", 20)
    saved(run, 10)
    for resume, found in ((other, other), ("never", None)):
        caplog.clear()
        assert start(run, resume, False) == found
        assert start(run, resume, True) == found, "an older run's commit is not what was asked for"
        assert "holds again" in caplog.text


def test_a_restart_after_a_save_goes_on_from_it(start, tmp_path, caplog):
    run = tmp_path / "run"
    other = saved(tmp_path / "other", 20)
    saved(run, 10)
    start(run, other, False)
    folder = CheckpointFolder(run / FOLDER_NAME)
    folder.note_start(20)
    assert start(run, other, True) == other
    newest = saved(run, 30)
    assert start(run, other, True) == newest and "was for the first start" in caplog.text
    assert start(run, other, False) == other, "another job forgets the start of the one before"
    assert start(run, other, True) == other


def test_a_run_may_be_named_for_its_newest_commit_and_one_without_is_refused(start, tmp_path):
    newest = saved(tmp_path / "other", 20)
    assert start(tmp_path / "run", str(tmp_path / "other"), False) == newest
    (tmp_path / "empty" / FOLDER_NAME).mkdir(parents=True)
    with pytest.raises(BadCheckpoint, match="holds no checkpoint"):
        start(tmp_path / "run", str(tmp_path / "empty"), False)


def test_a_data_difference_that_is_allowed_is_not_to_be_restored(tmp_path):
    config = dataclasses.replace(preset("debug"), output=str(tmp_path), resume_data="new-epoch")
    with alone() as ranks:
        state = {"fingerprint": fingerprint(config, ranks.world_size)}
        changed = dataclasses.replace(config, seed=config.seed + 1)
        with pytest.raises(ConfigMismatch) as error:
            check_fits(changed, state, ["data of head a: other"], ranks, LOGGER)
    text = str(error.value)
    assert "seed" in text and "other\n" not in text and "new-epoch" not in text
