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

EXACT = 1 << 17  # centroids up to which every one is compared
RECALL = 0.99
JUDGED = 1000  # samples that judge an approximate search
WORTHWHILE = 4  # a search in more than a fourth of the cells is left to the exact one
PIECE = 1 << 14  # queries at a time
LABELS_NAME = "labels.npy"
RECORD_NAME = "labels.json"


def nearest_centroids(
    features: np.ndarray, centroids: np.ndarray, num_labels: int
) -> tuple[np.ndarray, dict]:
    """int32 [N, num_labels]: centroids by falling cosine, -1 where there are fewer; and how they
    were found: exactly up to EXACT centroids and where samples lie badly in cells, else in the
    cells of an inverted file, as many as are needed for a measured recall of RECALL.
    """
    count = min(num_labels, len(centroids))
    if len(centroids) <= EXACT:
        labels, how = search(features, centroids, count), {"search": "exact", "recall": 1.0}
    else:
        labels, how = _search_cells(features, centroids, count)
    padded = np.full((len(features), num_labels), -1, np.int32)
    padded[:, :count] = labels
    return padded, how


def search(queries: np.ndarray, points: np.ndarray, count: int, with_cosines: bool = False):
    """The `count` points of largest cosine for each query, int64 [N, count]; exact, in pieces."""
    import faiss

    index = faiss.IndexFlatIP(points.shape[1])
    index.add(np.ascontiguousarray(points, np.float32))
    return _search_in_pieces(index, queries, count, with_cosines)


def _search_in_pieces(index, queries, count, with_cosines=False):
    found = [
        index.search(np.ascontiguousarray(queries[start : start + PIECE], np.float32), count)
        for start in range(0, len(queries), PIECE)
    ]
    cosines, nearest = (np.concatenate(part) for part in zip(*found, strict=True))
    return (nearest, cosines) if with_cosines else nearest


def _search_cells(features, centroids, count) -> tuple[np.ndarray, dict]:
    import faiss

    num_cells = int(len(centroids) ** 0.5)
    quantizer = faiss.IndexFlatIP(centroids.shape[1])
    index = faiss.IndexIVFFlat(quantizer, centroids.shape[1], num_cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(np.ascontiguousarray(centroids, np.float32))
    index.add(np.ascontiguousarray(centroids, np.float32))
    some = features[np.unique(np.linspace(0, len(features) - 1, JUDGED).astype(np.int64))]
    truth = search(some, centroids, count)
    index.nprobe, recall = 4, 0.0
    while recall < RECALL:
        index.nprobe *= 2
        if index.nprobe * WORTHWHILE > num_cells:  # nothing to gain from cells
            return search(features, centroids, count), {"search": "exact", "recall": 1.0}
        recall = recall_of(_search_in_pieces(index, some, count), truth)
    how = {"search": f"{index.nprobe} of {num_cells} cells", "recall": round(recall, 4)}
    return _search_in_pieces(index, features, count), how


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true neighbours [N, L] that are among the found ones [N, L]."""
    return float((found[:, :, None] == truth[:, None, :]).any(axis=1).mean())


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
