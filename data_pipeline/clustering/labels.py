"""The nearest centroids of every sample, nearest first:
labels.npy, a side file bound to its manifest.

    labels.npy    int32 [N, L], row = sample id; -1 pads a row and is ignored by the loss
    labels.json   manifest sha256, number of classes, sha256 of labels.npy

Clustering again rewrites these two files and no shard.
"""

import json
from pathlib import Path

import numpy as np

from ..errors import CorruptShard, MissingData
from ..shards.manifest import Manifest
from ..shards.writer import file_sha256, write_array, write_atomically

LABELS_NAME = "labels.npy"
RECORD_NAME = "labels.json"


def nearest_centroids(features: np.ndarray, centroids: np.ndarray, num_labels: int) -> np.ndarray:
    """int32 [N, min(num_labels, K)]: centroids by falling cosine, exact search by FAISS."""
    import faiss

    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, np.float32))
    _, nearest = index.search(
        np.ascontiguousarray(features, np.float32), min(num_labels, len(centroids))
    )
    return nearest.astype(np.int32)


def save_labels(
    directory: Path, labels: np.ndarray, manifest: Manifest, num_classes: int, details: dict
) -> None:
    """Write labels.npy and labels.json."""
    directory.mkdir(parents=True, exist_ok=True)
    write_array(directory / LABELS_NAME, labels.astype(np.int32))
    record = {
        "manifest_sha256": manifest.sha256,
        "num_classes": num_classes,
        "num_labels": labels.shape[1],
        "sha256": file_sha256(directory / LABELS_NAME),
        **details,
    }
    write_atomically(directory / RECORD_NAME, json.dumps(record, indent=1, sort_keys=True).encode())


def load_labels(directory: Path, manifest: Manifest) -> tuple[np.ndarray, int]:
    """Labels int32 [N, L] of a manifest and the number of classes.

    Raises MissingData without files, CorruptShard for labels of another manifest, changed bytes or
    ids out of range.
    """
    record_path = directory / RECORD_NAME
    if not record_path.is_file():
        raise MissingData(
            f"{record_path} does not exist: make it with `python -m data_pipeline cluster "
            f"{manifest.directory} "
            "--num-centroids K --output CENTROIDS` and `python -m data_pipeline label "
            f"{manifest.directory} "
            "--centroids CENTROIDS`"
        )
    record = json.loads(record_path.read_bytes())
    if record["manifest_sha256"] != manifest.sha256:
        raise CorruptShard(
            f"{record_path} belongs to another version of {manifest.directory}: label it again"
        )
    if file_sha256(directory / LABELS_NAME) != record["sha256"]:
        raise CorruptShard(f"{directory / LABELS_NAME} changed since it was written: label again")
    labels = np.load(directory / LABELS_NAME, allow_pickle=False)
    if (
        labels.shape[0] != len(manifest)
        or labels.min() < -1
        or labels.max() >= record["num_classes"]
    ):
        raise CorruptShard(
            f"{directory / LABELS_NAME} is {labels.shape} with ids {labels.min()}..{labels.max()}, "
            f"expected {len(manifest)} rows and ids below {record['num_classes']}"
        )
    return labels, record["num_classes"]
