"""Spherical k-means by FAISS: features -> unit centroids, the classes of cluster discrimination.

Up to SINGLE centroids one k-means finds them all. Beyond, two levels: coarse cells first, then fine
centroids inside each cell, as many as the cell's share of the samples. A level costs iterations x
points x centroids x width; two levels cost about 2 / sqrt(k) of one.

Iterations run in blocks; after each the centroids are written, and a run that was killed goes on
from them. What k-means leaves empty or twice is put where samples fit worst, and reported.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataPipelineError, MissingData
from ..shards.writer import file_sha256, write_array, write_atomically
from .features import normalise
from .labels import search

CENTROIDS_NAME = "centroids.npy"
COMPONENTS_NAME = "components.npy"
PARTIAL_NAME = "centroids.partial.npy"
PARTIAL_RECORD = "clusters.partial.json"
RECORD_NAME = "clusters.json"
SINGLE = 1 << 16
BLOCK = 5  # iterations between two saves
POINTS_PER_COARSE = 256
REPAIRS = 5
SAME = 1e-6  # cosine distance of centroids that are one


@dataclass
class Report:
    """What happened: levels, cells with samples, centroids that were repaired, and what remains."""

    levels: int = 1
    cells: int = 1
    repaired_empty: int = 0
    repaired_duplicate: int = 0
    smallest_cluster: int = 0
    largest_cluster: int = 0


def spherical_kmeans(
    features: np.ndarray,
    num_centroids: int,
    seed: int = 0,
    num_iterations: int = 25,
    initial: np.ndarray | None = None,
    save: Callable[[np.ndarray, int], None] = lambda centroids, iterations: None,
    single: int = SINGLE,
) -> tuple[np.ndarray, Report]:
    """Unit centroids float32 [num_centroids, D] of unit features float32 [N, D], and a Report.

    initial: centroids to start from. save(centroids, iterations done) is called between blocks of
    iterations of a single level.

    Raises DataPipelineError, before any work, for more centroids than different features, for NaN
    or infinite features and for initial centroids of another shape.
    """
    check_features(features, num_centroids, initial)
    features = np.ascontiguousarray(features, np.float32)
    report = Report()
    if num_centroids <= single:
        centroids = _lloyd(features, num_centroids, seed, num_iterations, initial, save)
    else:
        centroids = _two_levels(features, num_centroids, seed, num_iterations, initial, report)
    centroids = _repair(features, centroids, report)
    return centroids, report


def check_features(features: np.ndarray, num_centroids: int, initial=None) -> None:
    """DataPipelineError when features cannot give so many centroids."""
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        raise DataPipelineError(
            f"{len(bad)} features are not finite, the first is of sample {bad[0]}"
        )
    if num_centroids < 1 or num_centroids > len(features):
        raise DataPipelineError(
            f"--num-centroids is {num_centroids}, must be 1 to {len(features)}, the number of "
            "samples"
        )
    distinct = len(np.unique(np.ascontiguousarray(features).view(f"V{features[0].nbytes}")))
    if num_centroids > distinct:
        raise DataPipelineError(
            f"--num-centroids is {num_centroids}, but only {distinct} of {len(features)} features "
            "differ: ask for fewer, or remove what is there many times"
        )
    if initial is not None and initial.shape != (num_centroids, features.shape[1]):
        raise DataPipelineError(
            f"initial centroids have shape {initial.shape}, these features need "
            f"{(num_centroids, features.shape[1])}"
        )


def _lloyd(features, num_centroids, seed, num_iterations, initial, save) -> np.ndarray:
    """One k-means in blocks of iterations."""
    import faiss

    centroids, done = initial, 0
    while done < num_iterations or centroids is None:
        block = min(BLOCK, num_iterations - done) if num_iterations else 0
        solver = faiss.Kmeans(
            features.shape[1],
            num_centroids,
            niter=block,
            spherical=True,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=1 << 20,
            gpu=hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0,
        )
        solver.train(features, init_centroids=centroids)
        centroids, done = normalise(solver.centroids), done + block
        save(centroids, done)
        if not num_iterations:
            break
    return centroids


def _two_levels(features, num_centroids, seed, num_iterations, initial, report) -> np.ndarray:
    num_cells = max(1, int(round(num_centroids**0.5)))
    rng = np.random.default_rng(seed)
    some = rng.permutation(len(features))[: POINTS_PER_COARSE * num_cells]
    coarse = _lloyd(features[np.sort(some)], num_cells, seed, num_iterations, None, _nothing)
    cell_of = search(features, coarse, 1)[:, 0]
    sizes = np.bincount(cell_of, minlength=num_cells)
    starts = None
    if initial is not None:
        start_cell = search(initial, coarse, 1)[:, 0]
        starts = [initial[start_cell == cell] for cell in range(num_cells)]
    shares = allot(num_centroids, sizes)
    parts = []
    for cell in np.flatnonzero(shares):
        members = features[cell_of == cell]
        start = None
        if starts is not None and len(starts[cell]) == shares[cell]:
            start = starts[cell]
        if shares[cell] == len(members):
            parts.append(members)
            continue
        parts.append(
            _lloyd(members, int(shares[cell]), seed + int(cell), num_iterations, start, _nothing)
        )
    report.levels, report.cells = 2, int((shares > 0).sum())
    return np.concatenate(parts)


def _nothing(centroids: np.ndarray, iterations: int) -> None:
    """Cells are small: nothing is saved between their iterations."""


def allot(total: int, sizes: np.ndarray) -> np.ndarray:
    """Split `total` in proportion to sizes, by largest remainders; nobody gets more than its size,
    and everybody that has any gets one if there are enough."""
    shares = np.minimum(sizes, (total * sizes / sizes.sum()).astype(np.int64))
    if total >= (sizes > 0).sum():
        shares = np.maximum(shares, sizes > 0)
    while (missing := total - shares.sum()) != 0:
        rest = total * sizes / sizes.sum() - shares
        if missing > 0:
            open_cells = np.flatnonzero(shares < sizes)
            chosen = open_cells[np.argsort(-rest[open_cells], kind="stable")][:missing]
            shares[chosen] += 1
        else:
            open_cells = np.flatnonzero(shares > 1)
            chosen = open_cells[np.argsort(rest[open_cells], kind="stable")][:-missing]
            shares[chosen] -= 1
    return shares


def _repair(features: np.ndarray, centroids: np.ndarray, report: Report) -> np.ndarray:
    """Move empty and repeated centroids onto the samples that fit worst, one each."""
    for _ in range(REPAIRS):
        nearest, cosines = search(features, centroids, 1, with_cosines=True)
        counts = np.bincount(nearest[:, 0], minlength=len(centroids))
        neighbours, near = search(centroids, centroids, min(2, len(centroids)), with_cosines=True)
        own = np.arange(len(centroids))
        other = np.where(neighbours[:, 0] == own, neighbours[:, -1], neighbours[:, 0])
        twin = (near[:, -1] > 1 - SAME) & (other < own)
        empty = (counts == 0) & ~twin
        broken = np.flatnonzero(empty | twin)
        report.smallest_cluster, report.largest_cluster = int(counts.min()), int(counts.max())
        if not len(broken):
            return centroids
        report.repaired_empty += int(empty.sum())
        report.repaired_duplicate += int(twin.sum())
        worst = np.argsort(cosines[:, 0], kind="stable")[: 4 * len(broken) + 64]
        _, first = np.unique(features[worst], axis=0, return_index=True)
        centroids = centroids.copy()
        placed = worst[np.sort(first)][: len(broken)]
        centroids[broken[: len(placed)]] = features[placed]
    return centroids


def save_centroids(
    directory: Path, centroids: np.ndarray, details: dict, components: np.ndarray | None = None
) -> None:
    """Write centroids.npy, the components of the projection if there are any, and the record
    clusters.json that describes and binds them."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {CENTROIDS_NAME: centroids}
    if components is not None:
        files[COMPONENTS_NAME] = components
    for name, array in files.items():
        write_array(directory / name, array)
    record = {
        "num_centroids": len(centroids),
        "dim": centroids.shape[1],
        "sha256": file_sha256(directory / CENTROIDS_NAME),
        "files": {name: file_sha256(directory / name) for name in files},
        **details,
    }
    write_atomically(directory / RECORD_NAME, json.dumps(record, indent=1, sort_keys=True).encode())


