"""What is written beside the shards is bound: no changed byte and no hand-made value is believed,
`verify` covers it all, and what was packed before or moved since is as good as ever.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from older_folders import unseal
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.clustering.feature_sources import FeatureConfig
from data_pipeline.clustering.features import extract, load_features
from data_pipeline.clustering.kmeans import load_centroids
from data_pipeline.clustering.labels import load_labels, save_labels
from data_pipeline.clustering.pipeline import ClusterConfig, cluster, label
from data_pipeline.clustering.progress import SavedProgress
from data_pipeline.datasets import recluster, relabelled, resolve_dataset, start_centers
from data_pipeline.embedded.clips import check_settings
from data_pipeline.errors import CorruptShard, DataPipelineError, MissingData
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig
from data_pipeline.shards.verify import verify
from data_pipeline.side_files import array_bytes, read_array, write_array
from data_pipeline.verify_folder import verify_folder
from model_factory.files import (
    OWN_LISTING,
    DamagedFile,
    file_sha256,
    read_json,
    write_checksums,
    write_json,
)

CONFIG = PackConfig(SampleConfig(size=32, gop=64, budget=64), samples_per_shard=3, workers=1)


def quietly(source: Path, output: Path, **options):
    return pack(list_inputs([source]), output, CONFIG, report=lambda line: None, **options)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Five pictures in/, data/ (their two shards, labelled), centroids/ with features/."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        noise = rng.integers(40 * number, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "in" / f"{number}.png")
    manifest = quietly(folder / "in", folder / "data")
    cluster(manifest, ClusterConfig(3, pca=4), folder / "centroids")
    label(manifest, folder / "centroids", 2, folder / "data")
    return folder


@pytest.fixture
def copy(labelled, tmp_path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(labelled, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(path: Path, **changes) -> None:
    """Other values in a sealed file, sealed again: by hand, or by a program that errs."""
    write_json(path, {**read_json(path, {}), **changes})


READERS: dict[str, Callable[[Path], object]] = {
    "data/manifest.json": lambda folder: load_manifest(folder / "data"),
    "data/video-000001.json": lambda folder: load_manifest(folder / "data"),
    "data/labels.json": lambda folder: load_labels(folder / "data", load_manifest(folder / "data")),
    "centroids/clusters.json": lambda folder: load_centroids(folder / "centroids"),
    "centroids/features/features.json": lambda folder: load_features(
        load_manifest(folder / "data"), folder / "centroids" / "features"
    ),
    "centroids/features/video-000000.json": lambda folder: load_features(
        load_manifest(folder / "data"), folder / "centroids" / "features"
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_any_changed_byte_of_a_record_is_named(copy, name):
    path, read = copy / name, READERS[name]
    read(copy)
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.permutation(len(original))[:200]:
        damaged = bytearray(original)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(CorruptShard, match=path.name):
            read(copy)


def test_any_changed_byte_of_the_record_of_progress_is_named(tmp_path):
    SavedProgress(tmp_path, {"seed": 1}).save(np.eye(3, dtype=np.float32), 5)
    path = tmp_path / "partial" / "record.json"
    original = path.read_bytes()
    for place in range(len(original)):
        damaged = bytearray(original)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CorruptShard, match=r"record\.json.* remove .*partial and run the same"):
            SavedProgress(tmp_path, {"seed": 1})
    path.write_bytes(original)
    assert SavedProgress(tmp_path, {"seed": 1}).centroids()[1] == 5


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("data/labels.json", {"num_classes": 0}, "num_classes is 0"),
        ("data/labels.json", {"num_classes": True}, "num_classes"),
        ("data/labels.json", {"num_labels": -1}, "num_labels is -1"),
        ("data/labels.json", {"num_labels": 3}, r"labels\.npy has shape \[5, 2\]"),
        ("data/labels.json", {"num_classes": 1}, "ids below 1"),
        ("centroids/clusters.json", {"feature_mean": [0.5]}, r"feature_mean is not \d+ finite"),
        ("centroids/clusters.json", {"feature_mean": "x"}, r"feature_mean is not \d+ finite"),
        ("centroids/clusters.json", {"num_centroids": 4}, r"shape \[3, 4\], expected \[4, 4\]"),
        ("centroids/clusters.json", {"dim": 5}, "expected"),
        ("centroids/clusters.json", {"files": {"../x.npy": "0"}}, "binds '../x.npy'"),
        ("centroids/clusters.json", {"files": {}}, "binds"),
        ("centroids/clusters.json", {"sha256": "0"}, "binds"),
        ("centroids/features/features.json", {"config": {"encoder": 3}}, "'encoder' is 3"),
        ("centroids/features/video-000000.json", {"rows": 2}, "is not done|video-000000"),
    ],
)
def test_values_that_cannot_be_are_named_also_in_a_sealed_record(copy, name, changes, said):
    rewrite(copy / name, **changes)
    with pytest.raises(DataPipelineError, match=said):
        READERS[name](copy)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((5, 2), np.float64), "holds <f8"),
        (np.zeros((5, 2), np.int32), "holds <i4"),
        (np.zeros(10, np.float32), r"has shape \[10\], expected \[any, 2\]"),
        (np.zeros((0, 2), np.float32), r"has shape \[0, 2\]"),
        (np.zeros((5, 3), np.float32), r"has shape \[5, 3\]"),
        (np.array([[1, np.nan]], np.float32), "not finite"),
        (np.array([[1, -np.inf]], np.float32), "not finite"),
    ],
)
def test_an_array_that_cannot_be_is_named_although_its_hash_is_right(tmp_path, array, said):
    path = tmp_path / "a.npy"
    write_array(path, array)
    with pytest.raises(CorruptShard, match=rf"a\.npy.*{said}.*make it again"):
        read_array(path, file_sha256(path), np.float32, (None, 2), "make it again")


def test_arrays_are_read_as_written_in_either_order_of_memory(tmp_path):
    wanted = np.arange(6, dtype=np.float32).reshape(2, 3)
    for array in (wanted, np.asfortranarray(wanted)):
        write_array(tmp_path / "a.npy", array)
        sha256 = file_sha256(tmp_path / "a.npy")
        found = read_array(tmp_path / "a.npy", sha256, np.float32, (2, 3), "again")
        assert np.array_equal(found, wanted) and found.flags.writeable
    with pytest.raises(CorruptShard, match="changed since it was written.*again"):
        read_array(tmp_path / "a.npy", "0" * 64, np.float32, (2, 3), "again")
    with pytest.raises(CorruptShard, match="is missing: again"):
        read_array(tmp_path / "b.npy", "0" * 64, np.float32, (2, 3), "again")


@pytest.mark.parametrize(
    ("record", "array", "wrong"),
    [
        ("data/labels.json", "labels.npy", np.zeros(5, np.int32)),
        ("data/labels.json", "labels.npy", np.zeros((5, 2), np.int64)),
        ("centroids/clusters.json", "centroids.npy", np.full((3, 4), np.nan, np.float32)),
        ("centroids/clusters.json", "components.npy", np.zeros(4, np.float32)),
        ("centroids/features/video-000000.json", "video-000000.npy", np.ones(3, np.float32)),
        ("centroids/features/video-000001.json", "video-000001.npy", np.ones((2, 9), np.float32)),
    ],
)
def test_every_reader_of_arrays_checks_them(copy, record, array, wrong):
    path = copy / record
    write_array(path.parent / array, wrong)
    sha256 = file_sha256(path.parent / array)
    changes: dict = {"sha256": sha256} if array != "components.npy" else {}
    if "files" in (before := read_json(path, {})):
        changes["files"] = {**before["files"], array: sha256}
    rewrite(path, **changes)
    with pytest.raises(CorruptShard, match=array.replace(".", r"\.")):
        READERS.get(record, READERS["centroids/features/video-000000.json"])(copy)


def test_saved_centroids_that_are_not_finite_are_named(tmp_path):
    SavedProgress(tmp_path, {}).save(np.full((2, 3), np.nan, np.float32), 5)
    with pytest.raises(CorruptShard, match=r"centroids\.npy holds numbers that are not finite"):
        SavedProgress(tmp_path, {}).centroids()


def test_settings_of_clips_are_bound_and_those_of_before_are_read(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('[1, "easy"]')
    check_settings(path, [1, "easy"], "names")
    assert read_json(path, {"settings": list}) == {"settings": [1, "easy"]}
    with pytest.raises(ValueError, match="other settings .*hard"):
        check_settings(path, [1, "hard"], "names")
    path.write_bytes(path.read_bytes().replace(b"easy", b"eazy"))
    with pytest.raises(ValueError, match="changed since it was written.*delete the folder"):
        check_settings(path, [1, "easy"], "names")


def test_starting_centres_are_those_that_were_found(copy):
    path = copy / "centroids" / "centroids.npy"
    want = np.load(path)
    assert np.array_equal(start_centers(path), want)
    np.save(path, want[::-1])
    with pytest.raises(CorruptShard, match="centroids.npy changed since it was written"):
        start_centers(path)
    np.save(copy / "mine.npy", want)
    assert np.array_equal(start_centers(copy / "mine.npy"), want)
    for wrong in (b"", b"no array", array_bytes(np.zeros(3, np.float32))):
        (copy / "mine.npy").write_bytes(wrong)
        with pytest.raises(DataPipelineError, match="mine.npy"):
            start_centers(copy / "mine.npy")


def test_starting_centres_that_a_round_left_are_bound_by_the_sha256_beside_them(tmp_path):
    path = tmp_path / "head.npy"
    write_array(path, np.ones((3, 4), np.float32))
    write_checksums(tmp_path, [path.name], listing=f"{path.name}{OWN_LISTING}")
    assert start_centers(path).shape == (3, 4)
    write_array(path, np.zeros((3, 4), np.float32))
    with pytest.raises(DamagedFile, match=r"head\.npy changed"):
        start_centers(path)


def test_labels_of_a_round_that_are_damaged_are_made_again_and_said(copy):
    from model_factory.vit_preview_v0_packing_hf import (
        LlavaViTPackingConfig,
        LlavaViTPackingModel,
    )

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
    config = LlavaViTPackingConfig(num_hidden_layers=1, patch_size=16, **sizes)
    LlavaViTPackingModel(config).save_pretrained(copy / "encoder")
    dataset = resolve_dataset(str(copy / "data")).load()
    said: list[str] = []
    recluster(dataset, copy / "encoder", copy / "round", said.append)
    want = relabelled(dataset, copy / "round").labels
    before = len(said)
    recluster(dataset, copy / "encoder", copy / "round", said.append)
    assert len(said) == before, "labels that are there are kept"
    (copy / "round" / "labels.npy").write_bytes(b"")
    recluster(dataset, copy / "encoder", copy / "round", said.append)
    assert "labels.npy changed since it was written" in said[before]
    assert np.array_equal(relabelled(dataset, copy / "round").labels, want)


# verify


def said_by_verify(folder: Path, capsys) -> tuple[int, str]:
    """(exit code, output) of the command."""
    try:
        code = main(["verify", str(folder)]) or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    return code, capsys.readouterr().out


def test_verify_names_all_that_it_checked(copy, capsys):
    shutil.move(copy / "centroids", copy / "data" / "centroids")
    code, said = said_by_verify(copy / "data", capsys)
    assert code == 0
    checked = "5 samples in 2 shards, labels of 3 classes, "
    checked += "3 centroids in centroids/, 5 vectors in centroids/features/"
    assert said == f"{copy / 'data'}: {checked}, every byte as written\n"


@pytest.mark.parametrize(
    ("folder", "checked"),
    [("centroids", "3 centroids, 5 vectors in features/"), ("centroids/features", "5 vectors")],
)
def test_verify_knows_a_folder_by_what_lies_in_it(copy, capsys, folder, checked):
    code, said = said_by_verify(copy / folder, capsys)
    assert (code, said) == (0, f"{copy / folder}: {checked}, every byte as written\n")


def test_verify_of_labels_alone_says_that_no_shard_was_looked_at(copy, capsys):
    manifest = load_manifest(copy / "data")
    save_labels(copy / "words", np.zeros((5, 1), np.int32), manifest, 7, {"imported": "x"})
    code, said = said_by_verify(copy / "words", capsys)
    assert code == 0 and "5 rows of labels of 7 classes (shards not looked at)" in said


def test_verify_of_a_clustering_that_was_stopped(copy, capsys):
    SavedProgress(copy / "centroids", {}).save(np.eye(3, dtype=np.float32), 5)
    code, said = said_by_verify(copy / "centroids", capsys)
    assert code == 0 and "1 files of a clustering that was stopped" in said
    write_array(copy / "centroids" / "partial" / "centroids.npy", np.ones((3, 3), np.float32))
    code, said = said_by_verify(copy / "centroids", capsys)
    assert code == 1 and said.startswith("partial/centroids.npy: not what its record says")


def make_stale(data: Path) -> None:
    rewrite(data / "labels.json", manifest_sha256="0" * 64)


def flip_last(name: str) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        content = bytearray((data / name).read_bytes())
        content[-3] ^= 1
        (data / name).write_bytes(content)

    return change


def write(name: str, content: bytes = b"{}") -> Callable[[Path], None]:
    def change(data: Path) -> None:
        (data / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip_last("labels.npy"), "labels.npy changed since it was written"),
        (flip_last("labels.json"), "labels.json"),
        (flip_last("manifest.json"), "manifest.json"),
        (flip_last("video-000000.json"), "video-000000.json"),
        (flip_last("video-000000.tar"), "video-000000.tar: bytes changed"),
        (make_stale, "labels.npy is stale"),
        (lambda data: (data / "labels.npy").unlink(), "labels.npy is missing"),
        (lambda data: (data / "labels.json").unlink(), "labels.npy: no record names this file"),
        (write("other.npy"), "other.npy: no record names this file"),
        (write("notes.json"), "notes.json: no record names this file"),
        (write("video-000009.json"), "video-000009.json: no record names this file"),
        (write("video-000009.tar"), "video-000009.tar: a shard that the manifest does not name"),
        (write("\x1b[2J.npy"), r"\x1b[2J.npy: no record names this file"),
    ],
)
def test_verify_never_calls_a_folder_whole_with_a_damaged_stale_or_foreign_file(
    copy, capsys, change, said
):
    change(copy / "data")
    code, printed = said_by_verify(copy / "data", capsys)
    assert code == 1 and said in printed and "as written" not in printed.replace("was written", "")


def test_verify_names_what_it_did_not_check(copy, capsys):
    for name in (".labels.npy.123.tmp", "README.md", ".pack.lock"):
        (copy / "data" / name).write_text("x")
    (copy / "data" / "more").mkdir()
    code, said = said_by_verify(copy / "data", capsys)
    assert code == 0 and "every byte as written" not in said
    assert said.endswith("not checked: .labels.npy.123.tmp, README.md, more/\n")


# folders of before


def test_a_folder_packed_before_is_read_verified_and_kept_as_it_is(copy):
    data = copy / "data"
    unseal(data)
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    old = load_manifest(data)
    assert json.loads(before["manifest.json"])["schema_version"] == 1 and verify(old) == []
    labels = np.load(data / "labels.npy")
    save_labels(data, labels, old, 3, {"centroids_sha256": "0"})
    kept = (data / "video-000000.tar").stat().st_mtime_ns
    again = quietly(copy / "in", data)
    assert again.sha256 == old.sha256, "labels and runs stay bound to it"
    assert (data / "video-000000.tar").stat().st_mtime_ns == kept
    assert load_labels(data, again)[1] == 3


def test_a_damaged_record_of_before_is_not_believed_by_a_packing_that_goes_on(copy):
    data = copy / "data"
    unseal(data)
    path = data / "video-000001.json"
    record = json.loads(path.read_bytes())
    record["samples"][0]["grid"] = [1, 1]
    path.write_text(json.dumps(record, sort_keys=True))
    with pytest.raises(CorruptShard, match="video-000001.json: missing or not the record"):
        load_manifest(data)
    manifest = quietly(copy / "in", data)
    assert verify(manifest) == [] and manifest.shards[1]["samples"][0]["grid"] == [2, 2]


def test_a_damaged_record_is_not_believed_by_a_packing_that_goes_on(copy):
    data = copy / "data"
    sha256 = load_manifest(data).sha256
    path = data / "video-000001.json"
    path.write_bytes(path.read_bytes().replace(b'"grid": [2, 2]', b'"grid": [1, 1]', 1))
    manifest = quietly(copy / "in", data)
    assert verify(manifest) == [] and manifest.sha256 == sha256


def test_shards_are_appended_to_a_folder_packed_before(copy):
    data = copy / "data"
    unseal(data)
    Image.new("RGB", (32, 32), "red").save(copy / "in" / "red.png")
    manifest = quietly(copy / "in", data, mode="append")
    assert len(manifest) == 6 and verify(manifest) == []
    assert json.loads((data / "manifest.json").read_bytes())["schema_version"] == 2


@pytest.mark.parametrize("key", ["digest", "schema_version"])
def test_no_manifest_with_a_digest_passes_for_one_of_before(copy, key):
    path = copy / "data" / "manifest.json"
    content = json.loads(path.read_bytes())
    content["schema_version"] = 1
    if key == "digest":
        content["digesu"] = content.pop("digest")
    path.write_bytes(json.dumps(content, indent=1, sort_keys=True).encode())
    with pytest.raises(CorruptShard, match="manifest.json"):
        load_manifest(copy / "data")


def test_labels_of_before_are_refused_with_the_command_that_makes_them_again(copy):
    path = copy / "data" / "labels.json"
    record = json.loads(path.read_bytes())
    del record["digest"]
    path.write_text(json.dumps(record))
    with pytest.raises(CorruptShard, match="no digest: .* older version .*`python -m data_pipel"):
        load_labels(copy / "data", load_manifest(copy / "data"))


# names that lead elsewhere


def test_a_record_cannot_name_a_shard_elsewhere(copy):
    data = copy / "data"
    for suffix in (".tar", ".json"):
        shutil.copy(data / f"video-000001{suffix}", copy / f"video-000000{suffix}")
    path = data / "video-000000.json"
    rewrite(path, name="../video-000000")
    manifest = read_json(data / "manifest.json", {})
    manifest["shards"][0]["record_sha256"] = file_sha256(path)
    write_json(data / "manifest.json", manifest)
    with pytest.raises(CorruptShard, match=r"name is '\.\./video-000000', the manifest says"):
        load_manifest(data)


def test_a_shard_may_be_a_link_to_a_file_elsewhere(copy):
    """Large sets lie on several disks."""
    data = copy / "data"
    shutil.move(data / "video-000000.tar", copy / "elsewhere.tar")
    (data / "video-000000.tar").symlink_to(copy / "elsewhere.tar")
    assert verify_folder(data).problems == []


# moving


def test_data_labels_and_centroids_may_move(copy):
    want = load_labels(copy / "data", load_manifest(copy / "data"))[0]
    sha256 = resolve_dataset(str(copy / "data")).load().sha256
    (copy / "data").rename(copy / "renamed")
    (copy / "centroids").rename(copy / "renamed centroids")
    assert resolve_dataset(str(copy / "renamed")).load().sha256 == sha256
    manifest = load_manifest(copy / "renamed")
    written = (copy / "renamed centroids" / "features" / "video-000000.npy").stat().st_mtime_ns
    again = label(manifest, copy / "renamed centroids", 2, copy / "elsewhere")
    assert np.array_equal(again, want)
    path = copy / "renamed centroids" / "features" / "video-000000.npy"
    assert path.stat().st_mtime_ns == written, "its vectors are those of the same samples"
    (copy / "elsewhere").rename(copy / "labels")
    assert np.array_equal(load_labels(copy / "labels", manifest)[0], want)


def test_an_encoder_may_move_once_its_vectors_are_there(copy):
    """A folder of weights counts by its weights; where they lay is only where to look for them."""
    from transformers import Dinov2Config, Dinov2Model

    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(**settings, image_size=28, patch_size=14))
    model.save_pretrained(copy / "dino")
    manifest = load_manifest(copy / "data")
    config = ClusterConfig(3, FeatureConfig(f"dinov2:{copy / 'dino'}"))
    cluster(manifest, config, copy / "by_dino")
    want = label(manifest, copy / "by_dino", 2, copy / "labels")
    (copy / "dino").rename(copy / "moved")
    assert np.array_equal(label(manifest, copy / "by_dino", 2, copy / "labels"), want)
    with pytest.raises(MissingData, match="dino, which is not there") as error:
        label(manifest, copy / "by_dino", 2, copy / "labels", copy / "vectors")
    assert f"features {copy / 'data'} --encoder ENCODER --output FEATURES" in str(error.value)
    extract(manifest, FeatureConfig(f"dinov2:{copy / 'moved'}"), copy / "vectors")
    again = label(manifest, copy / "by_dino", 2, copy / "labels", copy / "vectors")
    assert np.array_equal(again, want)
