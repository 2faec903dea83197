"""Spherical k-means by FAISS: features -> unit centroids, the classes of cluster discrimination.

Up to SINGLE centroids one k-means finds them all. Beyond, two levels: coarse cells first, then fine
centroids inside each cell, as many as the cell's share of the samples. A level costs iterations x
points x centroids x width; two levels cost about 2 / sqrt(k) of one, repairs included.

What is done is saved by a Progress: centroids after every block of iterations, or, of two levels,
those of every cell that is finished. What k-means leaves empty or twice is put where samples of the
same level fit worst, and reported. Vectors of zeros have no direction and take no part.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_factory.files import file_sha256, write_json

from ..errors import CorruptShard, DataPipelineError, MissingData
from ..side_files import read_array, read_record, write_array
from .feature_sources import normalise
from .search import search

CENTROIDS_NAME = "centroids.npy"
COMPONENTS_NAME = "components.npy"
RECORD_NAME = "clusters.json"
RECORD_FIELDS = {"num_centroids": int, "dim": int, "sha256": str, "files": dict}
SINGLE = 1 << 16  # centroids that one level finds
BLOCK = 5  # iterations between two saves
POINTS_PER_COARSE = 256  # samples per cell that the cells are found with
MAX_POINTS = 1 << 20  # samples of a centroid, where faiss would draw 256 of them
REPAIRS = 5  # rounds: a move may leave another centroid empty
SAME = 1e-6  # cosine distance of centroids that are one


@dataclass
class KMeansReport:
    """What happened: levels, cells with samples, centroids that were given and used, centroids that
    were repaired, each counted once, what is still empty, and the sizes of the clusters."""

    levels: int = 1
    cells: int = 1
    started_from: int = 0
    zero_vectors: int = 0
    repaired_empty: int = 0
    repaired_duplicate: int = 0
    left_empty: int = 0
    smallest_cluster: int = 0
    largest_cluster: int = 0


class Progress:
    """Keeps nothing; progress.py has the one that a killed run goes on from."""

    def save(self, centroids: np.ndarray, iterations: int) -> None:
        """Called with a single level's centroids after each block of iterations."""

    def save_cell(self, cell: int, centroids: np.ndarray) -> None:
        """Called with the centroids of a finished cell."""

    def load_cell(self, cell: int) -> np.ndarray | None:
        """Centroids of a cell that an earlier start finished."""
        return None


def spherical_kmeans(
    features: np.ndarray,
    num_centroids: int,
    seed: int = 0,
    num_iterations: int = 25,
    initial: np.ndarray | None = None,
    progress: Progress | None = None,
    single: int = SINGLE,
) -> tuple[np.ndarray, KMeansReport]:
    """Unit centroids float32 [num_centroids, D] of unit features float32 [N, D], and what happened.

    initial: centroids to start from; of two levels, each cell takes those that lie in it, as many
    as it needs.

    Raises DataPipelineError, before any work, for more centroids than different features, for NaN
    or infinite features and for initial centroids of another shape.
    """
    check_features(features, num_centroids=num_centroids, initial=initial)
    features = np.ascontiguousarray(features, np.float32)
    pointing = features.any(axis=1)
    report = KMeansReport(zero_vectors=int((~pointing).sum()))
    if report.zero_vectors:
        features = features[pointing]
    progress = progress or Progress()
    if num_centroids > single:
        levels = _TwoLevels(
            features, seed=seed, num_iterations=num_iterations, report=report, progress=progress
        )
        return levels.centroids(num_centroids, initial), report
    report.started_from = 0 if initial is None else num_centroids
    centroids = _lloyd(
        features,
        num_centroids=num_centroids,
        seed=seed,
        num_iterations=num_iterations,
        initial=initial,
        save=progress.save,
    )
    centroids = _repair(features, centroids=centroids, report=report)
    return centroids, report


def check_features(
    features: np.ndarray, num_centroids: int, initial: np.ndarray | None = None
) -> None:
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
    # a row as one value of so many bytes, which np.unique compares as a whole
    rows = np.ascontiguousarray(features).view(f"V{features[0].nbytes}")
    # zeros are one row among the different ones, and no direction
    has_zeros = not features.any(axis=1).all()
    distinct = len(np.unique(rows)) - has_zeros
    if num_centroids > distinct:
        raise DataPipelineError(
            f"--num-centroids is {num_centroids}, but only {distinct} of {len(features)} features "
            "differ and are not zero: ask for fewer, or remove what is there many times"
        )
    if initial is not None and initial.shape != (num_centroids, features.shape[1]):
        raise DataPipelineError(
            f"initial centroids have shape {initial.shape}, these features need "
            f"{(num_centroids, features.shape[1])}"
        )


