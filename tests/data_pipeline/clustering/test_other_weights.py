"""Clusters of other weights, sets or sizes are not taken for one's own; black pictures are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.clustering import pipeline
from data_pipeline.clustering.feature_sources import FeatureConfig
from data_pipeline.clustering.kmeans import save_centroids
from data_pipeline.clustering.labels import save_labels
from data_pipeline.clustering.pipeline import ClusterConfig, cluster, label
from data_pipeline.datasets import forget_other_clusters, resolve_dataset
from data_pipeline.errors import DataPipelineError
from data_pipeline.shards.inputs import list_inputs
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.pack import PackConfig, pack
from data_pipeline.shards.sample_builder import SampleConfig


def quiet(line: str) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A packed folder of two shards: three pictures of noise, then two black ones."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        noise = rng.integers(40 * number, 256, (32, 32, 3), dtype=np.uint8)
        black = np.zeros_like(noise)
        Image.fromarray(noise if number < 3 else black).save(folder / "in" / f"{number}.png")
    config = PackConfig(SampleConfig(size=32, gop=64, budget=64), samples_per_shard=3, workers=1)
    pack(list_inputs([folder / "in"]), folder / "data", config, report=quiet)
    return folder / "data"


def test_a_shard_of_black_pictures_alone_is_labelled(pictures, tmp_path):
    manifest = load_manifest(pictures)
    cluster(manifest, ClusterConfig(2), output=tmp_path)
    black = np.load(tmp_path / "features" / f"{manifest.shards[1]['name']}.npy")
    assert not black.any()
    labels = label(manifest, tmp_path, num_labels=2, output=tmp_path)
    assert labels.shape == (5, 2) and (labels >= 0).all()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    from model_factory.vit_preview_v0_packing_hf import (
        LlavaViTPackingConfig,
        LlavaViTPackingModel,
    )

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
    config = LlavaViTPackingConfig(num_hidden_layers=1, patch_size=16, **sizes)
    folder = tmp_path_factory.mktemp("encoder")
    LlavaViTPackingModel(config).save_pretrained(folder)
    return folder


def save_clusters(output: Path, manifest, weights_sha256: str | None) -> None:
    """Labels and centroids without features, as a removal that was killed may leave them."""
    details = {"weights_sha256": weights_sha256}
    save_centroids(output, centroids=np.eye(3, 4, dtype=np.float32), details=details)
    labels = np.zeros((len(manifest), 2), np.int32)
    details = {"centroids_sha256": "0"}
    save_labels(output, labels=labels, manifest=manifest, num_classes=3, details=details)


def test_labels_of_other_weights_are_forgotten_also_without_their_features(
    pictures, encoder, tmp_path
):
    manifest = load_manifest(pictures)
    save_labels(
        tmp_path / "data",
        labels=np.zeros((len(manifest), 2), np.int32),
        manifest=manifest,
        num_classes=3,
        details={},
    )
    (tmp_path / "data" / "manifest.json").symlink_to(pictures / "manifest.json")
    for shard in pictures.glob("video-*"):
        (tmp_path / "data" / shard.name).symlink_to(shard)
    dataset = resolve_dataset(str(tmp_path / "data")).load()
    output = tmp_path / "round"
    assert not forget_other_clusters(dataset, encoder, output), "nothing is there"
    save_clusters(output, manifest, FeatureConfig(str(encoder)).weights_sha256())
    assert not forget_other_clusters(dataset, encoder, output), "of these weights"
    (output / "clusters.json").unlink()
    assert forget_other_clusters(dataset, encoder, output), "labels that no record explains"
    save_clusters(output, manifest, "of others")
    assert forget_other_clusters(dataset, encoder, output)
    assert not forget_other_clusters(dataset, encoder, output), "no labels are left"
    save_clusters(output, manifest, "of others")
    (output / "clusters.json").write_text("{}")
    assert forget_other_clusters(dataset, encoder, output), "damaged"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_centroids": 3}, "holds 2 centroids, --num-centroids is 3"),
        ({"num_centroids": 2, "pca": 2}, r"of width \d+, --pca is 2"),
    ],
)
def test_starting_centroids_that_cannot_fit_are_refused_before_any_vector(
    pictures, tmp_path, monkeypatch, config, message
):
    manifest = load_manifest(pictures)
    cluster(manifest, ClusterConfig(2), output=tmp_path / "first")

    def no_vectors(*args, **options):
        raise AssertionError("vectors were made")

    monkeypatch.setattr(pipeline, "extract", no_vectors)
    wanted = ClusterConfig(init=tmp_path / "first", **config)
    with pytest.raises(DataPipelineError, match=message):
        cluster(manifest, wanted, output=tmp_path / "second")


def test_starting_centroids_of_another_space_are_reported(pictures, tmp_path):
    manifest = load_manifest(pictures)
    first = tmp_path / "first"
    cluster(manifest, ClusterConfig(2), output=first)
    lines: list[str] = []
    config = ClusterConfig(2, init=first)
    cluster(manifest, config, output=tmp_path / "same", report=lines.append)
    assert not any("WARNING" in line for line in lines)
    _, record, _ = pipeline.load_centroids(first)
    centroids = np.load(first / "centroids.npy")
    save_centroids(first, centroids=centroids, details={**record, "weights_sha256": "others"})
    cluster(manifest, config, output=tmp_path / "other", report=lines.append)
    assert any("WARNING" in line and "weights_sha256" in line for line in lines)
