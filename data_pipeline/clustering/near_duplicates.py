"""Near-duplicates: samples whose features are almost one, found before clustering.

A web set repeats itself, and centroids would be spent on what is there most often. Samples are
joined when their cosine reaches a threshold, and joins are transitive (union-find); the sample of
the lowest id stands for its group. Up to EXACT samples all pairs are compared; beyond, pairs inside
coarse cells only, so that a pair across a border may stay. Copies, byte for byte, are joined before
any comparison: a set may hold one black clip a hundred thousand times.
"""

import numpy as np

from .search import search

EXACT = 1 << 17
POINTS_PER_CELL = 1 << 14
PIECE = 1 << 10  # queries at a time: all of their pairs are in memory


def representatives(features: np.ndarray, threshold: float, exact: int = EXACT) -> np.ndarray:
    """For each unit feature [N, D] the lowest sample id of its group of near-duplicates, int64 [N].

    threshold: cosine in (0, 1]. Cost: N^2 products of width D, or N^2 / cells beyond `exact`.
    """
    check_threshold(threshold)
    features = np.ascontiguousarray(features, np.float32)
    _, first, copy_of = np.unique(
        features.view(f"V{features[0].nbytes}")[:, 0], return_index=True, return_inverse=True
    )
    lowest = np.sort(first)
    different = features[lowest]
    groups = np.arange(len(different))
    for members in _cells(different, exact):
        for left, right in _pairs(different[members], threshold):
            groups = _join(groups, members[left], members[right])
    return lowest[groups][np.searchsorted(lowest, first)][copy_of]


def check_threshold(threshold: float | None) -> None:
    """ValueError for what is no useful cosine; None is."""
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"--near-duplicates {threshold}: a cosine above 0 and at most 1")


def _cells(features: np.ndarray, exact: int):
    if len(features) <= exact:
        yield np.arange(len(features))
        return
    count = -(-len(features) // min(POINTS_PER_CELL, exact))
    centres = features[np.linspace(0, len(features) - 1, count).astype(np.int64)]
    cell_of = search(features, centres, 1)[:, 0]
    for cell in range(count):
        members = np.flatnonzero(cell_of == cell)
        if len(members):
            yield members


def _pairs(features: np.ndarray, threshold: float):
    """(left, right) places of pairs with a cosine of at least the threshold, piece by piece."""
    import faiss

    index = faiss.IndexFlatIP(features.shape[1])
    index.add(np.ascontiguousarray(features, np.float32))
    for start in range(0, len(features), PIECE):
        queries = np.ascontiguousarray(features[start : start + PIECE], np.float32)
        limits, _, right = index.range_search(queries, np.nextafter(np.float32(threshold), -1))
        left = start + np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64)))
        keep = left < right
        yield left[keep], right[keep]


def _join(groups: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Groups after joining pairs: lowest ids spread along the pairs until nothing changes."""
    while True:
        lowest = np.minimum(groups[left], groups[right])
        joined = groups.copy()
        for side in (groups[left], groups[right], left, right):
            np.minimum.at(joined, side, lowest)
        joined = joined[joined]
        if np.array_equal(joined, groups):
            return groups
        groups = joined