def _lloyd(
    features: np.ndarray,
    num_centroids: int,
    seed: int,
    num_iterations: int,
    initial: np.ndarray | None = None,
    save: Callable[[np.ndarray, int], None] | None = None,
) -> np.ndarray:
    """One k-means in blocks of iterations; save(centroids, iterations done) after each."""
    import faiss

    centroids = initial
    done = 0
    while centroids is None or done < num_iterations:
        # 0 where no iteration is asked for: faiss draws its first centroids
        block = min(BLOCK, num_iterations - done)
        solver = faiss.Kmeans(
            features.shape[1],
            num_centroids,
            niter=block,
            spherical=True,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=MAX_POINTS,
            gpu=hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0,
        )
        solver.train(features, init_centroids=centroids)
        assert solver.centroids is not None
        centroids = normalise(solver.centroids)
        done += block
        if save is not None:
            save(centroids, done)
    return centroids


@dataclass(frozen=True)
class _TwoLevels:
    """Coarse cells, then a k-means with repairs inside each."""

    features: np.ndarray
    seed: int
    num_iterations: int
    report: KMeansReport
    progress: Progress

    def centroids(self, num_centroids: int, initial: np.ndarray | None) -> np.ndarray:
        """All fine centroids, cell after cell."""
        report = self.report
        features = self.features
        # the square root: as many cells as centroids in each, where the two levels cost least
        num_cells = max(1, int(round(num_centroids**0.5)))
        rng = np.random.default_rng(self.seed)
        # cells need few samples each to be found, and all samples are put into them afterwards
        some = rng.permutation(len(features))[: POINTS_PER_COARSE * num_cells]
        coarse = _lloyd(
            features[np.sort(some)],
            num_centroids=num_cells,
            seed=self.seed,
            num_iterations=self.num_iterations,
        )
        cell_of = _nearest(features, coarse)
        start_cell = None if initial is None else _nearest(initial, coarse)
        shares = allot(num_centroids, np.bincount(cell_of, minlength=num_cells))
        smallest = []
        largest = []
        centroids = []
        for cell in np.flatnonzero(shares).tolist():
            starts = None if initial is None else initial[start_cell == cell]
            members = features[cell_of == cell]
            share = int(shares[cell])
            centroids.append(self._cell(cell, members=members, share=share, starts=starts))
            smallest.append(report.smallest_cluster)
            largest.append(report.largest_cluster)
        report.smallest_cluster = min(smallest)
        report.largest_cluster = max(largest)
        report.levels = 2
        report.cells = len(centroids)
        return np.concatenate(centroids)

    def _cell(
        self, cell: int, members: np.ndarray, share: int, starts: np.ndarray | None
    ) -> np.ndarray:
        """As many centroids of a cell's members as its share."""
        done = self.progress.load_cell(cell)
        if done is not None and len(done) == share:
            _faults(members, centroids=done, report=self.report)  # for its sizes
            return done
        if share == len(members):
            # every sample is a centroid
            self.report.smallest_cluster = 1
            self.report.largest_cluster = 1
            return members
        if starts is not None:
            starts = self._filled(starts, members=members, share=share, cell=cell)
        # cells are small: nothing is saved between their iterations
        centroids = _lloyd(
            members,
            num_centroids=share,
            seed=self.seed + cell,  # its own, whichever cells were done before
            num_iterations=self.num_iterations,
            initial=starts,
        )
        centroids = _repair(members, centroids=centroids, report=self.report)
        self.progress.save_cell(cell, centroids)
        return centroids

    def _filled(self, starts: np.ndarray, members: np.ndarray, share: int, cell: int) -> np.ndarray:
        """As many starts as the cell needs: some of those given, or members beside them."""
        rng = np.random.default_rng([self.seed, cell])
        chosen = rng.permutation(len(starts))[:share]
        taken = starts[np.sort(chosen)]
        self.report.started_from += len(taken)
        order = rng.permutation(len(members))
        more = members[order[: share - len(taken)]]
        return np.concatenate([taken, more])


