"""Spherical k-means by FAISS: features -> unit centroids, the classes of cluster discrimination."""

import json
from pathlib import Path

import numpy as np

from ..errors import DataPipelineError, MissingData
from ..shards.writer import file_sha256, write_array, write_atomically
from .features import normalise

CENTROIDS_NAME = "centroids.npy"
RECORD_NAME = "clusters.json"


def spherical_kmeans(
    features: np.ndarray, num_centroids: int, seed: int = 0, num_iterations: int = 25
) -> np.ndarray:
    """Unit centroids float32 [num_centroids, D] of unit features float32 [N, D].

    Raises DataPipelineError for more centroids than features and for NaN or infinite features.
    """
    import faiss

    if num_centroids < 1 or num_centroids > len(features):
        raise DataPipelineError(
            f"--num-centroids is {num_centroids}, must be 1 to {len(features)}, the number of "
            "samples"
        )
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        raise DataPipelineError(
            f"{len(bad)} features are not finite, the first is of sample {bad[0]}"
        )
    solver = faiss.Kmeans(
        features.shape[1],
        num_centroids,
        niter=num_iterations,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=1 << 20,
        gpu=hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0,
    )
    solver.train(np.ascontiguousarray(features, np.float32))
    return normalise(solver.centroids)


def save_centroids(directory: Path, centroids: np.ndarray, details: dict) -> None:
    """Write centroids.npy and the record clusters.json that describes and binds it."""
    directory.mkdir(parents=True, exist_ok=True)
    write_array(directory / CENTROIDS_NAME, centroids)
    record = {
        "num_centroids": len(centroids),
        "dim": centroids.shape[1],
        "sha256": file_sha256(directory / CENTROIDS_NAME),
        **details,
    }
    write_atomically(directory / RECORD_NAME, json.dumps(record, indent=1, sort_keys=True).encode())


def load_centroids(directory: Path) -> tuple[np.ndarray, dict]:
    """Centroids float32 [K, D] and their record;
    MissingData or DataPipelineError names what is wrong.
    """
    if not (directory / RECORD_NAME).is_file():
        raise MissingData(
            f"{directory} holds no {RECORD_NAME}: make it with `python -m data_pipeline cluster`"
        )
    record = json.loads((directory / RECORD_NAME).read_bytes())
    if file_sha256(directory / CENTROIDS_NAME) != record["sha256"]:
        raise DataPipelineError(
            f"{directory / CENTROIDS_NAME} is not the file that {RECORD_NAME} binds: cluster again"
        )
    return np.load(directory / CENTROIDS_NAME, allow_pickle=False), record
