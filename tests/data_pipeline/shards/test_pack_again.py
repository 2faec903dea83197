"""`pack` onto a folder with shards goes on, refuses, appends or replaces; it never destroys."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from older_folders import unseal
from PIL import Image

from data_pipeline import commands
from data_pipeline.__main__ import build_parser, main
from data_pipeline.clustering.labels import load_labels, save_labels
from data_pipeline.errors import CorruptShard, DataPipelineError, MissingData
from data_pipeline.shards.existing import known_inputs
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.pack import pack
from data_pipeline.shards.pack_plan import plan_packing
from data_pipeline.shards.pack_progress import PackProgress
from data_pipeline.shards.sample_builder import SampleConfig
from data_pipeline.shards.tasks import PackConfig, default_samples_per_shard
from data_pipeline.shards.verify import verify
from model_factory.files import write_json
from training.data import other_patch_size

CONFIG = PackConfig(
    SampleConfig(size=32, patch_size=16, gop=64, budget=64), samples_per_shard=2, workers=1
)
FLAGS = "--size 32 --patch-size 16 --gop 64 --budget 64 --workers 1".split()


def write_pictures(folder: Path, names: str) -> Path:
    """Pictures of one grey each, which the name decides."""
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (32, 32), (ord(name),) * 3).save(folder / f"{name}.png")
    return folder


def quietly(folder: Path, output: Path, config: PackConfig = CONFIG, **options):
    return pack(list_inputs([folder]), output, config, report=[].append, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """All bytes of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    """Folder in/ of the pictures a to e, and out/, which holds their three shards."""
    folder = tmp_path_factory.mktemp("five")
    quietly(write_pictures(folder / "in", "abcde"), folder / "out")
    return folder


@pytest.fixture
def copy(five, tmp_path) -> Path:
    """A copy of both that a test may change; modification times are the same."""
    shutil.copytree(five, tmp_path / "copy")
    return tmp_path / "copy"


def refused(copy: Path, config: PackConfig = CONFIG, **options) -> str:
    """The message of a refusal, which must leave every byte as it was."""
    before = contents(copy / "out")
    with pytest.raises(DataPipelineError) as error:
        quietly(copy / "in", copy / "out", config, **options)
    assert contents(copy / "out") == before
    return str(error.value)


# another packing is refused


def test_other_inputs_are_refused_and_counted_by_kind(copy):
    (copy / "in" / "a.png").unlink()
    write_pictures(copy / "in", "xy")
    Image.new("RGB", (32, 32)).save(copy / "in" / "b.png")
    message = refused(copy)
    assert "2 inputs are new: x.png first" in message
    assert "1 input is gone: a.png" in message
    assert "1 input is changed, or another file of the same name: b.png" in message
    assert "--append" in message and "--replace" in message


def test_other_settings_are_refused_with_both_values(copy):
    other = replace(CONFIG, sample=replace(CONFIG.sample, budget=100), samples_per_shard=3)
    message = refused(copy, other)
    assert "budget is 64 there, 100 is asked for" in message
    assert "samples_per_shard is 2 there, 3 is asked for" in message
    assert "--append needs equal settings" in message


def test_a_folder_of_another_decomposition_version_is_refused(copy, monkeypatch):
    monkeypatch.setattr("data_pipeline.shards.tasks.DECOMPOSITION_VERSION", 1000)
    assert "1000 is asked for" in refused(copy)
    assert "decomposition_version" in refused(copy, mode="append")


def test_inputs_in_another_order_are_the_same_packing_of_a_bound_folder(copy):
    inputs = list_inputs([copy / "in"])
    before = load_manifest(copy / "out").sha256
    assert pack(inputs[::-1], copy / "out", CONFIG, report=[].append).sha256 == before


def test_a_packing_that_was_stopped_is_known_by_its_records(copy):
    (copy / "out" / "manifest.json").unlink()
    (copy / "out" / "video-000001.json").unlink()
    write_pictures(copy / "other", "xy")
    before = contents(copy / "out")
    with pytest.raises(DataPipelineError, match="2 inputs are new: x.png first"):
        quietly(copy / "other", copy / "out")
    assert contents(copy / "out") == before
    assert verify(quietly(copy / "in", copy / "out")) == []


