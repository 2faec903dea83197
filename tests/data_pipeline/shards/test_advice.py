"""What an error advises is done here, word for word, and then the work goes on."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from older_folders import unseal
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.clustering.features import load_features
from data_pipeline.clustering.labels import load_labels, save_labels
from data_pipeline.clustering.pipeline import ClusterConfig, cluster, label
from data_pipeline.clustering.progress import SavedProgress
from data_pipeline.embedded.clips import check_settings
from data_pipeline.errors import CorruptShard, DataPipelineError, MissingData
from data_pipeline.loading.choices import SampleTable
from data_pipeline.loading.shard_reader import ShardReader
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig
from data_pipeline.shards.verify import verify
from data_pipeline.verify_folder import verify_folder
from model_factory.files import read_json, write_json

CONFIG = PackConfig(SampleConfig(size=32, gop=64, budget=64), samples_per_shard=3, workers=1)


def quietly(source: Path, output: Path, config: PackConfig = CONFIG, **options):
    return pack(list_inputs([source]), output, config, report=lambda line: None, **options)


def write_picture(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Five pictures in/, `my data`/ (their two shards, labelled), centroids/ with features/."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "in").mkdir()
    for number in range(5):
        write_picture(folder / "in" / f"{number}.png", seed=number)
    manifest = quietly(folder / "in", folder / "my data")
    cluster(manifest, ClusterConfig(3), folder / "centroids")
    label(manifest, folder / "centroids", 2, folder / "my data")
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def commands_of(error: pytest.ExceptionInfo, **names: object) -> list[str]:
    """The commands in a message, with the words that stand for what the user knows filled in."""
    found = re.findall(r"`python -m data_pipeline ([^`]*)`", str(error.value))
    filled = []
    for command in found:
        for name, value in names.items():
            command = re.sub(rf"\b{name}\b", shlex.quote(str(value)), command)
        filled.append(command)
    assert filled, f"no command in: {error.value}"
    return filled


def outcome(*words: str) -> int:
    """Exit code of a command."""
    try:
        return main(list(words)) or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def carry_out(commands: list[str]) -> None:
    for command in commands:
        assert outcome(*shlex.split(command)) == 0, command


def remove_named(error: pytest.ExceptionInfo, folder: Path) -> None:
    """Remove the file or folder that a message says to remove."""
    said = str(error.value)
    found = re.search(r"remove (\S+\.json|/.*?) and run", said)
    path = Path(said.split(" ")[0].rstrip(":")) if found is None else folder / found[1]
    assert path.exists(), f"{path} of: {said}"
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def data(copy: Path) -> Path:
    return copy / "my data"


# labels


def test_labels_that_are_not_there_come_by_the_two_commands(copy):
    (data(copy) / "labels.json").unlink()
    with pytest.raises(MissingData) as error:
        load_labels(data(copy), load_manifest(data(copy)))
    carry_out(commands_of(error, K=3, CENTROIDS=copy / "new centroids"))
    assert load_labels(data(copy), load_manifest(data(copy)))[1] == 3


@pytest.mark.parametrize("fault", ["stale", "changed record", "changed array", "no digest"])
def test_labels_that_are_not_as_written_come_again_by_the_command(copy, fault):
    want, _ = load_labels(data(copy), load_manifest(data(copy)))
    path = data(copy) / "labels.json"
    if fault == "stale":
        write_json(path, {**read_json(path, {}), "manifest_sha256": "0" * 64})
    elif fault == "changed record":
        path.write_bytes(path.read_bytes().replace(b"3", b"4", 1))
    elif fault == "no digest":
        record = read_json(path, {})
        path.write_text(json.dumps(record))
    else:
        np.save(data(copy) / "labels.npy", want[::-1])
    with pytest.raises(CorruptShard) as error:
        load_labels(data(copy), load_manifest(data(copy)))
    carry_out(commands_of(error, CENTROIDS=copy / "centroids"))
    found, _ = load_labels(data(copy), load_manifest(data(copy)))
    assert np.array_equal(found[:, :2], want)
    assert found.shape == want.shape or fault in ("changed record", "no digest")


def test_labels_from_outside_come_again_from_outside_into_the_same_folder(copy):
    manifest = load_manifest(data(copy))
    rows = np.array([[4], [3], [2], [1], [0]], np.int32)
    save_labels(copy / "words", rows, manifest, 5, {"imported": "words.npy"})
    np.save(copy / "words.npy", rows)
    np.save(copy / "words" / "labels.npy", rows[::-1])
    with pytest.raises(CorruptShard) as error:
        load_labels(copy / "words", manifest)
    carry_out(commands_of(error, LABELS=copy / "words.npy"))
    found, num_classes = load_labels(copy / "words", manifest)
    assert num_classes == 5 and np.array_equal(found, rows)


# centroids, features


@pytest.mark.parametrize("name", ["clusters.json", "centroids.npy"])
def test_damaged_centroids_come_again_by_the_command(copy, name):
    path = copy / "centroids" / name
    want = (copy / "centroids" / "centroids.npy").read_bytes()
    path.write_bytes(path.read_bytes()[:-5] + b"12345")
    with pytest.raises(CorruptShard) as error:
        label(load_manifest(data(copy)), copy / "centroids", 2, data(copy))
    carry_out(commands_of(error, K=3, DIR=data(copy)))
    label(load_manifest(data(copy)), copy / "centroids", 2, data(copy))
    assert (copy / "centroids" / "centroids.npy").read_bytes() == want


def test_centroids_that_are_not_there_come_by_the_command(copy):
    with pytest.raises(MissingData) as error:
        label(load_manifest(data(copy)), copy / "others", 2, data(copy))
    carry_out(commands_of(error, K=3, DIR=data(copy)))
    label(load_manifest(data(copy)), copy / "others", 2, data(copy))


@pytest.mark.parametrize("name", ["features.json", "video-000001.json", "video-000001.npy"])
def test_damaged_vectors_are_removed_and_come_again_by_the_command_that_made_them(copy, name):
    folder = copy / "centroids" / "features"
    manifest = load_manifest(data(copy))
    want, _ = load_features(manifest, folder)
    kept = (folder / "video-000000.npy").stat().st_mtime_ns
    path = folder / name
    path.write_bytes(path.read_bytes()[:-5] + b"12345")
    with pytest.raises(CorruptShard, match="remove it and run the command that made it") as error:
        load_features(manifest, folder)
    remove_named(error, folder)
    cluster(manifest, ClusterConfig(3), copy / "centroids")
    assert np.array_equal(load_features(manifest, folder)[0], want)
    assert (folder / "video-000000.npy").stat().st_mtime_ns == kept


def test_vectors_that_are_not_there_come_by_the_command(copy):
    manifest = load_manifest(data(copy))
    with pytest.raises(MissingData) as error:
        load_features(manifest, copy / "my vectors")
    carry_out(commands_of(error))
    assert len(load_features(manifest, copy / "my vectors")[0]) == 5
    (copy / "my vectors" / "video-000001.json").unlink()
    with pytest.raises(MissingData, match="run the `features` command of that folder again"):
        load_features(manifest, copy / "my vectors")
    carry_out(commands_of(error))
    assert len(load_features(manifest, copy / "my vectors")[0]) == 5


def test_vectors_of_something_else_give_way_to_another_folder_or_a_removed_one(copy):
    (data(copy) / "video-000001.json").unlink()
    write_picture(copy / "in" / "9.png", seed=9)
    other = quietly(copy / "in", copy / "other")
    for folder in (copy / "centroids", copy / "centroids again"):
        if folder.exists():
            with pytest.raises(DataPipelineError, match="name another folder, or remove it"):
                cluster(other, ClusterConfig(3), folder)
            shutil.rmtree(folder / "features")
        cluster(other, ClusterConfig(3), folder)


def test_damaged_progress_is_removed_and_the_same_command_starts_anew(copy):
    manifest = load_manifest(data(copy))
    SavedProgress(copy / "centroids", {}).save(np.eye(3, dtype=np.float32), 5)
    path = copy / "centroids" / "partial" / "record.json"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptShard) as error:
        cluster(manifest, ClusterConfig(3), copy / "centroids")
    remove_named(error, copy)
    cluster(manifest, ClusterConfig(3), copy / "centroids")


def test_fewer_centroids_than_asked_for_are_found(copy):
    manifest = load_manifest(data(copy))
    with pytest.raises(DataPipelineError, match="holds 5 samples: ask for fewer"):
        cluster(manifest, ClusterConfig(6), copy / "many")
    cluster(manifest, ClusterConfig(5), copy / "many")


def test_shards_of_another_patch_size_are_packed_for_the_encoder(copy):
    from model_factory.vit_preview_v0_packing_hf import (
        LlavaViTPackingConfig,
        LlavaViTPackingModel,
    )

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
    encoder = LlavaViTPackingModel(
        LlavaViTPackingConfig(num_hidden_layers=1, patch_size=8, **sizes)
    )
    encoder.save_pretrained(copy / "encoder")
    flags = ["--encoder", str(copy / "encoder"), "--output", str(copy / "vectors")]
    assert outcome("features", str(data(copy)), *flags) == 1
    from data_pipeline.clustering.feature_sources import FeatureConfig, source_of

    with pytest.raises(DataPipelineError, match="takes patches of 8") as error:
        source_of(load_manifest(data(copy)), FeatureConfig(str(copy / "encoder")))
    (flag,) = re.findall(r"pack again with (--patch-size \d+) into another", str(error.value))
    command = ["pack", str(copy / "in"), "--output", str(copy / "patch8"), "--size", "32"]
    assert outcome(*command, *flag.split(), "--workers", "1", "--full-frames", "4") == 0
    flags[-1] = str(copy / "vectors8")
    assert outcome("features", str(copy / "patch8"), *flags) == 0
    assert len(load_features(load_manifest(copy / "patch8"), copy / "vectors8")[0]) == 5


# shards


@pytest.mark.parametrize("fault", ["no tar", "cut tar", "record", "manifest", "no manifest"])
def test_the_same_pack_command_mends_a_folder(copy, fault):
    folder = data(copy)
    sha256 = load_manifest(folder).sha256
    if fault == "no tar":
        (folder / "video-000000.tar").unlink()
    elif fault == "cut tar":
        tar = folder / "video-000000.tar"
        tar.write_bytes(tar.read_bytes()[:-512])
    elif fault == "record":
        shutil.copy(folder / "video-000000.json", folder / "video-000001.json")
    elif fault == "manifest":
        path = folder / "manifest.json"
        path.write_bytes(path.read_bytes().replace(b'"num_samples": 5', b'"num_samples": 6'))
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(DataPipelineError, match="`(python -m data_pipeline )?pack` command"):
        load_manifest(folder)
    manifest = quietly(copy / "in", folder)
    assert manifest.sha256 == sha256 and verify(manifest) == []


def test_a_folder_without_shards_is_made_by_the_command(copy):
    with pytest.raises(MissingData) as error:
        load_manifest(copy / "new data")
    (command,) = commands_of(error, INPUT=copy / "in")
    carry_out([f"{command} --size 32 --gop 64 --budget 64 --workers 1"])
    assert len(load_manifest(copy / "new data")) == 5


def test_a_damaged_member_is_found_by_verify_and_its_shard_packed_again(copy):
    folder = data(copy)
    place = load_manifest(folder).member(3, "jpg")
    content = bytearray(place.path.read_bytes())
    content[place.offset + 9] ^= 1
    place.path.write_bytes(content)
    with ShardReader(load_manifest(folder)) as reader, pytest.raises(CorruptShard) as error:
        reader.read(3, "jpg")
    (command,) = commands_of(error)
    assert outcome(*shlex.split(command)) == 1
    assert "pack that shard again" in str(error.value)
    remove_named(error, folder)
    assert verify(quietly(copy / "in", folder)) == []


@pytest.mark.parametrize("change", [{"num_patches": 0}, {"num_stored_frames": None}])
def test_a_record_that_lies_is_removed_and_its_shard_packed_again(copy, change):
    """The packer believes a record that fits its tar, so --replace would keep it."""
    folder = data(copy)
    unseal(folder)
    path = folder / "video-000001.json"
    record = json.loads(path.read_bytes())
    for key, value in change.items():
        record["samples"][0][key] = value
        if value is None:
            del record["samples"][0][key]
    path.write_text(json.dumps(record, sort_keys=True))
    unseal_again(folder)
    with pytest.raises(CorruptShard, match="pack that shard again") as error:
        SampleTable.of(load_manifest(folder))
    remove_named(error, folder)
    SampleTable.of(quietly(copy / "in", folder))


def unseal_again(folder: Path) -> None:
    """Bind records of before as they are now."""
    for path in folder.glob("video-*.json"):
        record = json.loads(path.read_bytes())
        path.write_text(json.dumps({**record, "digest": ""}, sort_keys=True))
    unseal(folder)


def test_a_manifest_without_a_patch_size_is_replaced(copy):
    path = data(copy) / "manifest.json"
    manifest = read_json(path, {})
    del manifest["settings"]["patch_size"]
    write_json(path, manifest)
    with pytest.raises(CorruptShard, match="run its `pack` command with --replace"):
        load_manifest(data(copy))
    assert verify(quietly(copy / "in", data(copy), mode="replace")) == []


def test_another_packing_is_appended_replaces_or_goes_elsewhere(copy):
    write_picture(copy / "in" / "9.png", seed=9)
    for way in ("append", "replace", "another"):
        folder = copy / way
        shutil.copytree(data(copy), folder)
        with pytest.raises(DataPipelineError, match="--append.*--replace.*another --output"):
            quietly(copy / "in", folder)
        if way == "another":
            manifest = quietly(copy / "in", copy / "elsewhere")
        else:
            manifest = quietly(copy / "in", folder, mode=way)
        assert len(manifest) == 6 and verify(manifest) == []


@pytest.mark.parametrize("name", ["manifest.json", "video-000000.tar"])
def test_a_file_of_somebody_else_is_moved_away_or_another_output_named(copy, name):
    folder = copy / "theirs"
    folder.mkdir()
    (folder / name).write_text('{"theirs": 1}')
    with pytest.raises(DataPipelineError, match="name another --output, or move that file away"):
        quietly(copy / "in", folder)
    quietly(copy / "in", copy / "another")
    (folder / name).rename(copy / "moved away")
    assert verify(quietly(copy / "in", folder)) == []


def stopped_append(copy: Path) -> None:
    """An --append of two pictures that ends after its first shard."""
    before = (data(copy) / "manifest.json").read_bytes()
    for number in (8, 9):
        write_picture(copy / "in" / f"{number}.png", seed=number)
    config = replace(CONFIG, samples_per_shard=1)
    quietly(copy / "in", data(copy), config, mode="append")
    (data(copy) / "manifest.json").write_bytes(before)
    for path in data(copy).glob("video-000003.*"):
        path.unlink()
    (copy / "new").mkdir()
    for number in (8, 9):
        (copy / "in" / f"{number}.png").rename(copy / "new" / f"{number}.png")


@pytest.mark.parametrize("way", ["append", "replace"])
def test_an_append_that_was_stopped_is_finished_or_removed(copy, way):
    stopped_append(copy)
    said: list[str] = []
    pack(list_inputs([copy / "in"]), data(copy), CONFIG, report=said.append)
    assert any("the same --append finishes it, --replace removes them" in line for line in said)
    if way == "append":
        config = replace(CONFIG, samples_per_shard=1)
        manifest = quietly(copy / "new", data(copy), config, mode="append")
        assert len(manifest) == 7
    else:
        manifest = quietly(copy / "in", data(copy), mode="replace")
        assert len(manifest) == 5
    assert verify_shards_only(manifest)


def verify_shards_only(manifest) -> bool:
    """Nothing is wrong, and no shard lies beside those of the manifest."""
    tars = {path.stem for path in manifest.directory.glob("*.tar")}
    return verify(manifest) == [] and tars == {shard["name"] for shard in manifest.shards}


def test_a_broken_shard_of_a_stopped_append_is_removed_and_it_starts_again(copy):
    stopped_append(copy)
    tar = data(copy) / "video-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    write_picture(copy / "new" / "7.png", seed=7)
    with pytest.raises(DataPipelineError, match="and start again") as error:
        quietly(copy / "new", data(copy), mode="append")
    (name,) = re.findall(r"remove (\S+\.json), and start again", str(error.value))
    (data(copy) / name).unlink()
    manifest = quietly(copy / "new", data(copy), mode="append")
    assert len(manifest) == 8 and verify_shards_only(manifest)


def test_what_verify_says_to_move_away_is_moved_away(copy):
    (data(copy) / "other.npy").write_bytes(b"")
    (problem,) = verify_folder(data(copy)).problems
    name = re.match(r"(\S+): no record names this file; move it away", problem)[1]
    (data(copy) / name).rename(copy / name)
    assert verify_folder(data(copy)).problems == []


def test_samples_of_one_name_are_named_apart_by_packing_again(copy):
    from data_pipeline.lists import ids_of_sources

    manifest = load_manifest(data(copy))
    shard = dict(manifest.shards[0])
    shard["samples"] = [dict(sample, source="0.png") for sample in shard["samples"]]
    with pytest.raises(DataPipelineError, match="pack the inputs again, which names them apart"):
        ids_of_sources(replace(manifest, shards=(shard,)))
    shutil.copytree(copy / "in", copy / "others")
    write_picture(copy / "others" / "0.png", seed=33)
    both = list_inputs([copy / "in", copy / "others"], report=lambda line: None)
    assert len(ids_of_sources(pack(both, copy / "both", CONFIG, report=lambda line: None))) == 10


def test_clips_of_other_settings_are_deleted_or_written_elsewhere(tmp_path):
    (tmp_path / "a").mkdir()
    check_settings(tmp_path / "a" / "settings.json", [1], "number")
    with pytest.raises(ValueError, match="delete the folder or take another"):
        check_settings(tmp_path / "a" / "settings.json", [2], "number")
    (tmp_path / "b").mkdir()
    check_settings(tmp_path / "b" / "settings.json", [2], "number")


@pytest.mark.parametrize(
    ("given", "said", "change"),
    [
        ({"gop": 4}, "raise --budget or --gop", {"budget": 3136}),
        ({"gop": 4}, "raise --budget or --gop", {"gop": 16}),
        ({"gop": 4, "budget": 800}, "lower --size", {"size": 112}),
        ({"size": 1024, "num_full_frames": 64}, "lower --full-frames or", {"num_full_frames": 16}),
        ({"size": 1024, "num_full_frames": 64}, "or --size", {"size": 512}),
    ],
)
def test_settings_that_cannot_work_work_as_advised(given, said, change):
    with pytest.raises(ValueError, match=said):
        SampleConfig(**given)
    SampleConfig(**{**given, **change})
