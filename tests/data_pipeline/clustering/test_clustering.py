"""Features, centroids and labels: meaningful, bound to their data, errors before any work."""

import csv
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from conftest import PATIENCE_S, ROOT
from forked import forked, path_with_python
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.clustering import search as search_module
from data_pipeline.clustering.feature_sources import FeatureConfig, descriptor_rows, normalise
from data_pipeline.clustering.features import extract, load_features
from data_pipeline.clustering.kmeans import (
    allot,
    load_centroids,
    save_centroids,
    spherical_kmeans,
)
from data_pipeline.clustering.labels import load_labels, padded, save_labels
from data_pipeline.clustering.pipeline import ClusterConfig, cluster, label
from data_pipeline.clustering.search import CentroidSearch, recall_samples, representatives
from data_pipeline.errors import CorruptShard, DataPipelineError, MissingData
from data_pipeline.shards.manifest import load_manifest


def unit(count, dim=8, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def nearest_centroids(rows, centroids, count):
    """(labels, how they were found), as `label` does for a shard."""
    find = CentroidSearch(centroids, count=count, some=recall_samples(rows))
    return padded(find(rows), count), find.how


def test_the_codec_descriptor_tells_motions_apart(packed):
    manifest = load_manifest(packed / "train")
    with open(packed / "train.csv") as lines:
        truth = {name: int(label) for name, label in csv.reader(lines)}
    labels = np.array([truth[source] for source in manifest.sources()])
    raw = descriptor_rows(manifest, range(len(manifest)))
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
    (first, _), (second, _) = (spherical_kmeans(rows, 5, seed=3) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    assert (planted @ first.T).max(axis=1).mean() > 0.9


def test_labels_are_the_nearest_centroids_in_order():
    rows, centroids = unit(30), unit(12, seed=5)
    labels, how = nearest_centroids(rows, centroids, 4)
    assert how == {"search": "exact", "recall": 1.0}
    assert np.array_equal(labels, np.argsort(-(rows @ centroids.T), axis=1)[:, :4])
    wide, _ = nearest_centroids(rows, centroids, 40)
    assert wide.shape == (30, 40) and (wide[:, 12:] == -1).all() and (wide[:, :12] >= 0).all()


@pytest.mark.parametrize(
    ("rows", "count", "message"),
    [
        (unit(5), 6, "must be 1 to 5"),
        (unit(5) * np.float32("nan"), 2, "not finite, the first is of sample 0"),
        (unit(5) * np.float32("inf"), 2, "not finite, the first is of sample 0"),
        (np.repeat(unit(3), 4, axis=0), 4, "only 3 of 12 features differ"),
    ],
)
def test_impossible_clusterings_are_refused(rows, count, message):
    with pytest.raises(DataPipelineError, match=message):
        spherical_kmeans(rows, count)


def blobs(groups: int, each: int, dim: int = 16) -> np.ndarray:
    """Unit rows around planted centres."""
    rng = np.random.default_rng(2)
    rows = np.repeat(unit(groups, dim, seed=1), each, axis=0)
    return normalise(rows + 0.02 * rng.standard_normal(rows.shape))


def test_two_levels_give_the_number_asked_and_a_share_to_every_cell():
    rows = blobs(40, 50)
    one, _ = spherical_kmeans(rows, 100, seed=0)
    two, report = spherical_kmeans(rows, 100, seed=0, single=50)
    assert two.shape == one.shape and report.levels == 2 and report.cells == 10
    assert np.allclose(np.linalg.norm(two, axis=1), 1, atol=1e-5)
    assert report.smallest_cluster > 0
    fits = [(rows @ centroids.T).max(axis=1).mean() for centroids in (one, two)]
    assert fits[1] > fits[0] - 0.01
    again, _ = spherical_kmeans(rows, 100, seed=0, single=50)
    assert np.array_equal(two, again)


def test_two_levels_go_on_from_given_centroids():
    rows = blobs(40, 50)
    first, _ = spherical_kmeans(rows, 100, seed=0, single=50, num_iterations=2)
    more, _ = spherical_kmeans(rows, 100, seed=0, single=50, num_iterations=5, initial=first)
    assert more.shape == first.shape
    assert (rows @ more.T).max(axis=1).mean() >= (rows @ first.T).max(axis=1).mean() - 1e-4


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(lambda s: sum(s) > 0),
    share=st.floats(0.02, 1.0),
)
def test_shares_of_cells_add_up_and_fit(sizes, share):
    sizes = np.array(sizes)
    total = max(1, int(share * sizes.sum()))
    shares = allot(total, sizes)
    assert shares.sum() == total and (shares <= sizes).all() and (shares >= 0).all()
    if total >= (sizes > 0).sum():
        assert ((shares > 0) == (sizes > 0)).all()


@pytest.mark.parametrize(
    ("total", "sizes", "wanted"),
    [
        # exact 0.7, 1.75, 4.55: one each at least, then the largest remainder
        (7, [10, 25, 65], [1, 2, 4]),
        (10, [26, 27, 47], [2, 3, 5]),  # exact 2.6, 2.7, 4.7: two to give away
        # exact 0.06, 0.06, 3.0, 2.88: one each makes seven, and the smallest remainder gives way
        (6, [1, 1, 50, 48], [1, 1, 2, 2]),
        (2, [0, 5, 0, 5], [0, 1, 0, 1]),
    ],
)
def test_shares_of_cells_are_those_of_largest_remainders(total, sizes, wanted):
    assert allot(total, np.array(sizes)).tolist() == wanted


def test_empty_and_repeated_centroids_are_moved_and_reported():
    rows = blobs(6, 30)
    lost = np.stack([rows[0], rows[0], rows[40], rows[70], -rows[90], -rows[100]])
    centroids, report = spherical_kmeans(rows, 6, num_iterations=0, initial=lost)
    counts = np.bincount((rows @ centroids.T).argmax(axis=1), minlength=6)
    assert counts.min() > 0 and len(np.unique(centroids.round(5), axis=0)) == 6
    assert report.repaired_duplicate >= 1 and report.repaired_empty >= 1
    assert report.smallest_cluster == counts.min() and report.largest_cluster == counts.max()


def test_initial_centroids_of_another_shape_are_refused():
    with pytest.raises(DataPipelineError, match=r"shape \(4, 8\), these features need \(5, 8\)"):
        spherical_kmeans(unit(30), 5, initial=unit(4))


def test_near_duplicates_are_joined_along_chains_and_the_lowest_id_stands_for_them():
    angles = np.array([0.0, 2.0, 0.02, 0.04, 2.01, 4.0])  # 0, 2 and 3 are a chain
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert representatives(rows, float(np.cos(0.025))).tolist() == [0, 1, 0, 0, 1, 5]
    assert representatives(rows, 1.0).tolist() == list(range(6))
    copies = np.repeat(rows, 50, axis=0)
    assert (representatives(copies, 0.999999) == np.repeat(np.arange(6) * 50, 50)).all()
    with pytest.raises(ValueError, match="--near-duplicates 1.5"):
        representatives(rows, 1.5)


def test_a_pair_at_the_threshold_is_joined_and_one_below_it_is_not():
    rows = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
    assert representatives(rows, 0.6).tolist() == [0, 0]
    assert representatives(rows, 0.6001).tolist() == [0, 1]


def test_near_duplicates_of_large_sets_are_found_inside_cells():
    rows = blobs(20, 1, dim=8)
    copies = np.repeat(rows, 30, axis=0)
    found = representatives(copies, 0.99999, exact=100)
    assert (found == np.repeat(np.arange(20) * 30, 30)).all()


def test_approximate_search_reaches_the_recall_it_reports(monkeypatch):
    monkeypatch.setattr(search_module, "EXACT", 100)
    centroids = blobs(200, 10)
    rows = normalise(np.repeat(centroids, 2, axis=0) + 0.01 * unit(4000, 16, seed=3))
    found, how = nearest_centroids(rows, centroids, 10)
    truth, _ = search_module.search(rows, centroids, 10)
    assert how["search"].endswith("of 44 cells") and how["recall"] >= 0.99
    assert search_module.recall_of(found, truth) >= 0.985
    found, how = nearest_centroids(unit(500, 16), unit(2000, 16, seed=5), 10)
    assert how == {"search": "exact", "recall": 1.0}, "cells do not help without clusters"


def test_a_killed_clustering_goes_on_from_its_last_block(packed, tmp_path, monkeypatch):
    from data_pipeline.clustering import progress as module

    manifest, config = load_manifest(packed / "train"), ClusterConfig(8, num_iterations=15)
    want = cluster(manifest, config, tmp_path / "straight")
    original, calls = module.write_array, []

    def write_twice(path, array):
        calls.append(path.name)
        if len(calls) == 3:  # the first two blocks are there
            raise KeyboardInterrupt
        original(path, array)

    monkeypatch.setattr(module, "write_array", write_twice)
    with pytest.raises(KeyboardInterrupt):
        cluster(manifest, config, tmp_path / "killed")
    monkeypatch.undo()
    said = []
    got = cluster(manifest, config, tmp_path / "killed", report=said.append)
    assert any("going on after 10 iterations" in line for line in said)
    assert np.array_equal(got, want)
    records = [tmp_path / name / "clusters.json" for name in ("straight", "killed")]
    assert records[0].read_bytes() == records[1].read_bytes()
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [
        "centroids.npy",
        "clusters.json",
        "features",
    ]
    other = ClusterConfig(7, num_iterations=15, near_duplicates=0.999, init=None)
    assert len(cluster(manifest, other, tmp_path / "killed")) == 7
    warm = ClusterConfig(8, num_iterations=5, init=tmp_path / "straight")
    assert cluster(manifest, warm, tmp_path / "warm").shape == want.shape


def test_features_are_done_shard_by_shard_and_by_many(packed, tmp_path):
    manifest, config, said = load_manifest(packed / "train"), FeatureConfig(), []
    assert not extract(manifest, config, tmp_path, 0, 2, said.append)
    assert said == ["1 shards are still to be done by other tasks, video-000001 first"]
    with pytest.raises(MissingData, match="video-000001 is not done"):
        load_features(manifest, tmp_path)
    kept = (tmp_path / "video-000000.npy").stat().st_mtime_ns
    assert extract(manifest, config, tmp_path, 1, 2)
    assert extract(manifest, config, tmp_path)
    assert (tmp_path / "video-000000.npy").stat().st_mtime_ns == kept
    rows, found = load_features(manifest, tmp_path)
    assert found == config and np.array_equal(rows, descriptor_rows(manifest, range(24)))
    with pytest.raises(DataPipelineError, match="features of other samples, settings"):
        extract(load_manifest(packed / "val"), config, tmp_path)
    with pytest.raises(DataPipelineError, match="another set"):
        load_features(load_manifest(packed / "val"), tmp_path)
    np.save(tmp_path / "video-000002.npy", rows[20:] + 1)
    with pytest.raises(CorruptShard, match="video-000002.npy changed"):
        load_features(manifest, tmp_path)
    with pytest.raises(ValueError, match="--task-id 2 must be 0 to 1"):
        extract(manifest, config, tmp_path, 2, 2)


@pytest.mark.e2e
def test_processes_of_the_launcher_share_the_features_and_change_no_label(packed, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(packed / "train", shards)
    command = ["bash", ROOT / "shells" / "cluster.sh", shards, "4", tmp_path / "out"]
    variables = {"NPROC": "3", "UNIVIT_INSTALLED": "1", "PATH": path_with_python(tmp_path / "bin")}
    subprocess.run(command, check=True, env={**os.environ, **variables}, timeout=PATIENCE_S)
    manifest = load_manifest(shards)
    two, num_classes = load_labels(shards, manifest)
    cluster(manifest, ClusterConfig(4), tmp_path / "alone")
    one = label(manifest, tmp_path / "alone", 10, tmp_path / "alone")
    assert num_classes == 4 and np.array_equal(one, two)


def test_a_frozen_image_encoder_gives_frame_vectors_as_mean_or_side_by_side(packed, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    settings = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**settings, image_size=28, patch_size=14)).save_pretrained(
        tmp_path / "dino"
    )
    manifest, encoder = load_manifest(packed / "val"), f"dinov2:{tmp_path / 'dino'}"
    both = {}
    for concat in (False, True):
        config = FeatureConfig(encoder, num_frames=3, concat=concat, keep_dims=8)
        assert extract(manifest, config, tmp_path / str(concat))
        both[concat], _ = load_features(manifest, tmp_path / str(concat))
    assert both[True].shape == (8, 24) and both[False].shape == (8, 8)
    frames = both[True].reshape(8, 3, 8)
    assert np.allclose(np.linalg.norm(frames, axis=2), 1, atol=1e-5)
    assert np.allclose(frames.mean(axis=1), both[False], atol=1e-6)
    with pytest.raises(MissingData, match="no .safetensors"):
        extract(manifest, FeatureConfig("dinov2:nowhere"), tmp_path / "none")


def test_principal_components_keep_what_varies_and_label_in_the_same_space(packed, tmp_path):
    from data_pipeline.clustering.pipeline import fit_projection

    rng = np.random.default_rng(0)
    raw = (rng.standard_normal((200, 3)) * [9, 4, 1]) @ np.linalg.qr(rng.normal(size=(5, 3)))[0].T
    projection = fit_projection(raw.astype(np.float32), 2)
    parts = (raw - raw.mean(axis=0)) @ projection.components.T
    assert np.allclose(projection.components @ projection.components.T, np.eye(2), atol=1e-5)
    assert 60 < parts[:, 0].var() < 110 and 10 < parts[:, 1].var() < 25
    with pytest.raises(DataPipelineError, match="--pca 9: 200 vectors of width 5"):
        fit_projection(raw, 9)

    manifest = load_manifest(packed / "train")
    centroids = cluster(manifest, ClusterConfig(6, pca=10), tmp_path / "c")
    assert centroids.shape == (6, 10)
    labels = label(manifest, tmp_path / "c", 3, tmp_path / "l")
    again = label(manifest, tmp_path / "c", 3, tmp_path / "m", tmp_path / "fresh")
    assert np.array_equal(labels, again) and (tmp_path / "fresh" / "features.json").is_file()


def test_clusters_can_be_looked_at_with_sizes_and_purity(packed, tmp_path):
    from PIL import Image

    from data_pipeline.clustering.browse import overall_purity, summarise

    labels, truth = np.array([[2], [2], [2], [0], [0], [2]]), np.array([5, 5, 7, 1, -1, 5])
    summaries = summarise(labels, 4, truth)
    assert [s.cluster for s in summaries] == [2, 0, 1, 3]
    assert summaries[0].members.tolist() == [0, 1, 2, 5] and summaries[0].purity == 0.75
    assert summaries[1].purity == 1.0 and summaries[2].purity is None
    assert overall_purity(summaries) == 4 / 5, "the sample of unknown truth does not count"
    assert overall_purity(summarise(labels, 4)) is None

    page, truth = tmp_path / "page.png", packed / "train.csv"
    done = forked(
        *("-m", "data_pipeline", "browse", packed / "train", "--output", page, "--truth", truth)
    )
    assert "8 clusters of" in done.stdout and "purity" in done.stdout
    with Image.open(page) as picture:
        assert picture.width == 8 * 116 and picture.height % 134 == 0
    stranger = tmp_path / "other.csv"
    stranger.write_text("clips/nobody.mp4,3\n")
    done = forked(
        *("-m", "data_pipeline", "browse", packed / "train", "--output", page),
        *("--truth", stranger),
        check=False,
    )
    assert done.returncode == 1 and "names none of the samples" in done.stderr


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
    with pytest.raises(CorruptShard, match="stale.*data_pipeline label"):
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


def test_copies_are_joined_before_any_pair_is_compared():
    features = np.concatenate([np.repeat(unit(1, seed=1), 30_000, axis=0), unit(50, seed=2)])
    groups = representatives(features, 0.999)
    assert not groups[:30_000].any() and np.array_equal(groups[30_000:], np.arange(30_000, 30_050))
    shuffled = np.random.default_rng(0).permutation(len(features))
    again = representatives(features[shuffled], 0.999)
    assert len(np.unique(again)) == 51 and (again <= np.arange(len(again))).all()


def test_centroids_that_samples_cannot_fill_are_reported():
    directions = np.repeat(unit(20, 16), 10, axis=0)
    noise = 1e-5 * np.random.default_rng(0).standard_normal(directions.shape)
    centroids, report = spherical_kmeans(normalise(directions + noise), 150)
    found, _ = search_module.search(normalise(directions + noise), centroids, 1)
    assert report.left_empty >= 150 - len(np.unique(found)) > 0
    assert report.repaired_empty + report.repaired_duplicate <= 150, "each is counted once"


def test_vectors_of_zeros_become_no_centroid():
    rows = unit(40)
    rows[[3, 9]] = 0
    centroids, report = spherical_kmeans(rows, 20)
    assert report.zero_vectors == 2
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    with pytest.raises(DataPipelineError, match="only 38 of 40"):
        spherical_kmeans(rows, 39)


def test_two_levels_go_on_from_finished_cells_and_use_what_was_given():
    from data_pipeline.clustering.kmeans import Progress

    class Kept(Progress):
        def __init__(self):
            self.cells, self.saved = {}, 0

        def save_cell(self, cell, centroids):
            self.cells[cell], self.saved = centroids, self.saved + 1

        def load_cell(self, cell):
            return self.cells.get(cell)

    rows = unit(2000, 16)
    kept = Kept()
    want, _ = spherical_kmeans(rows, 200, single=100, progress=kept)
    assert kept.saved > 5
    for cell in list(kept.cells)[::2]:
        del kept.cells[cell]
    kept.saved = 0
    got, report = spherical_kmeans(rows, 200, single=100, progress=kept)
    assert np.array_equal(got, want) and 0 < kept.saved <= len(kept.cells) - len(kept.cells) // 2
    assert report.smallest_cluster >= 1
    moved = normalise(rows + 0.1 * unit(2000, 16, seed=5))
    _, report = spherical_kmeans(moved, 200, single=100, initial=want)
    assert report.started_from > 150


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("cluster", "--num-centroids", 50), "holds 24 samples"),
        (("cluster", "--num-centroids", 0), "--num-centroids 0"),
        (("cluster", "--num-centroids", 4, "--pca", 0), "--pca 0"),
        (("cluster", "--num-centroids", 4, "--near-duplicates", 2), "--near-duplicates 2"),
        (("cluster", "--num-centroids", 4, "--iterations", -1), "--iterations -1"),
        (("cluster", "--num-centroids", 4, "--seed", 99999999999), "--seed 99999999999"),
        (("cluster", "--num-centroids", 4, "--init", "nowhere"), "clusters.json"),
    ],
)
def test_a_wrong_option_is_refused_before_any_vector_is_made(packed, tmp_path, flags, message):
    command, *rest = flags
    output = ("--output", tmp_path / "out")
    done = forked("-m", "data_pipeline", command, packed / "train", *rest, *output, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_labels_of_ones_own_are_imported_and_padded(packed, tmp_path):
    manifest = load_manifest(packed / "train")
    listed = tmp_path / "words.jsonl"
    lines = [
        json.dumps({"source": source, "labels": [place, 90 + place % 3][: 1 + place % 2]})
        for place, source in enumerate(manifest.sources())
    ]
    listed.write_text("\n".join(lines[::-1]))
    command = ("-m", "data_pipeline", "label", packed / "train", "--num-labels", 5)
    command += ("--output", tmp_path / "labels")
    forked(*command, "--from", listed, "--num-classes", 100)
    labels, num_classes = load_labels(tmp_path / "labels", manifest)
    assert num_classes == 100 and labels.shape == (24, 5)
    assert labels[0].tolist() == [0, -1, -1, -1, -1] and labels[1].tolist() == [1, 91, -1, -1, -1]
    done = forked(*command, "--from", listed, "--num-classes", 50, check=False)
    assert done.returncode == 1 and "classes are 0 to 49" in done.stderr
    listed.write_text("\n".join(lines[1:]))
    done = forked(*command, "--from", listed, "--num-classes", 100, check=False)
    assert done.returncode == 1 and "no line for 1 samples" in done.stderr
    np.save(tmp_path / "words.npy", np.full((24, 9), -1))
    forked(*command, "--from", tmp_path / "words.npy", "--num-classes", 100)
    assert (load_labels(tmp_path / "labels", manifest)[0] == -1).all()
    page = ("--labels", tmp_path / "labels", "--output", tmp_path / "page.png")
    done = forked("-m", "data_pipeline", "browse", packed / "train", *page, check=False)
    assert done.returncode == 1 and "no sample" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["{}", "oops!", "[1]"])
