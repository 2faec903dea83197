"""The two commands on labels: `cluster` (features -> centroids) and `label` (features -> nearest).

Codec descriptors share a large common part, so their mean over the clustered set is taken away;
it is stored with the centroids, so that another set is labelled in the same space.
"""

from pathlib import Path

import numpy as np

from ..errors import DataPipelineError, MissingData
from ..shards.manifest import Manifest
from ..shards.writer import file_sha256
from .features import descriptor_features, encoder_features, encoder_weights, normalise
from .kmeans import load_centroids, save_centroids, spherical_kmeans
from .labels import nearest_centroids, save_labels


def cluster(
    manifest: Manifest,
    num_centroids: int,
    output: Path,
    encoder: str | None = None,
    seed: int = 0,
    num_iterations: int = 25,
) -> np.ndarray:
    """Cluster a packed set and write centroids.npy and clusters.json to `output`.

    encoder: Hugging Face folder of a packing model; None takes the codec descriptor. Returns the
    centroids float32 [K, D]. Raises DataPipelineError for an impossible number of centroids.
    """
    if len(manifest) == 0:
        raise MissingData(
            f"{manifest.directory} holds no sample: see `python -m data_pipeline stats`"
        )
    raw = descriptor_features(manifest) if encoder is None else encoder_features(manifest, encoder)
    mean = raw.mean(axis=0) if encoder is None else np.zeros(raw.shape[1], np.float32)
    centroids = spherical_kmeans(normalise(raw - mean), num_centroids, seed, num_iterations)
    details = {
        "manifest_sha256": manifest.sha256,
        "encoder": encoder,
        "encoder_sha256": encoder and file_sha256(encoder_weights(encoder)),
        "seed": seed,
        "feature_mean": mean.tolist(),
    }
    save_centroids(output, centroids, details)
    return centroids


def label(manifest: Manifest, centroids_folder: Path, num_labels: int, output: Path) -> np.ndarray:
    """Write labels.npy and labels.json of a packed set to `output`; returns labels int32 [N, L].

    Features are computed as `cluster` did. Raises MissingData or DataPipelineError.
    """
    centroids, record = load_centroids(centroids_folder)
    encoder = record["encoder"]
    if encoder and file_sha256(encoder_weights(encoder)) != record["encoder_sha256"]:
        raise DataPipelineError(
            f"{encoder} changed since {centroids_folder} was made from it: cluster again"
        )
    raw = descriptor_features(manifest) if encoder is None else encoder_features(manifest, encoder)
    features = normalise(raw - np.array(record["feature_mean"], np.float32))
    labels = nearest_centroids(features, centroids, num_labels)
    save_labels(output, labels, manifest, len(centroids), {"centroids_sha256": record["sha256"]})
    return labels
