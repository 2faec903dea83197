"""From raw vectors to the unit space of the centroids: centred, reduced, normalised.

Vectors share a large common part, so their mean over the clustered set is taken away: without that
all centroids point one way, and as starting centres of a head lie within its inter-class filter of
each other. A principal component analysis may keep the directions in which the set varies most.
Both are stored with the centroids, so that another set is labelled in the same space.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import DataPipelineError
from .feature_sources import normalise


@dataclass(frozen=True)
class Projection:
    """mean float32 [D]; components float32 [d, D], None: all directions as they are."""

    mean: np.ndarray
    components: np.ndarray | None = None

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Unit features float32 [N, d] of raw vectors [N, D]."""
        centred = raw - self.mean
        return normalise(centred if self.components is None else centred @ self.components.T)


def fit_projection(raw: np.ndarray, dims: int | None = None) -> Projection:
    """Projection of a set [N, D]; `dims` principal components, None: all directions.
    DataPipelineError for more than there are."""
    mean = raw.mean(axis=0, dtype=np.float64).astype(np.float32)
    if dims is None:
        return Projection(mean)
    if not 1 <= dims <= min(raw.shape):
        raise DataPipelineError(f"--pca {dims}: {raw.shape[0]} vectors of width {raw.shape[1]}")
    centred_rows = (raw - mean).astype(np.float64)
    _, vectors = np.linalg.eigh(centred_rows.T @ centred_rows)
    components = vectors[:, ::-1][:, :dims].T
    signs = np.sign(components[np.arange(dims), np.abs(components).argmax(axis=1)])
    return Projection(mean, (components * signs[:, None]).astype(np.float32))