def load_centroids(directory: Path) -> tuple[np.ndarray, dict, np.ndarray | None]:
    """Centroids float32 [K, d], their record, and the components of the projection [d, D], None:
    all directions. MissingData or DataPipelineError names what is wrong.
    """
    if not (directory / RECORD_NAME).is_file():
        raise MissingData(
            f"{directory} holds no {RECORD_NAME}: make it with `python -m data_pipeline cluster`"
        )
    record = json.loads((directory / RECORD_NAME).read_bytes())
    for name, sha256 in record["files"].items():
        if not (directory / name).is_file() or file_sha256(directory / name) != sha256:
            raise DataPipelineError(
                f"{directory / name} is not the file that {RECORD_NAME} binds: cluster again"
            )
    arrays = {n: np.load(directory / n, allow_pickle=False) for n in record["files"]}
    return arrays[CENTROIDS_NAME], record, arrays.get(COMPONENTS_NAME)


class PartialCentroids:
    """Centroids between two blocks of iterations, with what they belong to; as safe as the final
    ones, so that a killed run goes on from them.
    """

    def __init__(self, directory: Path, identity: dict):
        self._directory, self._identity = directory, identity

    def load(self) -> tuple[np.ndarray | None, int]:
        """(centroids, iterations done) of a run with the same identity; (None, 0) without."""
        record = self._directory / PARTIAL_RECORD
        if not record.is_file() or not (self._directory / PARTIAL_NAME).is_file():
            return None, 0
        saved = json.loads(record.read_bytes())
        if saved["identity"] != self._identity:
            return None, 0
        if file_sha256(self._directory / PARTIAL_NAME) != saved["sha256"]:
            return None, 0
        return np.load(self._directory / PARTIAL_NAME, allow_pickle=False), saved["iterations"]

    def saver(self, before: int) -> Callable[[np.ndarray, int], None]:
        """What spherical_kmeans calls between blocks, after `before` earlier iterations."""

        def save(centroids: np.ndarray, iterations: int) -> None:
            self._directory.mkdir(parents=True, exist_ok=True)
            write_array(self._directory / PARTIAL_NAME, centroids)
            record = {
                "identity": self._identity,
                "iterations": before + iterations,
                "sha256": file_sha256(self._directory / PARTIAL_NAME),
            }
            write_atomically(self._directory / PARTIAL_RECORD, json.dumps(record).encode())

        return save

    def remove(self) -> None:
        """The work is done."""
        for name in (PARTIAL_NAME, PARTIAL_RECORD):
            (self._directory / name).unlink(missing_ok=True)
