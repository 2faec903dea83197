"""Shards -> one vector per sample, in a folder with a record of what they were made of.

    FOLDER/features.json     what was read by what: manifest, settings, hash of the weights
    FOLDER/SHARD.npy         float32 [n, D], one row per sample of the shard
    FOLDER/SHARD.json        its sha256 and what it was made of; written last, so a shard without it
                             is not done

Both JSON files carry their own digest.

Work is cut by shards: finished ones are skipped, several jobs share a folder by task numbers.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from model_factory.command_line.plain_text import show
from model_factory.files import DamagedFile, file_sha256, read_json, write_json, writing_into

from ..errors import CorruptShard, DataPipelineError, MissingData
from ..shards.existing import remove_temporary
from ..shards.manifest import Manifest
from ..side_files import read_array, read_record, write_array
from .feature_sources import FeatureConfig, source_of

RECORD_NAME = "features.json"
RECORD_FIELDS = {"config": dict, "origin": dict}
SHARD_FIELDS = {"rows": int, "origin": str, "sha256": str}
MAKE_AGAIN = "remove it and run the command that made it again"

ReportLine = Callable[[str], object]  # takes one line at a time


def extract(
    manifest: Manifest,
    config: FeatureConfig,
    folder: Path,
    task_id: int = 0,
    num_tasks: int = 1,
    report: ReportLine = show,
) -> bool:
    """Write the vectors of shards task_id, task_id + num_tasks, ... that are not there yet. Returns
    whether all shards are done now, by this task or others.

    Raises DataPipelineError when the folder holds features of something else and for vectors that
    are not finite, CorruptShard for a damaged record of it, MissingData for a set without samples
    and an encoder without weights, and ValueError for a task_id that is none of num_tasks.
    """
    from tqdm import tqdm

    if len(manifest) == 0:
        raise MissingData(
            f"{manifest.directory} holds no sample: see `python -m data_pipeline stats "
            f"{shlex.quote(str(manifest.directory))}`"
        )
    if not 0 <= task_id < num_tasks:
        raise ValueError(f"--task-id {task_id} must be 0 to {num_tasks - 1} with {num_tasks} tasks")
    origin = origin_of(manifest, config=config, weights_sha256=config.weights_sha256())
    folder.mkdir(parents=True, exist_ok=True)
    if not is_of(folder, origin):
        raise DataPipelineError(
            f"{folder} holds features of other samples, settings or weights: name another folder, "
            "or remove it"
        )
    # also where it is there: a folder or an encoder that was moved keeps its origin, not its path
    write_json(folder / RECORD_NAME, {"config": asdict(config), "origin": origin})
    done = _FinishedShards(folder, origin, report)
    own = range(task_id, len(manifest.shards), num_tasks)
    todo = [i for i in own if done.lacks(manifest.shards[i])]
    if todo:  # an encoder takes seconds to load, and is not needed where all is there
        rows_of = source_of(manifest, config)
        for i in tqdm(todo, desc="features", unit="shard", disable=None):
            first = int(manifest.starts[i])
            end = int(manifest.starts[i + 1])
            ids = range(first, end)
            rows = rows_of(ids)
            _check_finite(rows, manifest=manifest, ids=ids)
            with writing_into(folder):  # names the folder if it was removed meanwhile
                done.add(manifest.shards[i], rows)
    # looked for once more, since other tasks have gone on meanwhile
    missing = [shard["name"] for shard in manifest.shards if done.lacks(shard)]
    if missing:
        report(f"{len(missing)} shards are still to be done by other tasks, {missing[0]} first")
    return not missing


def origin_of(manifest: Manifest, config: FeatureConfig, weights_sha256: str | None) -> dict:
    """What vectors are made of: samples, settings and weights, wherever those lie."""
    return {"manifest_sha256": manifest.sha256, **config.identity(weights_sha256)}


def origin_hash(origin: dict) -> str:
    """Hex sha256 of an origin, which stands for it in the record of every shard."""
    text = json.dumps(origin, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_of(folder: Path, origin: dict) -> bool:
    """Whether a folder may take features of this origin: it holds none, or such."""
    return not (folder / RECORD_NAME).is_file() or read_features_record(folder)["origin"] == origin


def is_complete(manifest: Manifest, folder: Path, origin: dict) -> bool:
    """Whether a folder holds the features of this origin of every sample."""
    if not (folder / RECORD_NAME).is_file() or not is_of(folder, origin):
        return False
    done = _FinishedShards(folder, origin)
    return not any(done.lacks(shard) for shard in manifest.shards)


def read_features_record(folder: Path) -> dict:
    """The record of a folder of features; CorruptShard for a damaged one, FileNotFoundError where
    there is none."""
    again = f"{MAKE_AGAIN}, which keeps the vectors"
    return read_record(folder / RECORD_NAME, fields=RECORD_FIELDS, again=again)


def read_vectors(
    path: Path, width: int | None = None, origin_sha256: str | None = None
) -> np.ndarray:
    """Vectors float32 [n, D] of a shard, of the file FOLDER/SHARD.npy, bound by the record beside
    it; CorruptShard for damaged ones, and for another width than the one given. FileNotFoundError
    where there is no record."""
    record = _shard_record(path.with_suffix(".json"))
    # origin_sha256: of an origin (origin_hash) that the vectors must have
    if origin_sha256 is not None and record["origin"] != origin_sha256:
        raise CorruptShard(
            f"{path} holds vectors of other samples, settings or weights than {RECORD_NAME} beside "
            f"it says: {MAKE_AGAIN}"
        )
    return read_array(
        path,
        sha256=record["sha256"],
        dtype=np.float32,
        shape=(record["rows"], width),
        again=MAKE_AGAIN,
    )


def _shard_record(path: Path) -> dict:
    return read_record(path, fields=SHARD_FIELDS, again=MAKE_AGAIN)


def load_features(manifest: Manifest, folder: Path) -> tuple[np.ndarray, FeatureConfig]:
    """Vectors float32 [N, D] in the order of sample ids, and where they come from; errors as of
    feature_pieces."""
    return np.concatenate(list(feature_pieces(manifest, folder))), features_config(manifest, folder)


def features_config(manifest: Manifest, folder: Path) -> FeatureConfig:
    """Where the vectors of a folder come from; MissingData or DataPipelineError when they are not
    there, or of another set."""
    path = folder / RECORD_NAME
    if not path.is_file():
        shards = shlex.quote(str(manifest.directory))
        output = shlex.quote(str(folder))
        raise MissingData(
            f"{path} does not exist: make it with `python -m data_pipeline features {shards} "
            f"--output {output}`"
        )
    record = read_features_record(folder)
    if record["origin"].get("manifest_sha256") != manifest.sha256:
        raise DataPipelineError(f"{folder} holds features of another set than {manifest.directory}")
    try:
        return FeatureConfig.of(record["config"], name=str(path))
    except DamagedFile as error:
        raise CorruptShard(str(error)) from error


def feature_pieces(manifest: Manifest, folder: Path) -> Iterator[np.ndarray]:
    """Vectors float32 [n, D] of one shard after the other.

    Raises MissingData for unfinished folders, CorruptShard for changed files, DataPipelineError for
    features of another set.
    """
    features_config(manifest, folder)
    done = _FinishedShards(folder, read_features_record(folder)["origin"])
    width = None  # that of the first shard, which all others must have
    for shard in manifest.shards:
        if shard["samples"]:
            rows = done.read(shard, width)
            width = rows.shape[1]
            yield rows


def quiet(line: str) -> None:
    """Report nothing."""


class _FinishedShards:
    """Shards of one origin in a folder."""

    def __init__(self, folder: Path, origin: dict, report: ReportLine = quiet):
        self._folder = folder
        self._report = report
        self._origin = origin_hash(origin)

    def lacks(self, shard: dict) -> bool:
        """Whether a shard has samples, and their vectors are not there."""
        return bool(shard["samples"]) and not self.has(shard)

    def has(self, shard: dict) -> bool:
        """Whether a shard's vectors are there; a damaged record is reported and counts as none, so
        that they are computed again.

        The vectors are not hashed here but where they are read.
        """
        path = self._folder / f"{shard['name']}.json"
        if not path.is_file() or not path.with_suffix(".npy").is_file():
            return False
        try:
            record = read_json(path, fields=SHARD_FIELDS)
        except DamagedFile as error:
            self._report(f"{error}: damaged, computed again")
            return False
        return record["rows"] == len(shard["samples"]) and record["origin"] == self._origin

    def add(self, shard: dict, rows: np.ndarray) -> None:
        """Write a shard's vectors."""
        path = self._folder / f"{shard['name']}.npy"
        # left by a task that was killed while it wrote this shard
        remove_temporary(self._folder, shard["name"])
        write_array(path, rows.astype(np.float32, copy=False))
        facts = {"sha256": file_sha256(path), "rows": len(rows), "origin": self._origin}
        # last: a shard without its record is not done
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


def _check_finite(rows: np.ndarray, manifest: Manifest, ids: range) -> None:
    """DataPipelineError names the first sample whose row is not finite."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        sample = ids[int(bad[0])]
        raise DataPipelineError(
            f"the vector of sample {sample} ({manifest.sources()[sample]}) is not finite: look at "
            "the sample and at the encoder's weights"
        )
