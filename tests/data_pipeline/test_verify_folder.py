"""What `verify` says of vectors, of folders inside, and of links."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.clustering.labels import save_labels
from data_pipeline.clustering.pipeline import ClusterConfig, cluster
from data_pipeline.clustering.progress import SavedProgress
from data_pipeline.errors import DataPipelineError
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig
from data_pipeline.side_files import write_array
from data_pipeline.verify_folder import verify_folder
from model_factory.files import read_json, write_json

CONFIG = PackConfig(SampleConfig(size=32, gop=64, budget=64), samples_per_shard=2, workers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """data/ of two shards, and in it centroids/features/."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        noise = rng.integers(40 * number, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "in" / f"{number}.png")
    inputs = list_inputs([folder / "in"])
    manifest = pack(inputs, folder / "data", CONFIG, report=lambda line: None)
    cluster(manifest, ClusterConfig(2, pca=4), folder / "data" / "centroids")
    return folder / "data"


@pytest.fixture
def data(made, tmp_path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def test_vectors_of_something_else_are_a_problem(data):
    record = data / "centroids" / "features" / "video-000001.json"
    write_json(record, {**read_json(record, {}), "origin": "0" * 64})
    (problem,) = verify_folder(data / "centroids" / "features").problems
    assert "video-000001.npy holds vectors of other samples, settings or weights" in problem


def test_vectors_or_a_record_that_are_lost_are_named(data):
    features = data / "centroids" / "features"
    (features / "video-000000.npy").unlink()
    (features / "video-000001.json").unlink()
    problems = verify_folder(features).problems
    assert [problem.partition(";")[0] for problem in problems] == [
        "video-000000: video-000000.npy missing",
        "video-000001: video-000001.json missing",
    ]
    (features / "video-000000.json").unlink()
    (problem,) = verify_folder(features).problems
    assert problem.startswith("video-000001: "), "nothing here knows of the other shard"
    (problem, _) = verify_folder(data).problems
    assert problem.startswith(
        "centroids/features/video-000000: video-000000.npy and video-000000.json missing"
    )


def test_a_problem_and_a_count_say_in_which_folder(data):
    shutil.copytree(data, data / "more")
    assert verify_folder(data).checked == [
        "4 samples in 2 shards",
        "2 centroids in centroids/",
        "4 vectors in centroids/features/",
        "4 samples in 2 shards in more/",
        "2 centroids in more/centroids/",
        "4 vectors in more/centroids/features/",
    ]
    with open(data / "more" / "video-000000.tar", "r+b") as tar:
        tar.write(b"x")
    problems = verify_folder(data).problems
    assert problems and all(problem.startswith("more/video-000000") for problem in problems)


def test_a_folder_is_checked_once_however_many_links_lead_to_it(data):
    (data / "again").symlink_to(data)
    (data / "centroids" / "up").symlink_to("..")
    (data / "zz").symlink_to(data / "centroids")
    findings = verify_folder(data)
    assert findings.problems == [] and len(findings.checked) == 3


def test_labels_in_a_folder_inside_are_of_the_shards_above_or_stale(data):
    save_labels(data / "labels", np.zeros((4, 1), np.int32), load_manifest(data), 7, {"from": "x"})
    assert "labels of 7 classes in labels/" in verify_folder(data).checked
    record = data / "labels" / "labels.json"
    write_json(record, {**read_json(record, {}), "manifest_sha256": "0" * 64})
    (problem,) = verify_folder(data).problems
    assert "is stale" in problem


def test_verify_computes_nothing_again_and_does_not_say_so(data, caplog):
    centroids = data / "centroids"
    SavedProgress(centroids, {}).save(np.eye(3, dtype=np.float32), 5)
    write_array(centroids / "partial" / "centroids.npy", np.ones((3, 3), np.float32))
    record = centroids / "partial" / "record.json"
    state = read_json(record, {})
    write_json(record, {**state, "files": {**state["files"], "\x1b[2J.npy": "0" * 64}})
    with caplog.at_level(logging.WARNING):
        problems = verify_folder(centroids).problems
    assert sorted(problem.partition(":")[0] for problem in problems) == [
        "partial/\\x1b[2J.npy",
        "partial/centroids.npy",
    ]
    assert caplog.text == ""


def test_a_folder_of_folders_has_no_record_of_its_own(data):
    with pytest.raises(DataPipelineError):
        verify_folder(data.parent)
