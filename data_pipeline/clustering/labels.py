"""Labels of every sample: its nearest centroids, nearest first, or imported ones. labels.npy is a
side file bound to its manifest.

    labels.npy    int32 [N, L], row = sample id; -1 pads a row and is ignored by the loss
    labels.json   manifest sha256, number of classes, sha256 of labels.npy; its own digest

Clustering again rewrites these two files and no shard.
"""

import shlex
from pathlib import Path

import numpy as np

from model_factory.files import file_sha256, write_json

from ..errors import CorruptShard, DataPipelineError, MissingData
from ..lists import ids_of_sources, read_labelled_jsonl
from ..shards.manifest import Manifest
from ..side_files import read_array, read_foreign_array, read_record, write_array
from .kmeans import how_to_cluster

LABELS_NAME = "labels.npy"
RECORD_NAME = "labels.json"
RECORD_FIELDS = {"manifest_sha256": str, "num_classes": int, "num_labels": int, "sha256": str}


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
    # after the array: a kill between the two leaves a record that does not bind it
    record = {
        "manifest_sha256": manifest.sha256,
        "num_classes": num_classes,
        "num_labels": labels.shape[1],
        "sha256": file_sha256(directory / LABELS_NAME),
        **details,
    }
    write_json(directory / RECORD_NAME, record)


def read_labels_record(directory: Path, shards: Path) -> dict:
    """The record of the labels in a folder, which label the packed folder `shards`.

    MissingData where there is none, CorruptShard for a damaged one and one of an older version.
    """
    path = directory / RECORD_NAME
    again = how_to_label(shards, directory)
    if not path.is_file():
        raise MissingData(
            f"{path} does not exist: make it with {how_to_cluster(shards, 'CENTROIDS')} and {again}"
        )
    record = read_record(path, fields=RECORD_FIELDS, again=f"label again: {again}")
    # positive: a head has as many rows, and labels.npy as many columns
    for key in ("num_classes", "num_labels"):
        if record[key] < 1:
            raise CorruptShard(f"{path}: {key} is {record[key]}; label again: {again}")
    return record


def how_to_label(shards: Path, output: Path, record: dict | None = None) -> str:
    """The command that labels a packed folder, as far as it is known. For imported labels, the
    command that imports them (if `record` is given)."""
    command = ["python -m data_pipeline label", shlex.quote(str(shards))]
    if record is None or "centroids_sha256" in record:
        command.append("--centroids CENTROIDS")
    else:
        command.append(f"--from LABELS --num-classes {record['num_classes']}")
    if record is not None:
        command.append(f"--num-labels {record['num_labels']}")
    if output != shards:
        command.append(f"--output {shlex.quote(str(output))}")
    return f"`{' '.join(command)}`"


def import_labels(manifest: Manifest, path: Path, num_classes: int, width: int) -> np.ndarray:
    """Labels int32 [N, width] from a list of ours or of somebody else: the first `width` of each
    sample, -1 where it has fewer.

        FILE.npy     integers [N, L] in the order of sample ids, -1 for none
        FILE.jsonl   a line {"source": relative path, "labels": [..]} for each sample, in any order

    MissingData names samples without a line; DataPipelineError names labels that are no class,
    lines for no sample, second lines for one, and arrays with another number of rows.
    """
    rows: np.ndarray | list[list[int]]
    if path.suffix == ".npy":
        rows = _array_rows(manifest, path=path, num_classes=num_classes)
    else:
        rows = _listed_rows(manifest, path=path, num_classes=num_classes)
    labels = np.full((len(manifest), width), -1, np.int32)
    # row by row, since lists of a .jsonl have lengths of their own
    for number, row in enumerate(rows):
        count = min(width, len(row))
        labels[number, :count] = row[:count]
    return labels


def _array_rows(manifest: Manifest, path: Path, num_classes: int) -> np.ndarray:
    rows = read_foreign_array(path)
    # in this order: an array without dimensions has no length
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
    # NaN equals nothing, so it counts as no integer
    is_whole = rows == np.floor(rows)
    wrong = np.argwhere(~is_whole | np.isinf(rows))
    if not len(wrong):
        return ""
    row, column = wrong[0]
    return f", row {row}: {rows[row, column]} is no integer"


def _listed_rows(manifest: Manifest, path: Path, num_classes: int) -> list[list[int]]:
    # a list may name all inputs, those without a sample too
    rejected = {entry["source"] for shard in manifest.shards for entry in shard["rejected"]}
    ids = ids_of_sources(manifest)
    listed = read_labelled_jsonl(path, ids=ids, others=rejected, num_classes=num_classes)
    absent = [source for source, number in ids.items() if number not in listed]
    if absent:
        raise MissingData(f"{path} has no line for {len(absent)} samples, {absent[0]!r} first")
    return [listed[number] for number in range(len(manifest))]


def stale_labels(directory: Path, manifest: Manifest) -> str | None:
    """A warning of labels that were made before the folder was packed anew or appended to, or whose
    record is damaged; None where there are none, or they fit.
    """
    if not (directory / RECORD_NAME).is_file():
        return None
    try:
        record = read_labels_record(directory, manifest.directory)
    except CorruptShard as error:
        return str(error)
    return _staleness(directory, manifest=manifest, record=record)


def _staleness(directory: Path, manifest: Manifest, record: dict) -> str | None:
    if record["manifest_sha256"] == manifest.sha256:
        return None
    return (
        f"{directory / LABELS_NAME} is stale: it labels what {manifest.directory} held before. "
        f"Label again: {how_to_label(manifest.directory, output=directory, record=record)}"
    )


def are_clusters(directory: Path, manifest: Manifest) -> bool:
    """Whether labels are nearest centroids, which may be made again, or came from outside."""
    return "centroids_sha256" in read_labels_record(directory, manifest.directory)


def load_labels(directory: Path, manifest: Manifest) -> tuple[np.ndarray, int]:
    """Labels int32 [N, L] of a manifest and the number of classes.

    Raises MissingData without files, CorruptShard for labels of another manifest, changed bytes or
    ids out of range.
    """
    record = read_labels_record(directory, manifest.directory)
    stale = _staleness(directory, manifest=manifest, record=record)
    if stale is not None:
        raise CorruptShard(stale)
    labels = read_labels_array(directory, record=record, shards=manifest.directory)
    if len(labels) != len(manifest):
        command = how_to_label(manifest.directory, output=directory, record=record)
        raise CorruptShard(
            f"{directory / LABELS_NAME} has {len(labels)} rows, expected {len(manifest)} rows, one "
            f"for each sample; label again: {command}"
        )
    return labels, record["num_classes"]


def read_labels_array(directory: Path, record: dict, shards: Path) -> np.ndarray:
    """Labels int32 [N, L] that a record binds, each a class or -1; CorruptShard for others."""
    command = how_to_label(shards, output=directory, record=record)
    again = f"label again: {command}"
    path = directory / LABELS_NAME
    labels = read_array(
        path,
        sha256=record["sha256"],
        dtype=np.int32,
        shape=(None, record["num_labels"]),
        again=again,
    )
    # on a GPU a label out of range would poison the gradient of a head instead of failing
    if labels.min() < -1 or labels.max() >= record["num_classes"]:
        raise CorruptShard(
            f"{path} has ids {labels.min()}..{labels.max()}, expected -1 and ids below "
            f"{record['num_classes']}: {again}"
        )
    return labels
