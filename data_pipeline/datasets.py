"""Names of datasets -> manifest and labels. A name is a registered one or simply a packed folder.

Training reaches clustering through this module alone: labels at every start, centroids where a head
starts from some, features and k-means only when a round clusters again. So its imports stand in the
functions that need them.

To add a dataset, pack, cluster and label it, then pass its folder; register it here only to give it
a name.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from model_factory.command_line.plain_text import show
from model_factory.files import OWN_LISTING, check_checksums

from .errors import CorruptShard, DataPipelineError, MissingData
from .shards.manifest import Manifest, load_manifest
from .side_files import read_foreign_array

EMBEDDED = "motion_shapes"

ReportLine = Callable[[str], object]  # takes one line at a time


@dataclass(frozen=True)
class Dataset:
    """What a training head reads: manifest, labels int32 [N, L] (-1 ignored)
    and the number of classes.
    """

    name: str
    manifest: Manifest
    labels: np.ndarray
    num_classes: int
    clustered: bool = True  # False: from outside, not to be clustered again

    @cached_property
    def sha256(self) -> str:
        """Identity of everything a training reads: shards, labels and the number of classes."""
        digest = hashlib.sha256(f"{self.manifest.sha256} {self.num_classes}".encode())
        # labels too: clustering again changes them and leaves the manifest as it is
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class DatasetSpec:
    """Where a dataset lives: folder of shards with manifest.json,
    folder of labels.npy (usually the same).
    """

    name: str
    shards: Path
    labels: Path

    def load(self, allow_missing_shards: bool = False) -> Dataset:
        """Read and check manifest and labels; MissingData or CorruptShard name the remedy."""
        from .clustering.labels import are_clusters, load_labels

        manifest = load_manifest(self.shards, allow_missing_shards)
        labels, num_classes = load_labels(self.labels, manifest)
        return Dataset(
            name=self.name,
            manifest=manifest,
            labels=labels,
            num_classes=num_classes,
            clustered=are_clusters(self.labels, manifest),
        )


_REGISTRY: dict[str, Callable[[], DatasetSpec]] = {}


def register_dataset(name: str, build: Callable[[], DatasetSpec]) -> None:
    """Give a dataset a name."""
    _REGISTRY[name] = build


def resolve_dataset(name: str) -> DatasetSpec:
    """Spec of a registered name or of a packed folder; MissingData lists what is known."""
    if name in _REGISTRY:
        return _REGISTRY[name]()
    folder = Path(name)
    if folder.is_dir():
        return DatasetSpec(folder.name, shards=folder, labels=folder)
    known = ", ".join([EMBEDDED, *sorted(_REGISTRY)])
    raise MissingData(
        f"dataset {name!r} is neither a registered name ({known}) nor a folder: make one with "
        "`python -m data_pipeline pack`, `cluster` and `label`, and pass its path"
    )


def embedded_spec(directory: Path) -> DatasetSpec:
    """Where prepare_embedded leaves the training split."""
    return DatasetSpec(EMBEDDED, shards=directory / "train", labels=directory / "train")


def forget_other_clusters(dataset: Dataset, encoder: Path, output: Path) -> bool:
    """Remove from `output` what other weights made; returns whether there was anything."""
    from .clustering.feature_sources import FeatureConfig
    from .clustering.features import is_of, origin_of
    from .clustering.labels import RECORD_NAME
    from .clustering.pipeline import FEATURES_NAME, made_by

    config = FeatureConfig(str(encoder))
    weights_sha256 = config.weights_sha256()
    origin = origin_of(dataset.manifest, config=config, weights_sha256=weights_sha256)
    if not is_of(output / FEATURES_NAME, origin):
        # all of it: centroids and labels beside the features are of the same weights
        shutil.rmtree(output)
        return True
    # Features may be gone, by hand or by a removal that was killed, while labels are left: the
    # record of the centroids says of which weights those are. Without them all is made again.
    labels = output / RECORD_NAME
    if not labels.is_file() or made_by(output, weights_sha256):
        return False
    labels.unlink()
    return True


def extract_features(
    dataset: Dataset,
    encoder: Path,
    output: Path,
    part: int,
    num_parts: int,
    report: ReportLine = show,
) -> None:
    """Vectors by another encoder, of every num_parts-th shard from `part` on, for recluster."""
    from .clustering.feature_sources import FeatureConfig
    from .clustering.features import extract
    from .clustering.pipeline import FEATURES_NAME

    extract(
        dataset.manifest,
        config=FeatureConfig(str(encoder)),
        folder=output / FEATURES_NAME,
        task_id=part,
        num_tasks=num_parts,
        report=report,
    )


def recluster(dataset: Dataset, encoder: Path, output: Path, report: ReportLine = show) -> None:
    """Labels by another encoder in `output`: features, as many centroids and as wide labels as
    before.

    What is there already stays. Damaged labels are reported and made again; damaged records of
    features or of a clustering that was stopped are a CorruptShard, which names the remedy.
    """
    from .clustering.feature_sources import FeatureConfig
    from .clustering.pipeline import ClusterConfig, cluster, label

    try:
        relabelled(dataset, output)
        return
    except MissingData:
        pass  # the usual case: this round is not labelled yet
    except CorruptShard as error:
        report(f"{error}; done now")
    config = ClusterConfig(dataset.num_classes, features=FeatureConfig(str(encoder)))
    cluster(dataset.manifest, config=config, output=output, report=report)
    label(
        dataset.manifest,
        centroids_folder=output,
        num_labels=dataset.labels.shape[1],
        output=output,
        report=report,
    )


def relabelled(dataset: Dataset, labels_folder: Path) -> Dataset:
    """The same shards with the labels of another folder."""
    from .clustering.labels import load_labels

    labels, num_classes = load_labels(labels_folder, dataset.manifest)
    # whatever the labels before were: the only caller, a round of training, has just clustered
    return replace(dataset, labels=labels, num_classes=num_classes, clustered=True)


def start_centers(path: Path) -> np.ndarray:
    """Starting centres of a head from a .npy file [num_classes, D] of floats. Those of `cluster`
    must be as their record states, those of a round of training as the sha256 beside them.
    ValueError names a file that is damaged or something else."""
    from .clustering.kmeans import CENTROIDS_NAME, RECORD_NAME, load_centroids

    # a record binds centroids by their hash; a file from elsewhere has none
    if path.name == CENTROIDS_NAME and (path.parent / RECORD_NAME).is_file():
        return load_centroids(path.parent)[0]
    check_checksums(path.parent, [path.name], listing=f"{path.name}{OWN_LISTING}")
    centers = read_foreign_array(path)
    if centers.dtype.kind != "f" or centers.ndim != 2:
        raise DataPipelineError(f"{path} holds no floats [num_classes, D], as starting centres are")
    if not np.isfinite(centers).all():
        raise DataPipelineError(f"{path} holds numbers that are not finite: give other centres")
    return centers


def prepare_embedded(
    directory: Path, num_train: int = 1200, num_val: int = 240, report: ReportLine = show
) -> DatasetSpec:
    """Write, pack, cluster and label the embedded motion_shapes set under `directory`;
    steps that are done are skipped.

    98 patches are selected of each 64-frame clip of 112 px (the I-frame's 49 and the best 49 of the
    P-frames), and 8 whole frames are stored. The pseudo-labels are the 10 nearest of 64 clusters of
    the codec descriptor.
    """
    from .clustering.labels import load_labels
    from .clustering.pipeline import ClusterConfig, cluster, label
    from .embedded.motion_shapes import write_motion_shapes
    from .shards.inputs import list_inputs
    from .shards.pack import PackConfig, pack
    from .shards.sample_builder import SampleConfig

    write_motion_shapes(directory, num_train=num_train, num_val=num_val)
    sample = SampleConfig(size=112, gop=64, budget=98, num_full_frames=8)
    config = PackConfig(sample, samples_per_shard=200)
    for split in ("train", "val"):
        inputs = list_inputs([directory / f"{split}.csv"])
        # clips and shards are ours: those of an older version or another number are made again
        pack(inputs, output=directory / split, config=config, report=report, mode="replace")
    spec = embedded_spec(directory)
    manifest = load_manifest(spec.shards)
    try:
        load_labels(spec.labels, manifest)
    except (MissingData, CorruptShard):
        # none yet, or of other clips, or damaged: they are ours and made again
        centroids = directory / "centroids"
        shutil.rmtree(centroids, ignore_errors=True)
        clusters = ClusterConfig(min(64, len(manifest)))
        cluster(manifest, config=clusters, output=centroids, report=report)
        label(
            manifest,
            centroids_folder=centroids,
            num_labels=10,
            output=spec.labels,
            report=report,
        )
    return spec
