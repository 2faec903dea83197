"""Features, centroids and labels: meaningful, bound to their data, errors before any work."""

import csv

import numpy as np
import pytest

from data_pipeline.clustering.features import descriptor_features, normalise
from data_pipeline.clustering.kmeans import load_centroids, save_centroids, spherical_kmeans
from data_pipeline.clustering.labels import load_labels, nearest_centroids, save_labels
from data_pipeline.errors import CorruptShard, DataPipelineError, MissingData
from data_pipeline.shards.manifest import load_manifest


def unit(count, dim=8, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_codec_descriptor_tells_motions_apart(packed):
    manifest = load_manifest(packed / "train")
    with open(packed / "train.csv") as lines:
        truth = {name: int(label) for name, label in csv.reader(lines)}
    labels = np.array([truth[source] for source in manifest.sources()])
    raw = descriptor_features(manifest)
    features = normalise(raw - raw.mean(axis=0))
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    similarity = features @ features.T
    np.fill_diagonal(similarity, -2)
    assert (labels[similarity.argmax(1)] == labels).mean() > 0.7


def test_centroids_are_unit_seeded_and_find_planted_clusters():
    planted = unit(5, seed=1)
    rows = np.repeat(planted, 40, axis=0) + 0.05 * np.random.default_rng(2).standard_normal(
        (200, 8)
    )
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    first, second = spherical_kmeans(rows, 5, seed=3), spherical_kmeans(rows, 5, seed=3)
    assert np.array_equal(first, second)
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    assert (planted @ first.T).max(axis=1).mean() > 0.9


def test_labels_are_the_nearest_centroids_in_order():
    rows, centroids = unit(30), unit(12, seed=5)
    labels = nearest_centroids(rows, centroids, 4)
    assert np.array_equal(labels, np.argsort(-(rows @ centroids.T), axis=1)[:, :4])
    assert nearest_centroids(rows, centroids, 40).shape == (30, 12)


@pytest.mark.parametrize(
    ("rows", "count", "message"),
    [
        (unit(5), 6, "must be 1 to 5"),
        (unit(5) * np.float32("nan"), 2, "not finite, the first is of sample 0"),
    ],
)
def test_impossible_clusterings_are_refused(rows, count, message):
    with pytest.raises(DataPipelineError, match=message):
        spherical_kmeans(rows, count)


def test_changed_centroids_are_refused(tmp_path):
    save_centroids(tmp_path, unit(3), {"encoder": None})
    load_centroids(tmp_path)
    np.save(tmp_path / "centroids.npy", unit(3, seed=9))
    with pytest.raises(DataPipelineError, match="not the file"):
        load_centroids(tmp_path)


def test_labels_are_bound_to_their_manifest(packed, tmp_path):
    train, val = load_manifest(packed / "train"), load_manifest(packed / "val")
    with pytest.raises(MissingData, match="data_pipeline cluster"):
        load_labels(tmp_path, train)
    save_labels(tmp_path, np.zeros((len(train), 2), np.int32), train, 1, {})
    assert load_labels(tmp_path, train)[1] == 1
    with pytest.raises(CorruptShard, match="another version"):
        load_labels(tmp_path, val)
    np.save(tmp_path / "labels.npy", np.ones((len(train), 2), np.int32))
    with pytest.raises(CorruptShard, match="changed"):
        load_labels(tmp_path, train)
    save_labels(tmp_path, np.full((len(train), 2), 7, np.int32), train, 5, {})
    with pytest.raises(CorruptShard, match="ids below 5"):
        load_labels(tmp_path, train)


def test_another_set_is_labelled_in_the_space_of_the_centroids(packed, tmp_path):
    """The same clips labelled as part of a smaller set get the same labels."""
    from data_pipeline.clustering.pipeline import label
    from data_pipeline.shards.inputs import list_inputs
    from data_pipeline.shards.pack import PackConfig, pack
    from data_pipeline.shards.sample_builder import SampleConfig

    config = PackConfig(SampleConfig(size=112, gop=64, budget=98, num_full_frames=8), workers=2)
    names = [packed / "clips" / f"train_{i:05d}.mp4" for i in (3, 5, 11)]
    few = pack(list_inputs(names), tmp_path / "few", config)
    labels = label(few, packed / "centroids" / "train", 4, tmp_path)
    whole = np.load(packed / "train" / "labels.npy")
    assert np.array_equal(labels, whole[[3, 5, 11]])