def test_a_tar_without_a_record_is_written_over_only_when_its_inputs_are_asked_for(copy):
    for path in (copy / "out").glob("*.json"):
        path.unlink()
    write_pictures(copy / "other", "xy")
    before = contents(copy / "out")
    with pytest.raises(DataPipelineError, match="2 inputs are gone: a.png first"):
        quietly(copy / "other", copy / "out")
    assert contents(copy / "out") == before
    assert verify(quietly(copy / "in", copy / "out")) == []


@pytest.mark.parametrize("mode", ["refuse", "append", "replace"])
@pytest.mark.parametrize("name", ["manifest.json", "video-000000.tar"])
def test_files_of_others_are_never_written_over(five, tmp_path, name, mode):
    (tmp_path / name).write_text('{"name": "a page"}')
    with pytest.raises(DataPipelineError, match=f"{name}.*would be overwritten"):
        quietly(five / "in", tmp_path, mode=mode)
    assert (tmp_path / name).read_text() == '{"name": "a page"}'


# the same packing goes on


def test_inputs_of_the_same_bytes_are_the_same_whatever_their_times(copy):
    before = load_manifest(copy / "out").sha256
    for path in (copy / "in").iterdir():
        os.utime(path, (1, 1))
    assert quietly(copy / "in", copy / "out").sha256 == before


def test_a_record_of_before_is_compared_by_what_it_holds(copy):
    """Records once stated one hash over all inputs and no list of them."""
    manifest = load_manifest(copy / "out")
    unseal(copy / "out", without=("inputs",))
    for path in (copy / "out").glob("video-*.json"):
        record = json.loads(path.read_bytes())
        assert [known.source for known in known_inputs(record)] == [
            sample["source"] for sample in record["samples"]
        ]
    times = {path: path.stat().st_mtime_ns for path in (copy / "out").glob("*.tar")}
    assert len(quietly(copy / "in", copy / "out")) == len(manifest)
    assert times == {path: path.stat().st_mtime_ns for path in (copy / "out").glob("*.tar")}
    Image.new("RGB", (32, 32)).save(copy / "in" / "b.png")
    assert "b.png" in refused(copy)


def test_shards_keep_the_size_they_have_where_none_is_asked_for(copy):
    before = load_manifest(copy / "out").sha256
    free = replace(CONFIG, samples_per_shard=None, workers=2)
    assert quietly(copy / "in", copy / "out", free).sha256 == before


@pytest.mark.parametrize(
    "inputs, jobs, size", [(1, 1, 16), (1000, 1, 125), (10**7, 1, 500), (10_000, 100, 16)]
)
def test_the_size_of_shards_follows_from_the_work_alone(inputs, jobs, size):
    assert default_samples_per_shard(inputs, jobs) == size


# --append


def test_appended_shards_follow_the_old_ones_which_keep_ids_and_bytes(copy):
    old = load_manifest(copy / "out")
    before = contents(copy / "out")
    write_pictures(copy / "in", "AB")  # which sort before the old ones
    lines = []
    inputs = list_inputs([copy / "in"])
    manifest = pack(inputs, copy / "out", CONFIG, lines.append, mode="append")
    assert manifest.sources() == [*old.sources(), "A.png", "B.png"]
    assert [shard["name"] for shard in manifest.shards][3:] == ["video-000003"]
    assert verify(manifest) == []
    after = contents(copy / "out")
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")
    assert any("2 new inputs go behind them, 5 are packed already" in line for line in lines)
    # once more, and by the plain command: nothing is left to do
    assert quietly(copy / "in", copy / "out", mode="append").sha256 == manifest.sha256
    assert quietly(copy / "in", copy / "out").sha256 == manifest.sha256


def test_appending_twice_and_with_another_size_of_shards(copy):
    for names in ("vwx", "yz"):
        folder = write_pictures(copy / names, names)
        config = replace(CONFIG, samples_per_shard=len(names))
        manifest = quietly(folder, copy / "out", config, mode="append")
    assert manifest.sources() == [f"{name}.png" for name in "abcdevwxyz"]
    assert verify(manifest) == []
    (copy / "out" / "video-000003.tar").write_bytes(b"damaged")
    everything = [copy / "in", copy / "vwx", copy / "yz"]
    repaired = pack(list_inputs(everything), copy / "out", CONFIG, [].append)
    assert repaired.sha256 == manifest.sha256
    assert verify(repaired) == []


