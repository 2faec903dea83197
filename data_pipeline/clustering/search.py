"""The points of largest cosine, by FAISS: exactly, or in the cells of an inverted file as many as a
measured recall needs. On all GPUs where faiss finds some; an inverted file stays on the CPU.

Cost of an exact search: queries x points x width. Measured against cells:
benchmarks/results/clustering_*.md.
"""

import numpy as np

EXACT = 1 << 17  # centroids up to which every one is compared
RECALL = 0.99
JUDGED = 1000  # samples that judge an approximate search
WORTHWHILE = 4  # a search in more than a fourth of the cells is left to the exact one
PIECE = 1 << 14  # queries at a time


class CentroidSearch:
    """The `count` centroids of largest cosine for rows of features: exactly up to EXACT centroids
    and where samples lie badly in cells, else in the cells of an inverted file, as many as `some`
    features [n, D] need for a measured recall of RECALL. `how` says which. On a GPU where faiss
    finds one.
    """

    def __init__(self, centroids: np.ndarray, count: int, some: np.ndarray):
        self._count = min(count, len(centroids))
        self._index, self.how = None, {"search": "exact", "recall": 1.0}
        if len(centroids) > EXACT:
            self._index, found = _cells(centroids, self._count, some)
            self.how = found or self.how
        if self._index is None:
            self._index = _exact(centroids)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n, count], nearest first."""
        return _search_in_pieces(self._index, rows, self._count)


def judges(features: np.ndarray) -> np.ndarray:
    """Up to JUDGED features, evenly spread, to measure a recall with."""
    return features[np.unique(np.linspace(0, len(features) - 1, JUDGED).astype(np.int64))]


def search(queries: np.ndarray, points: np.ndarray, count: int, with_cosines: bool = False):
    """The `count` points of largest cosine for each query, int64 [N, count]; exact, in pieces."""
    return _search_in_pieces(_exact(points), queries, count, with_cosines)


def _exact(points: np.ndarray):
    import faiss

    index = faiss.IndexFlatIP(points.shape[1])
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(np.ascontiguousarray(points, np.float32))
    return index


def _search_in_pieces(index, queries, count, with_cosines=False):
    found = [
        index.search(np.ascontiguousarray(queries[start : start + PIECE], np.float32), count)
        for start in range(0, len(queries), PIECE)
    ]
    cosines, nearest = (np.concatenate(part) for part in zip(*found, strict=True))
    return (nearest, cosines) if with_cosines else nearest


def _cells(centroids: np.ndarray, count: int, some: np.ndarray):
    """(inverted file, how) that reaches RECALL, or (None, None) where cells are no gain."""
    import faiss

    num_cells = int(len(centroids) ** 0.5)
    quantizer = faiss.IndexFlatIP(centroids.shape[1])
    index = faiss.IndexIVFFlat(quantizer, centroids.shape[1], num_cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(np.ascontiguousarray(centroids, np.float32))
    index.add(np.ascontiguousarray(centroids, np.float32))
    truth = search(some, centroids, count)
    index.nprobe, recall = 4, 0.0
    while recall < RECALL:
        index.nprobe *= 2
        if index.nprobe * WORTHWHILE > num_cells:
            return None, None
        recall = recall_of(_search_in_pieces(index, some, count), truth)
    how = {"search": f"{index.nprobe} of {num_cells} cells", "recall": round(recall, 4)}
    return index, how


def recall_of(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true neighbours [N, L] that are among the found ones [N, L]."""
    return float((found[:, :, None] == truth[:, None, :]).any(axis=1).mean())