def _nearest(rows: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The point of largest cosine for each row, int64 [n]."""
    return search(rows, points, count=1)[0][:, 0]


def allot(total: int, sizes: np.ndarray) -> np.ndarray:
    """Split `total` in proportion to sizes, by largest remainders. No cell gets more than its
    size, and every cell that is not empty gets one if there are enough."""
    exact = total * sizes / sizes.sum()
    shares = np.minimum(sizes, exact.astype(np.int64))
    if total >= (sizes > 0).sum():
        shares = np.maximum(shares, sizes > 0)
    # rounding down leaves some over, the minimum of one takes some too many
    # several rounds: a cell may fill up, and takes or gives one in each
    while shares.sum() != total:
        missing = total - shares.sum()
        rest = exact - shares
        if missing > 0:
            open_cells = np.flatnonzero(shares < sizes)
            order = np.argsort(-rest[open_cells], kind="stable")
            shares[open_cells[order[:missing]]] += 1
        else:
            open_cells = np.flatnonzero(shares > 1)
            order = np.argsort(rest[open_cells], kind="stable")
            shares[open_cells[order[:-missing]]] -= 1
    return shares


def _repair(features: np.ndarray, centroids: np.ndarray, report: KMeansReport) -> np.ndarray:
    """Move empty and repeated centroids onto the samples that fit worst, one each; a few times, as
    a move may leave another one empty."""
    was_empty: set[int] = set()
    was_twin: set[int] = set()
    for _ in range(REPAIRS):
        empty, twin, cosines = _faults(features, centroids=centroids, report=report)
        broken = np.flatnonzero(empty | twin)
        if not len(broken):
            break
        was_empty |= set(np.flatnonzero(empty).tolist())
        was_twin |= set(np.flatnonzero(twin).tolist()) - was_empty
        # some more than needed: copies of one sample would give the same centroid again
        num_candidates = 4 * len(broken) + 64
        worst = np.argsort(cosines, kind="stable")[:num_candidates]
        _, first = np.unique(features[worst], axis=0, return_index=True)
        centroids = centroids.copy()
        placed = worst[np.sort(first)][: len(broken)]
        centroids[broken[: len(placed)]] = features[placed]
    else:
        # all rounds were used: what the last one left is counted
        empty, twin, _ = _faults(features, centroids=centroids, report=report)
        report.left_empty += int((empty | twin).sum())
    report.repaired_empty += len(was_empty)
    report.repaired_duplicate += len(was_twin)
    return centroids


def _faults(
    features: np.ndarray, centroids: np.ndarray, report: KMeansReport
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(which centroids are empty, which repeat one before them, every sample's best cosine)."""
    nearest, cosines = search(features, centroids, count=1)
    counts = np.bincount(nearest[:, 0], minlength=len(centroids))
    neighbours, near = search(centroids, centroids, count=min(2, len(centroids)))
    own = np.arange(len(centroids))
    # of two that are the same, either may come first
    is_first_own = neighbours[:, 0] == own
    other = np.where(is_first_own, neighbours[:, -1], neighbours[:, 0])
    is_repeated = near[:, -1] > 1 - SAME
    twin = is_repeated & (other < own)  # the first of two that are the same stays
    report.smallest_cluster = int(counts.min())
    report.largest_cluster = int(counts.max())
    return (counts == 0) & ~twin, twin, cosines[:, 0]


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
    write_json(directory / RECORD_NAME, record)


def load_centroids(directory: Path) -> tuple[np.ndarray, dict, np.ndarray | None]:
    """Centroids float32 [K, d], their record, and the components of the projection [d, D], None:
    all directions. MissingData or CorruptShard names what is wrong, also with a feature_mean that
    does not fit them.
    """
    path = directory / RECORD_NAME
    command = how_to_cluster("DIR", directory)
    if not path.is_file():
        raise MissingData(f"{directory} holds no {RECORD_NAME}: make it with {command}")
    again = f"cluster again: {command}"
    record = read_record(path, fields=RECORD_FIELDS, again=again)
    files = record["files"]
    is_known = {CENTROIDS_NAME} <= files.keys() <= {CENTROIDS_NAME, COMPONENTS_NAME}
    if not is_known or record["sha256"] != files[CENTROIDS_NAME]:
        bound = ", ".join(map(repr, files))
        raise CorruptShard(f"{path} binds {bound}: {again}")
    width = record["dim"]
    centroids = read_array(
        directory / CENTROIDS_NAME,
        sha256=files[CENTROIDS_NAME],
        dtype=np.float32,
        shape=(record["num_centroids"], width),
        again=again,
    )
    components = None
    if COMPONENTS_NAME in files:
        components = read_array(
            directory / COMPONENTS_NAME,
            sha256=files[COMPONENTS_NAME],
            dtype=np.float32,
            shape=(width, None),
            again=again,
        )
        width = components.shape[1]
    mean = record.get("feature_mean")
    if mean is not None and not _is_vector(mean, width):
        raise CorruptShard(f"{path}: feature_mean is not {width} finite numbers: {again}")
    if not centroids.size:
        raise CorruptShard(f"{path} states no centroid: {again}")
    return centroids, record, components


def how_to_cluster(shards: Path | str, output: Path | str) -> str:
    """The command that clusters a packed folder."""
    source = shlex.quote(str(shards))
    target = shlex.quote(str(output))
    return f"`python -m data_pipeline cluster {source} --num-centroids K --output {target}`"


def _is_vector(values: object, width: int) -> bool:
    """Whether a value from JSON is a list of so many finite numbers."""
    return (
        isinstance(values, list)
        and len(values) == width
        and all(type(value) in (int, float) and abs(value) < np.inf for value in values)
    )