def test_an_input_whose_name_grew_by_a_folder_is_not_packed_twice(copy):
    old = load_manifest(copy / "out")
    write_pictures(copy / "other", "z")
    (copy / "other" / "z.png").rename(copy / "other" / "b.png")
    both = list_inputs([copy / "in", copy / "other"], [].append)
    assert "in/b.png" in [item.source for item in both], "it was b.png when it was alone"
    manifest = pack(both, copy / "out", CONFIG, [].append, mode="append")
    assert manifest.sources() == [*old.sources(), "other/b.png"]
    assert verify(manifest) == []
    # once more, and by the plain command: nothing is left to do
    assert pack(both, copy / "out", CONFIG, [].append, mode="append").sha256 == manifest.sha256
    assert pack(both, copy / "out", CONFIG, [].append).sha256 == manifest.sha256
    # what is packed anew has the names of now, and keeps them when a folder is named alone again
    (copy / "in" / "a.png").unlink()
    both = list_inputs([copy / "in", copy / "other"], [].append)
    manifest = pack(both, copy / "out", CONFIG, [].append, mode="replace")
    assert manifest.sources() == ["in/b.png", "c.png", "d.png", "e.png", "other/b.png"]
    assert quietly(copy / "in", copy / "out", mode="append").sha256 == manifest.sha256


def test_appending_a_changed_input_is_refused(copy):
    Image.new("RGB", (32, 32)).save(copy / "in" / "b.png")
    assert "b.png" in refused(copy, mode="append")


def test_appending_packs_a_rejected_input_once_its_file_is_another(tmp_path):
    folder = write_pictures(tmp_path / "in", "ac")
    (folder / "b.png").write_bytes(b"half of a download")
    assert quietly(folder, tmp_path / "out").rejected_by_reason().total() == 1
    write_pictures(folder, "b")
    with pytest.raises(DataPipelineError, match="one that was rejected: b.png\n--append p"):
        quietly(folder, tmp_path / "out")
    manifest = quietly(folder, tmp_path / "out", mode="append")
    assert manifest.sources() == ["a.png", "c.png", "b.png"]
    # the first shard still states b as rejected, and stays so when it is repaired
    assert quietly(folder, tmp_path / "out").sha256 == manifest.sha256
    (tmp_path / "out" / "video-000000.tar").unlink()
    again = quietly(folder, tmp_path / "out")
    assert again.sources() == manifest.sources()


def stop_before_binding(copy: Path, monkeypatch, folder: Path, **options) -> None:
    """An append that ends when its shards are there and the manifest is not."""
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.shards.pack.bind", lambda *_, **__: None)
        assert quietly(folder, copy / "out", mode="append", **options) is None


def test_an_append_that_was_stopped_goes_on_also_when_more_inputs_came(copy, monkeypatch):
    folder = write_pictures(copy / "new", "xyz")
    stop_before_binding(copy, monkeypatch, folder, num_tasks=2)
    assert load_manifest(copy / "out").sources() == [f"{name}.png" for name in "abcde"]
    write_pictures(folder, "w")
    with pytest.raises(DataPipelineError, match="another --append that was stopped"):
        quietly(folder, copy / "out", mode="append", num_tasks=2)
    manifest = quietly(folder, copy / "out", mode="append")
    assert sorted(manifest.sources()) == [f"{name}.png" for name in "abcdewxyz"]
    assert verify(manifest) == []


def test_jobs_of_an_array_append_one_after_the_other(copy, monkeypatch):
    folder = write_pictures(copy / "new", "vwxyz")
    assert quietly(folder, copy / "out", mode="append", task_id=1, num_tasks=2) is None
    manifest = quietly(folder, copy / "out", mode="append", task_id=0, num_tasks=2)
    assert manifest.sources() == [f"{name}.png" for name in "abcdevwxyz"]
    again = quietly(folder, copy / "out", mode="append", task_id=1, num_tasks=2)
    assert again.sha256 == manifest.sha256


# --replace


def test_replacing_removes_the_packers_own_files_and_no_other(copy):
    kept = {"notes.json": "{}", "video-7.tar": "x", "video-000000.txt": "x", "clip.mp4": "x"}
    for name, text in kept.items():
        (copy / "out" / name).write_text(text)
    folder = write_pictures(copy / "other", "xy")
    manifest = quietly(folder, copy / "out", mode="replace")
    assert manifest.sources() == ["x.png", "y.png"]
    assert {path.name for path in (copy / "out").iterdir()} == {
        *kept,
        "manifest.json",
        *(f"video-000000{suffix}" for suffix in (".tar", ".tar.idx", ".json")),
    }


