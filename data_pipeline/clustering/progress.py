"""Saved state of a clustering, so that one that was killed goes on from it.

    OUTPUT/partial/record.json       what it belongs to, iterations done, sha256 of every file
    OUTPUT/partial/centroids.npy     of a single level, after the last block of iterations
    OUTPUT/partial/cell-00012.npy    of two levels, the centroids of a finished cell

Removed when the clustering is done. Cost: one write of the centroids per block, or per cell.
"""

import json
import logging
import shutil
from pathlib import Path

import numpy as np

from model_factory.files import file_sha256, write_json

from ..side_files import read_array, read_record, write_array
from .kmeans import Progress

LOG = logging.getLogger("univit")
FOLDER = "partial"
RECORD_NAME = "record.json"
CENTROIDS = "centroids.npy"
FIELDS = {"identity": dict, "iterations": int, "files": dict}


class SavedProgress(Progress):
    """Progress of a clustering whose `identity` decides its centroids; another's is thrown away."""

    def __init__(self, output: Path, identity: dict):
        self.folder = output / FOLDER
        self._record = self.folder / RECORD_NAME
        identity = json.loads(json.dumps(identity))  # as it is read back
        self._state: dict = {"identity": identity, "iterations": 0, "files": {}}
        if self._record.is_file():
            saved = read_progress(self.folder)
            if saved["identity"] == identity:
                self._state = saved
        self._before = self._state["iterations"]  # of earlier starts

    def centroids(self) -> tuple[np.ndarray | None, int]:
        """(centroids of a single level, iterations done); (None, 0) where nothing was saved."""
        centroids = read_saved(self.folder, state=self._state, name=CENTROIDS)
        return centroids, 0 if centroids is None else self._before

    def save(self, centroids: np.ndarray, iterations: int) -> None:
        """After a block: `iterations` of this start."""
        self._state["iterations"] = self._before + iterations
        self._write(CENTROIDS, centroids)

    def save_cell(self, cell: int, centroids: np.ndarray) -> None:
        """A finished cell of two levels."""
        self._write(_cell_name(cell), centroids)

    def load_cell(self, cell: int) -> np.ndarray | None:
        """Its centroids, if an earlier start finished it."""
        return read_saved(self.folder, state=self._state, name=_cell_name(cell))

    def remove(self) -> None:
        """The work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, centroids: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # the record last: after a kill between the two it does not bind the array, see read_saved
        write_array(self.folder / name, centroids)
        self._state["files"][name] = file_sha256(self.folder / name)
        write_json(self._record, self._state)


def _cell_name(cell: int) -> str:
    return f"cell-{cell:05d}.npy"


def read_progress(folder: Path) -> dict:
    """The record of a clustering that was stopped; CorruptShard for a damaged one."""
    return read_record(folder / RECORD_NAME, fields=FIELDS, again=_again(folder))


def read_saved(folder: Path, state: dict, name: str) -> np.ndarray | None:
    """Centroids float32 [K, D] that a record names. None where they are not what it says, as after
    a kill between the two: they are computed again."""
    sha256 = state["files"].get(name)
    path = folder / name
    if sha256 is None:
        return None
    if not is_as_saved(folder, state=state, name=name):
        LOG.warning("%s is not as its record says: computed again", path)
        return None
    return read_array(
        path, sha256=sha256, dtype=np.float32, shape=(None, None), again=_again(folder)
    )


def is_as_saved(folder: Path, state: dict, name: str) -> bool:
    """Whether a file is there and has the bytes that the record says."""
    path = folder / name
    return path.is_file() and file_sha256(path) == state["files"].get(name)


def _again(folder: Path) -> str:
    return f"remove {folder} and run the same command again"
