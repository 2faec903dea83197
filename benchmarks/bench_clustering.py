"""Clustering against raw FAISS, in ratios of one run: `python benchmarks/bench_clustering.py`

    driver     spherical_kmeans with its checks, blocks and repairs against faiss.Kmeans alone, same
               data, seeds and iterations; they take turns
    levels     two levels against one: seconds, and the mean cosine of samples with their centroid
    labels     search in cells against brute force: recall of the ten nearest, seconds with the
               judging of the cells

Prints JSON. Some 4 minutes.
"""

import argparse
import json
import statistics
import time

import faiss
import numpy as np

from data_pipeline.clustering.feature_sources import normalise
from data_pipeline.clustering.kmeans import spherical_kmeans
from data_pipeline.clustering.search import CentroidSearch, recall_of, recall_samples, search


def clustered(count: int, width: int, groups: int, seed: int = 0) -> np.ndarray:
    """Unit rows float32 [count, width] around `groups` centres of uneven sizes."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, width), dtype=np.float32)
    weights = rng.pareto(1.5, groups) + 0.1
    chosen = rng.choice(groups, count, p=weights / weights.sum())
    return normalise(centres[chosen] + 0.7 * rng.standard_normal((count, width), dtype=np.float32))


def seconds_of(function) -> tuple[float, object]:
    """(seconds, result) of one call."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def bench_driver(args) -> dict:
    """100,000 samples of width 128, 2000 centroids, 20 iterations."""
    rows = clustered(100_000, 128, 1500)

    def raw():
        solver = faiss.Kmeans(
            128,
            2000,
            niter=20,
            spherical=True,
            seed=0,
            min_points_per_centroid=1,
            max_points_per_centroid=1 << 20,
        )
        solver.train(rows)
        return solver.centroids

    rounds = [
        (seconds_of(raw)[0], seconds_of(lambda: spherical_kmeans(rows, 2000, 0, 20))[0])
        for _ in range(args.rounds)
    ]
    return {
        "faiss_s": round(statistics.median(raw_s for raw_s, _ in rounds), 2),
        "driver_s": round(statistics.median(driver_s for _, driver_s in rounds), 2),
        "driver_over_faiss": round(statistics.median(d / r for r, d in rounds), 3),
    }


def bench_levels(args) -> dict:
    """200,000 samples of width 64, 8000 centroids, by one level and by two."""
    rows, report = clustered(200_000, 64, 5000), {}
    for name, single in (("one level", 1 << 16), ("two levels", 1000)):
        seconds, (centroids, found) = seconds_of(
            lambda single=single: spherical_kmeans(rows, 8000, 0, 10, single=single)
        )
        _, cosines = search(rows, centroids, 1)
        report[name] = {
            "seconds": round(seconds, 1),
            "mean_cosine": round(float(cosines.mean()), 4),
            "repaired": found.repaired_empty + found.repaired_duplicate,
            "smallest_and_largest_cluster": [found.smallest_cluster, found.largest_cluster],
        }
    return report


def bench_labels(args) -> dict:
    """200,000 centroids of width 64, 20,000 samples."""
    rng = np.random.default_rng(2)  # vectors of encoders vary in few directions, here 12 of 64
    directions = rng.standard_normal((12, 64), dtype=np.float32)
    centroids = normalise(rng.standard_normal((200_000, 12), dtype=np.float32) @ directions)
    near = centroids[rng.integers(0, len(centroids), 20_000)]
    rows = normalise(near + 0.05 * rng.standard_normal(near.shape, dtype=np.float32))
    exact_s, (truth, _) = seconds_of(lambda: search(rows, centroids, 10))

    def found_in_cells():
        find = CentroidSearch(centroids, count=10, some=recall_samples(rows))
        return find(rows), find.how

    seconds, (found, how) = seconds_of(found_in_cells)
    return {
        "brute_force_s": round(exact_s, 2),
        "seconds": round(seconds, 2),
        "recall_at_10": round(recall_of(found, truth), 4),
        **how,
    }


def main() -> None:
    """Parse arguments, run the parts, print JSON."""
    parts = {"driver": bench_driver, "levels": bench_levels, "labels": bench_labels}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps({name: parts[name](args) for name in args.parts}, indent=1))


if __name__ == "__main__":
    main()