def test_replacing_by_the_same_packing_removes_nothing(copy):
    before = contents(copy / "out")
    quietly(copy / "in", copy / "out", mode="replace")
    assert contents(copy / "out") == before


def test_no_manifest_names_missing_shards_while_they_are_replaced(copy, monkeypatch):
    """The removal stops after every file once, as a kill would stop it."""
    folder = write_pictures(copy / "other", "xy")
    unlink = Path.unlink
    for files in range(1, 12):
        shutil.rmtree(copy / "try", ignore_errors=True)
        shutil.copytree(copy / "out", copy / "try")
        left = [files]

        def stopping(path, left=left, **options):
            if path.suffix != ".lock":
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            unlink(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", stopping)
            try:
                plan_packing(list_inputs([folder]), copy / "try", CONFIG, 1, "replace", [].append)
            except KeyboardInterrupt:
                pass
        with pytest.raises(MissingData):
            load_manifest(copy / "try")
    manifest = quietly(folder, copy / "try", mode="replace")
    assert verify(manifest) == []


@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_manifest_cannot_name_files_elsewhere(copy, is_sealed):
    outside = copy / "video-000009"
    for suffix in (".tar", ".tar.idx", ".json"):
        shutil.copy(copy / "out" / f"video-000000{suffix}", f"{outside}{suffix}")
    path = copy / "out" / "manifest.json"
    content = json.loads(path.read_bytes())
    del content["digest"]
    content["shards"][0]["name"] = "../video-000009"
    if is_sealed:
        write_json(path, content)
    else:
        path.write_text(json.dumps({**content, "schema_version": 1}, indent=1, sort_keys=True))
    with pytest.raises(CorruptShard, match=r"'\.\./video-000009' leads out of the folder"):
        load_manifest(copy / "out")
    said = []
    pack(list_inputs([copy / "in"]), copy / "out", CONFIG, report=said.append)
    assert "leads out of the folder" in said[0] and "written anew" in said[0]
    assert verify(load_manifest(copy / "out")) == []
    assert len(list(copy.glob("video-000009*"))) == 3


def test_jobs_of_an_array_that_replace_do_not_remove_each_others_shards(copy):
    folder = write_pictures(copy / "other", "uvwxyz")
    command = [sys.executable, "-m", "data_pipeline", "pack", folder, "--output", copy / "out"]
    command += [*FLAGS, "--samples-per-shard", "2", "--replace", "--num-tasks", "2", "--task-id"]
    jobs = [subprocess.Popen([*command, str(job)], cwd=ROOT) for job in (0, 1)]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    manifest = load_manifest(copy / "out")
    assert manifest.sources() == [f"{name}.png" for name in "uvwxyz"]
    assert verify(manifest) == []


# labels


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_labels_that_no_longer_fit_are_named(copy, mode, capsys):
    old = load_manifest(copy / "out")
    save_labels(copy / "out", np.zeros((len(old), 1), np.int32), old, 1, {"centroids_sha256": ""})
    folder = write_pictures(copy / "other", "xy")
    main(["pack", str(folder), "--output", str(copy / "out"), *FLAGS, f"--{mode}"])
    said = capsys.readouterr().out
    assert f"{copy / 'out' / 'labels.npy'} is stale" in said
    command = f"python -m data_pipeline label {copy / 'out'} --centroids CENTROIDS"
    assert command in said
    with pytest.raises(CorruptShard, match="stale") as error:
        load_labels(copy / "out", load_manifest(copy / "out"))
    assert command in str(error.value)


# progress and signals


def test_progress_counts_the_whole_run_with_its_rate_and_time_left():
    now = [0.0]
    progress = PackProgress(total=1000, terminal=False, clock=lambda: now[0], every=3600.0)
    with progress:
        assert progress.line() == "0 of 1000 inputs done (0%), 0 rejected"
        progress.skipped(200)
        progress.packed(count=100, rejected=3)
        now[0] = 50.0
        line = "300 of 1000 inputs done (30%), 3 rejected, 2.00 inputs/s, 6 min left"
        assert progress.line() == line


def test_progress_is_reported_while_one_input_takes_long():
    lines, enough = [], threading.Event()

    def report(line):
        lines.append(line)
        if len(lines) == 3:
            enough.set()

    with PackProgress(total=4, report=report, terminal=False, every=0.01) as progress:
        progress.packed(count=1, rejected=0)
        assert enough.wait(60)
    assert all(line.startswith("1 of 4 inputs done (25%)") for line in lines[1:])


def test_a_bar_shows_the_whole_run_on_a_terminal(capsys):
    lines = []
    with PackProgress(total=40, report=lines.append, terminal=True) as progress:
        progress.skipped(16)
        progress.packed(count=4, rejected=1)
        progress.report("packed shard 1/3")
        progress.warn("rejected x.png")
    assert lines == ["packed shard 1/3"]
    shown = capsys.readouterr().err
    assert "rejected x.png\n" in shown and "20/40" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_one_line_and_the_same_command_goes_on(copy, number):
    """It is sent to the whole group, as terminals and schedulers do: workers say nothing."""
    folder = write_pictures(copy / "other", "abcdefghijklmnopqrstuvwxyz")
    command = ["-m", "data_pipeline", "pack", folder, "--output", copy / "out2", *FLAGS]
    command += ["--samples-per-shard", "1"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert "packed shard 1/26" in process.stdout.readline()
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    kept = "what is finished is kept, run the same command again to go on"
    assert errors.splitlines() == [f"stopped by {name}: {kept}"]
    shard = (copy / "out2" / "video-000000.tar").stat().st_mtime_ns
    manifest = quietly(folder, copy / "out2", replace(CONFIG, samples_per_shard=1))
    assert (copy / "out2" / "video-000000.tar").stat().st_mtime_ns == shard
    assert verify(manifest) == []


# what a user is told


def test_a_folder_of_videos_given_as_shards_gets_commands_that_work(five, tmp_path):
    folder = tmp_path / "my videos"
    shutil.copytree(five / "in", folder)
    with pytest.raises(MissingData) as error:
        load_manifest(folder)
    lines = [line.strip() for line in str(error.value).splitlines() if "python -m" in line]
    assert [line.split()[3] for line in lines] == ["pack", "cluster", "label"]
    subprocess.run(
        ["bash", "-c", f"{lines[0].replace('python', sys.executable, 1)} {' '.join(FLAGS)}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert len(load_manifest(tmp_path / "my videos_packed")) == 5
    assert sorted(folder.iterdir()) == sorted(folder.glob("*.png"))


def pack_arguments(*words: str):
    return build_parser().parse_args(["pack", "INPUT", "--output", "OUT", *words])


@pytest.mark.parametrize(
    "words, shape",
    [
        ([], (224, 16)),
        (["--size", "112", "--patch-size", "14"], (112, 14)),
        (["--model", "llava_vit_large_ln"], (224, 14)),
        (["--model", "llava_vit_tiny_ln", "--size", "112"], (112, 16)),
        (["--model", "ov_encoder_base", "--patch-size", "14"], (224, 14)),
    ],
)
def test_a_model_names_the_patch_size_that_its_weights_take(words, shape):
    assert commands.picture_shape(pack_arguments(*words)) == shape


def test_a_patch_size_that_the_model_does_not_take_is_refused_before_anything_is_packed():
    with pytest.raises(ValueError, match="--patch-size 16 is not llava_vit_large_ln's.*takes 14"):
        commands.pack(pack_arguments("--model", "llava_vit_large_ln", "--patch-size", "16"))
    with pytest.raises(ValueError, match="unknown model 'llava_large'.*llava_vit_large_ln"):
        commands.pack(pack_arguments("--model", "llava_large"))


def test_shards_of_another_patch_size_get_the_command_that_packs_for_the_model():
    message = other_patch_size(
        dataset="data/my shards", packed=16, model="llava_vit_large_ln", wanted=14
    )
    command = message.split("`")[1]
    args = build_parser().parse_args(shlex.split(command)[3:])
    assert args.output == Path("data/my shards_patch14")
    assert commands.picture_shape(args)[1] == 14


def test_a_folder_whose_packing_was_stopped_says_so(copy):
    (copy / "out" / "manifest.json").unlink()
    with pytest.raises(MissingData, match="packing that was stopped"):
        load_manifest(copy / "out")


def test_a_foreign_tar_in_a_members_names_is_told_from_ours(tmp_path, five):
    from data_pipeline.shards.existing import tar_sources

    assert tar_sources(five / "out" / "video-000000.tar") == ["a.png", "b.png"]
    with tarfile.open(tmp_path / "video-000000.tar", "w") as archive:
        archive.add(five / "in" / "a.png", "000000.png")
    assert tar_sources(tmp_path / "video-000000.tar") is None
