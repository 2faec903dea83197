"""The commands on labels: `cluster` (features -> centroids), `label` (features -> nearest)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataPipelineError
from ..shards.manifest import Manifest
from .features import FeatureConfig, extract, load_features
from .kmeans import (
    PARTIAL_NAME,
    PartialCentroids,
    check_features,
    load_centroids,
    save_centroids,
    spherical_kmeans,
)
from .labels import nearest_centroids, save_labels
from .near_duplicates import representatives
from .projection import Projection, fit_projection

FEATURES_NAME = "features"


def quiet(line: str) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class ClusterConfig:
    """How a set is clustered.

    features: where vectors come from; pca: principal components that are kept of them, None: all
    directions. near_duplicates: cosine from which samples count as one, None: all count. init:
    folder of centroids to start from.
    """

    num_centroids: int
    features: FeatureConfig = FeatureConfig()
    pca: int | None = None
    seed: int = 0
    num_iterations: int = 25
    near_duplicates: float | None = None
    init: Path | None = None


def cluster(
    manifest: Manifest,
    config: ClusterConfig,
    output: Path,
    features_folder: Path | None = None,
    report=quiet,
) -> np.ndarray:
    """Cluster a packed set and write centroids.npy and clusters.json to `output`. Features are kept
    in `features_folder` (OUTPUT/features); a run that was killed goes on from the shards and
    iterations that were done.

    Returns the centroids float32 [K, D]. Raises DataPipelineError for an impossible number of
    centroids.
    """
    folder = features_folder or output / FEATURES_NAME
    raw = _features(manifest, config.features, folder, report)
    check_features(raw, 1)
    projection = fit_projection(raw, centred=config.features.encoder is None, dims=config.pca)
    features = projection(raw)
    details: dict[str, Any] = {
        "manifest_sha256": manifest.sha256,
        "features": asdict(config.features),
        "weights_sha256": config.features.weights_sha256(),
        "pca": config.pca,
        "seed": config.seed,
        "num_iterations": config.num_iterations,
        "near_duplicates": config.near_duplicates,
        "feature_mean": projection.mean.tolist(),
    }
    if config.near_duplicates is not None:
        groups = representatives(features, config.near_duplicates)
        features = features[np.unique(groups)]
        details["near_duplicates_removed"] = len(groups) - len(features)
        report(f"{len(groups) - len(features)} of {len(groups)} samples are near-duplicates")
    centroids, details = _centroids(features, config, output, details, report)
    save_centroids(output, centroids, details, projection.components)
    return centroids


def label(
    manifest: Manifest,
    centroids_folder: Path,
    num_labels: int,
    output: Path,
    features_folder: Path | None = None,
    report=quiet,
) -> np.ndarray:
    """Write labels.npy and labels.json of a packed set to `output`; returns labels int32 [N, L].

    Features are computed as `cluster` did, or taken from where it left them when it was the same
    set. Raises MissingData or DataPipelineError.
    """
    centroids, record, components = load_centroids(centroids_folder)
    config = FeatureConfig(**record["features"])
    if config.weights_sha256() != record["weights_sha256"]:
        raise DataPipelineError(
            f"{config.encoder} changed since {centroids_folder} was made from it: cluster again"
        )
    same_set = record["manifest_sha256"] == manifest.sha256
    beside = centroids_folder if same_set else output
    folder = features_folder or beside / FEATURES_NAME
    raw = _features(manifest, config, folder, report)
    projection = Projection(np.array(record["feature_mean"], np.float32), components)
    labels, how = nearest_centroids(projection(raw), centroids, num_labels)
    details = {"centroids_sha256": record["sha256"], **how}
    save_labels(output, labels, manifest, len(centroids), details)
    return labels


def _features(manifest: Manifest, config: FeatureConfig, folder: Path, report) -> np.ndarray:
    """Raw vectors of all samples, extracted where they are not there yet."""
    extract(manifest, config, folder, report=report)
    return load_features(manifest, folder)[0]


def _centroids(features, config: ClusterConfig, output: Path, details: dict, report):
    """(centroids, details with what happened); goes on from a block that was saved."""
    initial = None
    if config.init is not None:
        initial, record, _ = load_centroids(config.init)
        details = {**details, "started_from_sha256": record["sha256"]}
    partial = PartialCentroids(output, {**details, "num_centroids": config.num_centroids})
    saved, done = partial.load()
    if done:
        initial = saved
        report(f"going on after {done} iterations, from {output / PARTIAL_NAME}")
    rest = max(0, config.num_iterations - done)
    centroids, found = spherical_kmeans(
        features, config.num_centroids, config.seed, rest, initial, partial.saver(done)
    )
    if found.repaired_empty or found.repaired_duplicate:
        report(
            f"repaired {found.repaired_empty} empty and {found.repaired_duplicate} repeated "
            "centroids"
        )
    partial.remove()
    return centroids, {**details, **asdict(found)}
