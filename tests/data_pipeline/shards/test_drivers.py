"""Whoever runs the tasks, the same bytes come out, once, and the last one binds them."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import zipfile
from types import ModuleType, SimpleNamespace

import pytest
from conftest import PATIENCE_S, ROOT, run

from data_pipeline.errors import DataPipelineError, MissingData
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig
from data_pipeline.shards.verify import verify

CONFIG = PackConfig(
    SampleConfig(size=56, patch_size=14, gop=64, budget=32), samples_per_shard=2, workers=1
)
FLAGS = "--size 56 --patch-size 14 --gop 64 --budget 32 --samples-per-shard 2 --workers 1".split()


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    return pack(list_inputs([clips / "val.csv"]), tmp_path_factory.mktemp("whole"), CONFIG)


def test_array_jobs_in_any_order_give_the_folder_of_one_run(clips, tmp_path, whole):
    inputs, said = list_inputs([clips / "val.csv"]), []
    for job in (2, 0):
        assert pack(inputs, tmp_path, CONFIG, said.append, task_id=job, num_tasks=3) is None
    assert any("1 of 4 shards are still to be packed" in line for line in said)
    manifest = pack(inputs, tmp_path, CONFIG, task_id=1, num_tasks=3)
    assert manifest.sha256 == whole.sha256
    assert verify(manifest) == []


def test_array_jobs_from_the_command_line(clips, tmp_path, whole):
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "data_pipeline", "pack", clips / "val.csv", "--output", tmp_path]
            + FLAGS
            + ["--task-id", str(job), "--num-tasks", "2"],
            cwd=ROOT,
        )
        for job in (0, 1)
    ]
    assert [job.wait(timeout=PATIENCE_S) for job in jobs] == [0, 0]
    assert load_manifest(tmp_path).sha256 == whole.sha256


@pytest.mark.parametrize("job", [-1, 3])
def test_a_job_outside_the_array_is_an_error(clips, tmp_path, job):
    with pytest.raises(ValueError, match=f"--task-id {job} must be 0 to 2"):
        pack(list_inputs([clips / "val.csv"]), tmp_path, CONFIG, task_id=job, num_tasks=3)


@pytest.mark.parametrize(
    "seconds",
    [
        0.6,
        pytest.param(1.2, marks=pytest.mark.soak),
        1.8,
        pytest.param(2.4, marks=pytest.mark.soak),
    ],
)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(clips, tmp_path, whole, seconds):
    command = [sys.executable, "-m", "data_pipeline", "pack", clips / "val.csv"]
    command += ["--output", tmp_path, *FLAGS]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for record in tmp_path.glob("video-*.json"):  # what is committed is whole
        assert record.with_suffix(".tar").is_file()
    manifest = pack(list_inputs([clips / "val.csv"]), tmp_path, CONFIG)
    assert manifest.sha256 == whole.sha256
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_ray_cluster_gives_the_same_folder(clips, tmp_path, whole):
    from data_pipeline.shards.pack import pack_ray

    manifest = pack_ray(list_inputs([clips / "val.csv"]), tmp_path, CONFIG)
    assert manifest.sha256 == whole.sha256


def test_the_ray_driver_carries_out_the_plan(clips, tmp_path, whole, monkeypatch):
    """With a stand-in that runs each task where it is asked for: Ray itself is not always there."""
    from data_pipeline.shards.pack import pack_ray

    ray = ModuleType("ray")
    ray.init = lambda **options: None
    ray.remote = lambda **options: lambda work: SimpleNamespace(remote=work)
    ray.wait = lambda waiting: (waiting[:1], waiting[1:])
    ray.get = lambda result: result
    monkeypatch.setitem(sys.modules, "ray", ray)
    inputs = list_inputs([clips / "val.csv"])
    assert pack_ray(inputs, tmp_path, CONFIG).sha256 == whole.sha256
    with pytest.raises(DataPipelineError, match="6 inputs are gone"):
        pack_ray(inputs[:2], tmp_path, CONFIG)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_message_says_what_to_install(clips, tmp_path):
    command = ["-m", "data_pipeline", "pack", clips / "val.csv", "--output", tmp_path]
    done = run(*command, "--executor", "ray", check=False)
    assert done.returncode == 1 and "pip install -e .[ray]" in done.stderr


def test_remote_inputs_are_fetched_one_by_one_and_give_the_same_patches(clips, tmp_path):
    archive = tmp_path / "clips.zip"
    names = ["train_00000.mp4", "train_00001.mp4"]
    with zipfile.ZipFile(archive, "w") as bundle:
        for name in names:
            bundle.write(clips / "clips" / name, f"inside/{name}")
        bundle.writestr("inside/notes.txt", "no video")
    remote = list_inputs([f"zip://inside::file://{archive}"])
    assert [item.source for item in remote] == names and all(item.is_remote for item in remote)
    local = list_inputs([clips / "clips" / name for name in names])
    ours, theirs = (
        pack(inputs, tmp_path / name, CONFIG)
        for inputs, name in ((local, "local"), (remote, "remote"))
    )
    assert [s["sha256"] for s in ours.shards] == [s["sha256"] for s in theirs.shards]


def test_a_remote_place_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingData, match="nowhere.*does not exist"):
        list_inputs([f"file://{tmp_path}/nowhere/clip.mp4"])
    with pytest.raises(MissingData, match="cannot be opened|pip install"):
        list_inputs(["nosuchscheme://bucket/clip.mp4"])


def test_links_out_of_the_folder_are_left_out_and_reported(clips, tmp_path):
    inside, outside, said = tmp_path / "in", tmp_path / "secret.mp4", []
    inside.mkdir()
    outside.write_bytes(b"x")
    (inside / "link.mp4").symlink_to(outside)
    (inside / "real.mp4").write_bytes((clips / "clips" / "train_00000.mp4").read_bytes())
    (inside / "again.mp4").symlink_to(inside / "real.mp4")
    found = [item.source for item in list_inputs([inside], said.append)]
    assert found == ["again.mp4", "real.mp4"]
    assert "1 links lead out" in said[0] and "link.mp4" in said[0]


def test_the_same_job_started_twice_at_once_does_its_work_once(clips, tmp_path, whole):
    command = [sys.executable, "-m", "data_pipeline", "pack", clips / "val.csv"]
    jobs = [subprocess.Popen([*command, "--output", tmp_path, *FLAGS], cwd=ROOT) for _ in range(2)]
    assert [job.wait(timeout=PATIENCE_S) for job in jobs] == [0, 0]
    assert load_manifest(tmp_path).sha256 == whole.sha256


@pytest.mark.parametrize("fault", ["index", "record"])
def test_damaged_side_files_are_repaired(clips, tmp_path, whole, fault):
    inputs = list_inputs([clips / "val.csv"])
    pack(inputs, tmp_path, CONFIG)
    name = "video-000001.tar.idx" if fault == "index" else "video-000001.json"
    (tmp_path / name).write_bytes(b"\xff\xfe" if fault == "index" else b"{}")
    if fault == "index":
        assert any("tar.idx" in problem for problem in verify(load_manifest(tmp_path)))
    assert verify(pack(inputs, tmp_path, CONFIG)) == []


def test_a_changed_input_is_neither_bound_as_the_old_one_nor_packed_over_it(clips, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, source in (("a", 0), ("b", 1), ("c", 2)):
        data = (clips / "clips" / f"train_{source:05d}.mp4").read_bytes()
        (folder / f"{name}.mp4").write_bytes(data)
    inputs = list_inputs([folder])
    pack(inputs, tmp_path / "out", CONFIG)
    (folder / "c.mp4").write_bytes((clips / "clips" / "train_00003.mp4").read_bytes())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for options in ({}, {"task_id": 0, "num_tasks": 2}):
        with pytest.raises(DataPipelineError, match="c.mp4"):
            pack(inputs, tmp_path / "out", CONFIG, **options)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_one_unreachable_address_rejects_that_input_only(clips, tmp_path):
    listed = tmp_path / "list.txt"
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"no archive")
    good = clips / "clips" / "train_00000.mp4"
    listed.write_text(f"{good}\nzip://a.mp4::file://{broken}\nfile://{tmp_path}/nowhere.mp4\n")
    manifest = pack(list_inputs([listed]), tmp_path / "out", CONFIG)
    assert len(manifest) == 1 and dict(manifest.rejected_by_reason()) == {"missing": 2}
    with pytest.raises(MissingData, match="broken.zip cannot be opened"):
        list_inputs([f"zip://a.mp4::file://{broken}"])
