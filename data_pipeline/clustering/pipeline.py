"""The commands on labels: `cluster` (features -> centroids), `label` (features -> nearest).

features -> Projection -> (representatives) -> spherical_kmeans -> clusters.json, centroids.npy
features -> the same Projection -> CentroidSearch -> labels.json, labels.npy
"""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model_factory.files import DamagedFile, check_fields

from ..errors import CorruptShard, DataPipelineError, MissingData
from ..shards.manifest import Manifest
from .feature_sources import FeatureConfig, normalise
from .features import (
    ReportLine,
    extract,
    feature_pieces,
    is_complete,
    load_features,
    origin_of,
    quiet,
)
from .kmeans import (
    RECORD_NAME,
    KMeansReport,
    check_features,
    how_to_cluster,
    load_centroids,
    save_centroids,
    spherical_kmeans,
)
from .labels import padded, save_labels
from .progress import SavedProgress
from .search import CentroidSearch, check_threshold, recall_samples, representatives

FEATURES_NAME = "features"
# what a record of centroids has besides, for another set to be labelled in their space
NEEDED_FIELDS: dict[str, type | tuple[type, ...]] = {
    "features": dict,
    "weights_sha256": (str, type(None)),
    "manifest_sha256": str,
    "feature_mean": list,
}


@dataclass(frozen=True)
class Projection:
    """From raw vectors to the unit space of the centroids: centred, reduced, normalised.

    mean float32 [D]; components float32 [d, D], None: all directions as they are.

    Vectors share a large common part, so their mean over the clustered set is taken away: without
    that all centroids point one way, and as starting centres of a head lie within its inter-class
    filter of each other. Both are stored with the centroids, so that another set is labelled in the
    same space.
    """

    mean: np.ndarray
    components: np.ndarray | None = None

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Unit features float32 [N, d] of raw vectors [N, D]."""
        centred = raw - self.mean
        if self.components is not None:
            centred = centred @ self.components.T
        return normalise(centred)


def fit_projection(raw: np.ndarray, dims: int | None = None) -> Projection:
    """Projection of a set [N, D]; `dims` principal components, those directions in which the set
    varies most, None: all directions. DataPipelineError for more than there are."""
    # summed in float64: float32 sums of millions of rows lose their last digits
    mean = raw.mean(axis=0, dtype=np.float64).astype(np.float32)
    if dims is None:
        return Projection(mean)
    if not 1 <= dims <= min(raw.shape):
        count, width = raw.shape
        raise DataPipelineError(f"--pca {dims}: {count} vectors of width {width}")
    # eigenvectors of the D x D products, not an SVD of the N x D vectors: N is far larger than D
    centred_rows = (raw - mean).astype(np.float64)
    _, vectors = np.linalg.eigh(centred_rows.T @ centred_rows)
    components = vectors[:, ::-1][:, :dims].T  # eigh gives the smallest first
    # an eigenvector's sign is arbitrary: the largest entry is made positive
    largest = np.abs(components).argmax(axis=1)
    signs = np.sign(components[np.arange(dims), largest])
    components = components * signs[:, None]
    return Projection(mean, components=components.astype(np.float32))


@dataclass(frozen=True)
class ClusterConfig:
    """How a set is clustered.

    features: where vectors come from; pca: principal components that are used of them, None: all
    directions. near_duplicates: cosine from which samples count as one, None: all count. init:
    folder of centroids to start from.
    """

    num_centroids: int
    features: FeatureConfig = FeatureConfig()
    pca: int | None = None
    seed: int = 0
    num_iterations: int = 25
    near_duplicates: float | None = None
    init: Path | None = None

    def __post_init__(self) -> None:
        if self.num_centroids < 1 or self.num_iterations < 0:
            raise ValueError(
                f"--num-centroids {self.num_centroids} must be at least 1, --iterations "
                f"{self.num_iterations} not negative"
            )
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"--seed {self.seed} must be 0 to {(1 << 31) - 1}")
        if self.pca is not None and self.pca < 1:
            raise ValueError(f"--pca {self.pca} must be at least 1")
        check_threshold(self.near_duplicates)


def cluster(
    manifest: Manifest,
    config: ClusterConfig,
    output: Path,
    features_folder: Path | None = None,
    report: ReportLine = quiet,
) -> np.ndarray:
    """Cluster a packed set and write centroids.npy and clusters.json to `output`. Features are kept
    in `features_folder` (OUTPUT/features); a run that was killed goes on from the shards and
    iterations that were done.

    Returns the centroids float32 [K, D]. Raises DataPipelineError for an impossible number of
    centroids, and for starting centroids of another number or width. Memory: the raw vectors of the
    whole set and their projection, both float32; with --pca for a while also as float64.
    """
    if config.num_centroids > len(manifest):
        raise DataPipelineError(
            f"--num-centroids is {config.num_centroids}, {manifest.directory} holds "
            f"{len(manifest)} samples: ask for fewer"
        )
    # before hours of features: they may be damaged, or not fit
    starts = None
    started_from = {}
    if config.init is not None:
        starts, sha256 = _starts(config, init=config.init, report=report)
        started_from["started_from_sha256"] = sha256
    folder = features_folder or output / FEATURES_NAME
    extract(manifest, config=config.features, folder=folder, report=report)
    raw, _ = load_features(manifest, folder)
    check_features(raw, num_centroids=1)
    projection = fit_projection(raw, config.pca)
    features = projection(raw)
    details: dict[str, Any] = {
        "manifest_sha256": manifest.sha256,
        "features": asdict(config.features),
        "weights_sha256": config.features.weights_sha256(),
        "pca": config.pca,
        "seed": config.seed,
        "num_iterations": config.num_iterations,
        "near_duplicates": config.near_duplicates,
        "feature_mean": projection.mean.tolist(),
        **started_from,
    }
    if config.near_duplicates is not None:
        # before k-means, so that repeated samples do not draw centroids to themselves
        groups = representatives(features, config.near_duplicates)
        features = features[np.unique(groups)]
        removed = len(groups) - len(features)
        details["near_duplicates_removed"] = removed
        report(f"{removed} of {len(groups)} samples are near-duplicates")
    centroids, outcome = _centroids(
        features, config=config, output=output, starts=starts, details=details, report=report
    )
    save_centroids(
        output,
        centroids=centroids,
        details={**details, **asdict(outcome)},
        components=projection.components,
    )
    return centroids


def _starts(config: ClusterConfig, init: Path, report: ReportLine) -> tuple[np.ndarray, str]:
    """Centroids of the folder `init` to start from, and their sha256. DataPipelineError for another
    number or width than `config` asks for; a warning where they were made of other vectors."""
    starts, record, _ = load_centroids(init)
    count, width = starts.shape
    if count != config.num_centroids:
        raise DataPipelineError(
            f"--init {init} holds {count} centroids, --num-centroids is {config.num_centroids}: "
            "ask for as many, or start from others"
        )
    # without --pca the width is known only when there are vectors: spherical_kmeans compares it
    if config.pca is not None and width != config.pca:
        raise DataPipelineError(
            f"--init {init} holds centroids of width {width}, --pca is {config.pca}: ask for as "
            "many components, or start from others"
        )
    wanted = {"weights_sha256": config.features.weights_sha256(), "pca": config.pca}
    found = {key: record.get(key) for key in wanted}
    settings = asdict(config.features)
    del settings["encoder"]  # it is known by its weights: its folder may have moved
    wanted.update(settings)
    if isinstance(record.get("features"), dict):
        found.update(record["features"])
    others = [key for key in wanted if found.get(key) != wanted[key]]
    if others:
        # no error: k-means leaves any start, and other starts only cost iterations
        report(
            f"WARNING: --init {init} was clustered with other {', '.join(others)}: its centroids "
            "lie in another space and are a start like any other"
        )
    return starts, record["sha256"]


def label(
    manifest: Manifest,
    centroids_folder: Path,
    num_labels: int,
    output: Path,
    features_folder: Path | None = None,
    report: ReportLine = quiet,
) -> np.ndarray:
    """Write labels.npy and labels.json of a packed set to `output`; returns labels int32 [N, L].

    Features are computed as `cluster` did, or taken from where it left them when it was the same
    set; one shard of them is in memory at a time. Raises MissingData or DataPipelineError.
    """
    if num_labels < 1:
        raise ValueError(f"--num-labels {num_labels} must be at least 1")
    centroids, record, components = load_centroids(centroids_folder)
    path = centroids_folder / RECORD_NAME
    try:
        check_fields(record, fields=NEEDED_FIELDS, name=str(path))
        config = FeatureConfig.of(record["features"], name=str(path))
    except DamagedFile as error:
        again = how_to_cluster("DIR", centroids_folder)
        raise CorruptShard(f"{error}: cluster again: {again}") from error
    # the vectors of the clustered set itself lie beside its centroids
    same_set = record["manifest_sha256"] == manifest.sha256
    beside = centroids_folder if same_set else output
    folder = features_folder or beside / FEATURES_NAME
    origin = origin_of(manifest, config=config, weights_sha256=record["weights_sha256"])
    # vectors that are all there need no encoder, which may have moved since
    if not is_complete(manifest, folder=folder, origin=origin):
        _check_encoder(
            config,
            weights_sha256=record["weights_sha256"],
            manifest=manifest,
            centroids_folder=centroids_folder,
        )
        extract(manifest, config=config, folder=folder, report=report)
    projection = Projection(np.array(record["feature_mean"], np.float32), components)
    labels = np.full((len(manifest), num_labels), -1, np.int32)
    find = None
    start = 0
    for raw in feature_pieces(manifest, folder):
        # their numbers are finite, which is checked where vectors are made and read; all of a shard
        # may be zero, which a black picture's descriptor is
        rows = projection(raw)
        if find is None:
            # once, by the first shard's rows: a recall is measured on samples of the set
            find = CentroidSearch(centroids, count=num_labels, some=recall_samples(rows))
        end = start + len(rows)
        labels[start:end] = padded(find(rows), num_labels)
        start = end
    details = {"centroids_sha256": record["sha256"]}
    if find is not None:
        details.update(find.how)
    save_labels(
        output, labels=labels, manifest=manifest, num_classes=len(centroids), details=details
    )
    return labels


def made_by(centroids_folder: Path, weights_sha256: str | None) -> bool:
    """Whether a folder holds centroids of these weights; damaged ones are of nobody."""
    try:
        _, record, _ = load_centroids(centroids_folder)
    except (MissingData, CorruptShard):
        return False
    return record.get("weights_sha256") == weights_sha256


def _check_encoder(
    config: FeatureConfig, weights_sha256: str | None, manifest: Manifest, centroids_folder: Path
) -> None:
    """The weights that made the centroids must be there to make vectors of more samples."""
    try:
        found = config.weights_sha256()
    except MissingData as error:
        folder = shlex.quote(str(manifest.directory))
        raise MissingData(
            f"{centroids_folder} was made by the encoder {config.encoder}, which is not there. "
            "Where it lies now, make the vectors by it: `python -m data_pipeline features "
            f"{folder} --encoder ENCODER{config.flags()} --output FEATURES`, and label with "
            "`--features FEATURES`"
        ) from error
    if found != weights_sha256:
        raise DataPipelineError(
            f"{config.encoder} changed since {centroids_folder} was made from it: remove that "
            f"folder and cluster again: {how_to_cluster('DIR', centroids_folder)}"
        )


def _centroids(
    features: np.ndarray,
    config: ClusterConfig,
    output: Path,
    starts: np.ndarray | None,
    details: dict[str, Any],
    report: ReportLine,
) -> tuple[np.ndarray, KMeansReport]:
    """(centroids, what happened); goes on from what an earlier start saved. `details` decide the
    centroids: what was saved under others is thrown away."""
    progress = SavedProgress(output, {**details, "num_centroids": config.num_centroids})
    saved, done = progress.centroids()
    if saved is not None:
        report(f"going on after {done} iterations, from {progress.folder}")
    centroids, outcome = spherical_kmeans(
        features,
        num_centroids=config.num_centroids,
        seed=config.seed,
        num_iterations=max(0, config.num_iterations - done),
        initial=starts if saved is None else saved,
        progress=progress,
    )
    if saved is not None:
        # what this start went on from is no beginning of the clustering: the record of one that was
        # killed equals that of an undisturbed one
        outcome.started_from = 0 if starts is None else config.num_centroids
    if outcome.repaired_empty or outcome.repaired_duplicate:
        report(
            f"repaired {outcome.repaired_empty} empty and {outcome.repaired_duplicate} repeated "
            "centroids"
        )
    if outcome.left_empty:
        report(
            f"WARNING: {outcome.left_empty} centroids are still empty or repeated: these samples "
            "do not make so many clusters; ask for fewer"
        )
    if outcome.zero_vectors:
        report(f"{outcome.zero_vectors} vectors of zeros took no part")
    # the caller writes the centroids next: after a kill between the two all is computed again
    progress.remove()
    return centroids, outcome
