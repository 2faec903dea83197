"""The nearest centroids of every sample, nearest first:
labels.npy, a side file bound to its manifest.

    labels.npy    int32 [N, L], row = sample id; -1 pads a row and is ignored by the loss
    labels.json   manifest sha256, number of classes, sha256 of labels.npy

Clustering again rewrites these two files and no shard.
"""

import json
from pathlib import Path

import numpy as np

from model_factory.files import file_sha256, write_atomically

from ..errors import CorruptShard, DataPipelineError, MissingData
from ..labelled_lists import ids_of_sources, read_labelled_jsonl
from ..records import read_record
from ..shards.manifest import Manifest
from ..shards.writer import write_array
from .search import CentroidSearch, judges

LABELS_NAME = "labels.npy"
RECORD_NAME = "labels.json"


def nearest_centroids(
    features: np.ndarray, centroids: np.ndarray, num_labels: int
) -> tuple[np.ndarray, dict]:
    """int32 [N, num_labels]: centroids by falling cosine, -1 where there are fewer; and how they
    were found.
    """
    find = CentroidSearch(centroids, num_labels, judges(features))
    return padded(find(features), num_labels), find.how


def padded(labels: np.ndarray, width: int) -> np.ndarray:
    """int32 [N, width] of labels [N, L], -1 beyond L."""
    wide = np.full((len(labels), width), -1, np.int32)
    wide[:, : labels.shape[1]] = labels
    return wide


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


def are_clusters(directory: Path) -> bool:
    """Whether labels are nearest centroids, which may be made again, or came from outside."""
    return "centroids_sha256" in read_record(directory / RECORD_NAME)


def import_labels(manifest: Manifest, path: Path, num_classes: int, width: int) -> np.ndarray:
    """Labels int32 [N, width] from a list of ours or of somebody else, -1 where a sample has fewer:

        FILE.npy     integers [N, L] in the order of sample ids, -1 for none
        FILE.jsonl   a line {"source": relative path, "labels": [..]} for each sample, in any order

    MissingData names samples without a line; DataPipelineError names labels that are no class,
    lines for no sample, second lines for one, and lists of another length.
    """
    if path.suffix == ".npy":
        rows = _array_rows(manifest, path, num_classes)
    else:
        rows = _listed_rows(manifest, path, num_classes)
    labels = np.full((len(manifest), width), -1, np.int32)
    for number, row in enumerate(rows):
        labels[number, : min(width, len(row))] = row[:width]
    return labels


def _array_rows(manifest: Manifest, path: Path, num_classes: int) -> np.ndarray:
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataPipelineError(f"{path} is no array of numbers: {error}") from error
    if not isinstance(rows, np.ndarray):
        raise DataPipelineError(f"{path} holds several arrays (npz): save one, integers [N, L]")
    if rows.ndim != 2 or len(rows) != len(manifest) or rows.dtype.kind not in "iu":
        raise DataPipelineError(
            f"{path} holds {rows.dtype} {list(rows.shape)}{_first_fraction(rows)}; expected "
            f"integers [{len(manifest)}, L], a row for each sample"
        )
    # Checked before any cast: a large uint64 would become a valid int32.
    wrong = np.argwhere((rows < -1) | (rows >= num_classes))
    if len(wrong):
        row, column = wrong[0]
        raise DataPipelineError(
            f"{path} row {row}: label {rows[row, column]}, but classes are 0 to {num_classes - 1} "
            "and -1 for none"
        )
    return rows


def _first_fraction(rows: np.ndarray) -> str:
    """Where an array of floats first holds what is no integer, NaN among it."""
    if rows.dtype.kind != "f" or rows.ndim != 2:
        return ""
    wrong = np.argwhere(~(rows == np.floor(rows)) | np.isinf(rows))
    if not len(wrong):
        return ""
    row, column = wrong[0]
    return f", row {row}: {rows[row, column]} is no integer"


def _listed_rows(manifest: Manifest, path: Path, num_classes: int) -> list[list[int]]:
    rejected = {entry["source"] for shard in manifest.shards for entry in shard["rejected"]}
    ids = ids_of_sources(manifest)
    listed = read_labelled_jsonl(path, ids=ids, others=rejected, num_classes=num_classes)
    absent = [source for source, number in ids.items() if number not in listed]
    if absent:
        raise MissingData(f"{path} has no line for {len(absent)} samples, {absent[0]!r} first")
    return [listed[number] for number in range(len(manifest))]


def stale_labels(directory: Path, manifest: Manifest) -> str | None:
    """What to tell of labels that were made before the folder was packed anew or appended to; None
    where there are none, or they fit. CorruptShard for a damaged record.
    """
    record_path = directory / RECORD_NAME
    if not record_path.is_file():
        return None
    record = read_record(record_path, "manifest_sha256")
    if record["manifest_sha256"] == manifest.sha256:
        return None
    again = "--centroids CENTROIDS" if "centroids_sha256" in record else "--from LABELS"
    output = "" if directory == manifest.directory else f" --output {directory}"
    return (
        f"{directory / LABELS_NAME} is stale: it labels what {manifest.directory} held before. "
        f"Label again: `python -m data_pipeline label {manifest.directory} {again}{output}`"
    )


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
    record = read_record(record_path, "manifest_sha256", "num_classes", "sha256")
    stale = stale_labels(directory, manifest)
    if stale is not None:
        raise CorruptShard(stale)
    path = directory / LABELS_NAME
    if not path.is_file() or file_sha256(path) != record["sha256"]:
        raise CorruptShard(f"{path} is missing, or changed since it was written: label again")
    labels = np.load(path, allow_pickle=False)
    if (
        labels.shape[0] != len(manifest)
        or labels.min() < -1
        or labels.max() >= record["num_classes"]
    ):
        raise CorruptShard(
            f"{path} is {labels.shape} with ids {labels.min()}..{labels.max()}, "
            f"expected {len(manifest)} rows and ids below {record['num_classes']}"
        )
    return labels, record["num_classes"]
