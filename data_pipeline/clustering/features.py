"""Shards -> one vector per sample, in a folder that says of what they were made.

    FOLDER/features.json     what was read by what: manifest, settings, hash of the weights
    FOLDER/SHARD.npy         float32 [n, D], one row per sample of the shard
    FOLDER/SHARD.json        its sha256 and what it was made of; written last, so a shard without it
                             is not done

Both JSON files carry their own digest.

Work is cut by shards: finished ones are kept, several jobs share a folder by task numbers.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from model_factory.command_line.plain_text import show
from model_factory.files import DamagedFile, file_sha256, write_json, writing_into

from ..errors import CorruptShard, DataPipelineError, MissingData
from ..shards.existing import remove_temporary
from ..shards.manifest import Manifest
from ..side_files import read_array, read_record, write_array
from .feature_sources import FeatureConfig, source_of

RECORD_NAME = "features.json"
RECORD_FIELDS = {"config": dict, "origin": dict}
SHARD_FIELDS = {"rows": int, "origin": str, "sha256": str}


def extract(
    manifest: Manifest,
    config: FeatureConfig,
    folder: Path,
    task_id: int = 0,
    num_tasks: int = 1,
    report=show,
) -> bool:
    """Write the vectors of shards task_id, task_id + num_tasks, ... that are not there yet; whether
    all shards are done now, by whomever.

    Raises DataPipelineError when the folder holds features of something else.
    """
    from tqdm import tqdm

    if len(manifest) == 0:
        raise MissingData(
            f"{manifest.directory} holds no sample: see `python -m data_pipeline stats "
            f"{shlex.quote(str(manifest.directory))}`"
        )
    if not 0 <= task_id < num_tasks:
        raise ValueError(f"--task-id {task_id} must be 0 to {num_tasks - 1} with {num_tasks} tasks")
    origin = origin_of(manifest, config, config.weights_sha256())
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / RECORD_NAME
    if not is_of(folder, origin):
        raise DataPipelineError(
            f"{folder} holds features of other samples, settings or weights: name another folder, "
            "or remove it"
        )
    whole = {"config": asdict(config), "origin": origin}
    write_json(record, whole)
    done = _Done(folder, origin, report)
    todo = [
        place
        for place in range(task_id, len(manifest.shards), num_tasks)
        if manifest.shards[place]["samples"] and not done.has(manifest.shards[place])
    ]
    if todo:
        rows_of = source_of(manifest, config)
        for place in tqdm(todo, desc="features", unit="shard", disable=None):
            ids = range(int(manifest.starts[place]), int(manifest.starts[place + 1]))
            rows = _finite(rows_of(ids), manifest, ids)
            with writing_into(folder):
                done.add(manifest.shards[place], rows)
    missing = [s["name"] for s in manifest.shards if s["samples"] and not done.has(s)]
    if missing:
        report(f"{len(missing)} shards are still to be done by other tasks, {missing[0]} first")
    return not missing


def origin_of(manifest: Manifest, config: FeatureConfig, weights_sha256: str | None) -> dict:
    """What vectors are made of: samples, settings and weights, wherever those lie."""
    return {"manifest_sha256": manifest.sha256, **config.identity(weights_sha256)}


def is_of(folder: Path, origin: dict) -> bool:
    """Whether a folder may take features of this origin: it holds none, or such."""
    return not (folder / RECORD_NAME).is_file() or read_features_record(folder)["origin"] == origin


def is_complete(manifest: Manifest, folder: Path, origin: dict) -> bool:
    """Whether a folder holds the features of this origin of every sample."""
    if not (folder / RECORD_NAME).is_file() or not is_of(folder, origin):
        return False
    done = _Done(folder, origin)
    return all(done.has(shard) for shard in manifest.shards if shard["samples"])


def read_features_record(folder: Path) -> dict:
    """The record of a folder of features; CorruptShard for a damaged one."""
    again = "remove it and run the command that made it again, which keeps the vectors"
    return read_record(folder / RECORD_NAME, fields=RECORD_FIELDS, again=again)


def read_vectors(path: Path, width: int | None = None) -> np.ndarray:
    """Vectors float32 [n, D] of a shard, of the file FOLDER/SHARD.npy, bound by the record beside
    it; CorruptShard for damaged ones, and for another width than the one given."""
    record = _shard_record(path.with_suffix(".json"))
    again = "remove it and run the command that made it again"
    shape = (record["rows"], width)
    return read_array(path, sha256=record["sha256"], dtype=np.float32, shape=shape, again=again)


def _shard_record(path: Path) -> dict:
    again = "remove it and run the command that made it again"
    return read_record(path, fields=SHARD_FIELDS, again=again)


def load_features(manifest: Manifest, folder: Path) -> tuple[np.ndarray, FeatureConfig]:
    """Vectors float32 [N, D] in the order of sample ids, and where they come from; errors as of
    feature_pieces."""
    pieces = list(feature_pieces(manifest, folder))
    return np.concatenate(pieces), features_config(manifest, folder)


def features_config(manifest: Manifest, folder: Path) -> FeatureConfig:
    """Where the vectors of a folder come from; MissingData or DataPipelineError when they are not
    there, or of another set."""
    record = folder / RECORD_NAME
    if not record.is_file():
        raise MissingData(
            f"{record} does not exist: make it with {_how_to_extract(manifest, folder)}"
        )
    whole = read_features_record(folder)
    if whole["origin"].get("manifest_sha256") != manifest.sha256:
        raise DataPipelineError(f"{folder} holds features of another set than {manifest.directory}")
    try:
        return FeatureConfig.of(whole["config"], name=str(record))
    except DamagedFile as error:
        raise CorruptShard(str(error)) from error


def _how_to_extract(manifest: Manifest, folder: Path) -> str:
    folders = [shlex.quote(str(path)) for path in (manifest.directory, folder)]
    return f"`python -m data_pipeline features {folders[0]} --output {folders[1]}`"


def feature_pieces(manifest: Manifest, folder: Path) -> Iterator[np.ndarray]:
    """Vectors float32 [n, D] of one shard after the other.

    Raises MissingData for unfinished folders, CorruptShard for changed files, DataPipelineError for
    features of another set.
    """
    features_config(manifest, folder)
    done = _Done(folder, read_features_record(folder)["origin"])
    width = None
    for shard in manifest.shards:
        if shard["samples"]:
            rows = done.read(shard, width)
            width = rows.shape[1]
            yield rows


def quiet(line: str) -> None:
    """Report to nobody."""


class _Done:
    """Shards of one origin in a folder."""

    def __init__(self, folder: Path, origin: dict, report=quiet):
        self._folder = folder
        self._report = report
        text = json.dumps(origin, sort_keys=True)
        self._origin = hashlib.sha256(text.encode()).hexdigest()

    def has(self, shard: dict) -> bool:
        """Whether a shard's vectors are there; a damaged record is reported and counts as none."""
        path = self._folder / f"{shard['name']}.json"
        if not path.is_file() or not path.with_suffix(".npy").is_file():
            return False
        try:
            record = _shard_record(path)
        except CorruptShard as error:
            self._report(f"{error}; not believed")
            return False
        return record["rows"] == len(shard["samples"]) and record["origin"] == self._origin

    def add(self, shard: dict, rows: np.ndarray) -> None:
        """Write a shard's vectors."""
        path = self._folder / f"{shard['name']}.npy"
        remove_temporary(self._folder, shard["name"])
        write_array(path, rows.astype(np.float32, copy=False))
        facts = {"sha256": file_sha256(path), "rows": len(rows), "origin": self._origin}
        write_json(path.with_suffix(".json"), facts)

    def read(self, shard: dict, width: int | None) -> np.ndarray:
        """A shard's vectors, checked."""
        path = self._folder / f"{shard['name']}.npy"
        if path.with_suffix(".json").is_file():
            _shard_record(path.with_suffix(".json"))  # a damaged one is named, not "not done"
        if not self.has(shard):
            raise MissingData(
                f"{self._folder}: {shard['name']} is not done: run the `features` command of that "
                "folder again"
            )
        return read_vectors(path, width)


def _finite(rows: np.ndarray, manifest: Manifest, ids: range) -> np.ndarray:
    """Rows as they are; DataPipelineError names the first sample whose row is not finite."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        sample = ids[int(bad[0])]
        raise DataPipelineError(
            f"the vector of sample {sample} ({manifest.sources()[sample]}) is not finite: look at "
            "the sample and at the encoder's weights"
        )
    return rows