@pytest.mark.parametrize("name", ["features.json", "video-000001.json", "labels.json"])
def test_damaged_records_are_named(packed, tmp_path, name, text):
    manifest = load_manifest(packed / "train")
    extract(manifest, FeatureConfig(), tmp_path, report=lambda line: None)
    save_labels(tmp_path, np.zeros((len(manifest), 2), np.int32), manifest, 3, {})
    (tmp_path / name).write_text(text)
    with pytest.raises(CorruptShard, match=name):
        load_features(manifest, tmp_path)
        load_labels(tmp_path, manifest)


def test_vectors_of_another_set_are_not_taken_when_their_record_is_lost(packed, tmp_path):
    train, val = (load_manifest(packed / split) for split in ("train", "val"))
    extract(train, FeatureConfig(), tmp_path, report=lambda line: None)
    first = np.load(tmp_path / f"{train.shards[0]['name']}.npy")
    (tmp_path / "features.json").unlink()
    extract(val, FeatureConfig(), tmp_path, report=lambda line: None)
    rows, _ = load_features(val, tmp_path)
    assert not np.array_equal(rows[: len(first)], first[: len(rows)])


def test_vectors_that_are_not_finite_are_refused_by_sample(packed, tmp_path, monkeypatch):
    from data_pipeline.clustering import feature_sources as module

    manifest = load_manifest(packed / "train")

    def spoilt(manifest, ids):
        rows = np.ones((len(ids), 4), np.float32)
        rows[3] = np.nan
        return rows

    monkeypatch.setattr(module, "descriptor_rows", spoilt)
    with pytest.raises(DataPipelineError, match="sample 3 .* not finite"):
        extract(manifest, FeatureConfig(), tmp_path)
