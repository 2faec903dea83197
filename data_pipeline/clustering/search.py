"""The points of largest cosine, by FAISS: nearest centroids, and near-duplicates of a set.

Exactly, or in the cells of an inverted file as many as a measured recall needs. On all GPUs where
faiss finds some; an inverted file stays on the CPU.

Cost of an exact search: queries x points x width. Measured against cells:
benchmarks/results/clustering_*.md.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

EXACT = 1 << 17  # centroids up to which every one is compared; likewise samples, for duplicates
RECALL = 0.99
RECALL_SAMPLES = 1000  # samples that a recall is measured on
MIN_PROBES = 8  # cells searched at first, twice as many in each next round
WORTHWHILE = 4  # a search in more than a fourth of the cells is left to the exact one
PIECE = 1 << 14  # queries at a time
PAIRS_PIECE = 1 << 10  # queries at a time where all of their pairs are in memory
POINTS_PER_CELL = 1 << 14


class CentroidSearch:
    """The `count` centroids of largest cosine for rows of features: exactly up to EXACT centroids
    and where samples lie badly in cells, else in the cells of an inverted file, as many as `some`
    features [n, D] need for a measured recall of RECALL. `how` names which. On a GPU where faiss
    finds one.
    """

    def __init__(self, centroids: np.ndarray, count: int, some: np.ndarray):
        self._count = min(count, len(centroids))
        self._index: Any = None
        self.how: dict[str, str | float] = {"search": "exact", "recall": 1.0}
        if len(centroids) > EXACT:
            self._search_in_cells(centroids, some)
        if self._index is None:
            self._index = _exact(centroids)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n, count], nearest first."""
        nearest, _ = _search_in_pieces(self._index, queries=rows, count=self._count)
        return nearest

    def _search_in_cells(self, centroids: np.ndarray, some: np.ndarray) -> None:
        """Take an inverted file that reaches RECALL, unless cells are no gain."""
        import faiss

        num_cells = int(len(centroids) ** 0.5)
        width = centroids.shape[1]
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(width), width, num_cells, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.min_points_per_centroid = 1  # else faiss warns of small cells
        index.train(np.ascontiguousarray(centroids, np.float32))
        index.add(np.ascontiguousarray(centroids, np.float32))
        truth, _ = search(some, points=centroids, count=self._count)
        # doubled until the recall is reached, or until so many cells are no gain (WORTHWHILE)
        index.nprobe = MIN_PROBES
        while index.nprobe * WORTHWHILE <= num_cells:
            nearest, _ = _search_in_pieces(index, queries=some, count=self._count)
            recall = recall_of(nearest, truth)
            if recall >= RECALL:
                self._index = index
                cells = f"{index.nprobe} of {num_cells} cells"
                self.how = {"search": cells, "recall": round(recall, 4)}
                return
            index.nprobe *= 2


def recall_samples(features: np.ndarray) -> np.ndarray:
    """Up to RECALL_SAMPLES features, evenly spread, to measure a recall with."""
    spread = np.linspace(0, len(features) - 1, RECALL_SAMPLES)
    # of fewer features several positions round to the same one
    return features[np.unique(spread.astype(np.int64))]


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true neighbours [N, L] that are among the found ones [N, L]."""
    is_same = found[:, :, None] == truth[:, None, :]  # [N, found, true]
    return float(is_same.any(axis=1).mean())


def search(queries: np.ndarray, points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` points of largest cosine for each query, int64 [N, count], and those cosines,
    float32 [N, count]; exact, in pieces."""
    return _search_in_pieces(_exact(points), queries=queries, count=count)


def _exact(points: np.ndarray) -> Any:
    import faiss

    index: Any = faiss.IndexFlatIP(points.shape[1])
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(np.ascontiguousarray(points, np.float32))
    return index


def _search_in_pieces(index: Any, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    nearest = []
    cosines = []
    for start in range(0, len(queries), PIECE):
        piece = np.ascontiguousarray(queries[start : start + PIECE], np.float32)
        piece_cosines, piece_nearest = index.search(piece, count)
        nearest.append(piece_nearest)
        cosines.append(piece_cosines)
    return np.concatenate(nearest), np.concatenate(cosines)


def representatives(features: np.ndarray, threshold: float, exact: int = EXACT) -> np.ndarray:
    """For each unit feature [N, D] the lowest sample id of its group of near-duplicates, int64 [N].

    A web set repeats itself, and centroids would be spent on what is there most often. Samples are
    joined when their cosine reaches the threshold, in (0, 1], and joins are transitive
    (union-find). Up to `exact` samples all pairs are compared; beyond, pairs inside coarse cells
    only, so that a pair across a border may stay. Cost: N^2 products of width D, or N^2 / cells.
    """
    check_threshold(threshold)
    features = np.ascontiguousarray(features, np.float32)
    # copies, byte for byte, are joined before any comparison: a set may hold one black clip a
    # hundred thousand times
    rows = features.view(f"V{features[0].nbytes}")[:, 0]
    _, first, copy_of = np.unique(rows, return_index=True, return_inverse=True)
    lowest = np.sort(first)
    different = features[lowest]
    groups = np.arange(len(different))
    for members in _cells(different, exact):
        for left, right in _pairs(different[members], threshold):
            groups = _join(groups, left=members[left], right=members[right])
    return lowest[groups][np.searchsorted(lowest, first)][copy_of]


def check_threshold(threshold: float | None) -> None:
    """ValueError for what is no useful cosine; None is."""
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"--near-duplicates {threshold}: a cosine above 0 and at most 1")


def _cells(features: np.ndarray, exact: int) -> Iterator[np.ndarray]:
    """Members of each cell: of one up to `exact` features."""
    if len(features) <= exact:
        yield np.arange(len(features))
        return
    count = -(-len(features) // min(POINTS_PER_CELL, exact))
    # samples evenly spread over the ids stand for the cells
    spread = np.linspace(0, len(features) - 1, count)
    centres = features[spread.astype(np.int64)]
    nearest, _ = search(features, centres, count=1)
    for cell in range(count):
        members = np.flatnonzero(nearest[:, 0] == cell)
        if len(members):
            yield members


def _pairs(features: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(left, right) indices of pairs with a cosine of at least the threshold, piece by piece."""
    import faiss

    index = faiss.IndexFlatIP(features.shape[1])
    index.add(np.ascontiguousarray(features, np.float32))
    for start in range(0, len(features), PAIRS_PIECE):
        queries = np.ascontiguousarray(features[start : start + PAIRS_PIECE], np.float32)
        # faiss finds what lies above a radius: the next smaller number makes it "at least"
        radius = np.nextafter(np.float32(threshold), -1)
        limits, _, right = index.range_search(queries, radius)
        limits = limits.astype(np.int64)  # from unsigned ones
        counts = limits[1:] - limits[:-1]
        left = start + np.repeat(np.arange(len(queries)), counts)
        # every pair is found from both of its ends, and each sample with itself
        once = left < right
        yield left[once], right[once]


def _join(groups: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Groups after joining pairs: lowest ids spread along the pairs until nothing changes."""
    while True:
        lowest = np.minimum(groups[left], groups[right])
        joined = groups.copy()
        # of the samples themselves and of those that stand for them
        for side in (groups[left], groups[right], left, right):
            np.minimum.at(joined, side, lowest)
        # a group's group at once: chains of joins shorten to half in each round
        joined = joined[joined]
        if np.array_equal(joined, groups):
            return groups
        groups = joined
