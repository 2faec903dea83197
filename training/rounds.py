"""Rounds of training and clustering: the trained encoder makes better classes for the next round.

    round 1   the labels of the dataset                       OUTPUT/round_1/
    round n   features by the encoder of round n - 1, clustered into as many classes, nearest
              labels; the encoder starts from its weights, the centres from the new centroids

Each round is a run of its own with checkpoints and exports, and a killed one goes on where it was;
the last one's exports are also copied to OUTPUT. `rounds.json` records what each clustering
changed. Cost of a clustering: one forward pass over the dataset, its shards divided among the
ranks, then k-means on rank 0 while the others wait.
"""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import torch.distributed as dist

from data_pipeline.datasets import (
    Dataset,
    extract_features,
    forget_other_clusters,
    recluster,
    relabelled,
)
from data_pipeline.side_files import write_array
from model_factory.files import OWN_LISTING, check_checksums, write_checksums, write_json

from .config.schema import TrainConfig
from .distributed import Ranks, on_main
from .losses.partial_fc import PartialFC
from .stop_signals import StopSignals
from .trainer import Trainer

REPORT_NAME = "rounds.json"
Datasets = dict[str, Dataset | None]  # by the name of their head; None: synthetic patches


def train_rounds(
    config: TrainConfig,
    datasets: Datasets,
    ranks: Ranks,
    signals: StopSignals,
    logger: logging.Logger,
) -> None:
    """Train `config.rounds` rounds; one round is a plain run in OUTPUT."""
    if config.rounds == 1:
        Trainer(config, datasets, ranks=ranks, signals=signals, logger=logger).train()
        return
    if None in datasets.values():
        raise ValueError("--rounds clusters real data again; synthetic patches have none")
    output = Path(config.output)
    report = []
    _check_resume(config)
    for number in range(1, config.rounds + 1):
        folder = output / f"round_{number}"
        round_config = _round_config(config, number=number, folder=folder)
        logger.info("round %d of %d, in %s", number, config.rounds, folder)
        if ranks.is_main:
            folder.mkdir(exist_ok=True)
            write_json(folder / "config.json", json.loads(round_config.to_json()))
            shutil.copyfile(output / "run.json", folder / "run.json")
        dist.barrier()  # all ranks write records into the folder
        trainer = Trainer(round_config, datasets, ranks=ranks, signals=signals, logger=logger)
        # where a data folder was renamed since, the names on record: files of rounds have them
        config = _named_as(trainer.config, config)
        datasets = trainer.datasets
        trainer.train()
        if number < config.rounds:
            _write_centers(trainer.heads, datasets=datasets, folder=folder, ranks=ranks)
            datasets, changes = _cluster_again(datasets, folder=folder, ranks=ranks, logger=logger)
            report.append({"after_round": number, **changes})
    if ranks.is_main:
        write_json(output / REPORT_NAME, {"rounds": report})
        _copy_exports(folder, output)
    dist.barrier()


def _copy_exports(folder: Path, output: Path) -> None:
    """Copy the exports of the last round, each list of checksums after the files that it binds."""
    for name in ("backbone.pt", "backbone.json", f"backbone.pt{OWN_LISTING}"):
        shutil.copyfile(folder / name, output / name)
    shutil.copytree(folder / "hf", output / "hf", dirs_exist_ok=True)
    check_checksums(output, listing=f"backbone.pt{OWN_LISTING}")
    check_checksums(output / "hf")


def _check_resume(config: TrainConfig) -> None:
    """A checkpoint to resume from must lie in one of the rounds."""
    if config.resume in ("auto", "never"):
        return
    output = Path(config.output).resolve()
    numbers = range(1, config.rounds + 1)
    rounds = {output / f"round_{number}" for number in numbers}
    if not rounds & set(Path(config.resume).resolve().parents):
        raise ValueError(
            f"--resume {config.resume} lies in no round of {output}: name one that does"
        )


def _write_centers(
    heads: dict[str, PartialFC], datasets: Datasets, folder: Path, ranks: Ranks
) -> None:
    """Write the trained centres of heads that are not clustered again, for the next round."""
    clustered = _clustered(datasets)
    for name, head in heads.items():
        if name not in clustered:
            centers = head.whole_centers()  # a collective, so before rank 0 goes on alone
            if ranks.is_main:
                path = folder / "centers" / f"{name}.npy"
                path.parent.mkdir(exist_ok=True)
                write_array(path, centers.numpy())
                write_checksums(path.parent, [path.name], listing=f"{path.name}{OWN_LISTING}")
    dist.barrier()


def _round_config(config: TrainConfig, number: int, folder: Path) -> TrainConfig:
    """Configuration of one round, a plain run in `folder`."""
    changes: dict = {"output": str(folder), "rounds": 1}
    if config.resume not in ("auto", "never"):
        inside = folder.resolve() in Path(config.resume).resolve().parents
        changes["resume"] = config.resume if inside else "auto"
    if number > 1:
        before = folder.with_name(f"round_{number - 1}")
        changes["model"] = dataclasses.replace(config.model, init_from=str(before / "hf"))
        changes["heads"] = tuple(
            dataclasses.replace(head, init_from=_start_of(head.name, before))
            for head in config.heads
        )
    return dataclasses.replace(config, **changes)


def _start_of(head: str, before: Path) -> str:
    """Where a head's centres start from: its new centroids, or its centres of the round before."""
    centroids = _clusters(before, head) / "centroids.npy"
    if centroids.is_file():
        return str(centroids)
    return str(before / "centers" / f"{head}.npy")


def _named_as(other: TrainConfig, config: TrainConfig) -> TrainConfig:
    """`config` with the names that the heads of `other` have."""
    heads = tuple(
        dataclasses.replace(head, head_name=named.head_name)
        for head, named in zip(config.heads, other.heads, strict=True)
    )
    return dataclasses.replace(config, heads=heads)


def _clustered(datasets: Datasets) -> dict[str, Dataset]:
    """Those whose classes are clusters; classes that came from outside stay."""
    return {name: data for name, data in datasets.items() if data is not None and data.clustered}


def _clusters(folder: Path, head: str) -> Path:
    return folder / "clusters" / head


def _cluster_again(
    datasets: Datasets, folder: Path, ranks: Ranks, logger: logging.Logger
) -> tuple[Datasets, dict[str, dict]]:
    """(datasets with new labels by the encoder in FOLDER/hf, {head: what changed})."""
    encoder = folder / "hf"
    clustered = _clustered(datasets)

    def forget() -> None:
        for name, dataset in clustered.items():
            if forget_other_clusters(dataset, encoder, output=_clusters(folder, name)):
                logger.warning("head %s: clusters of other weights removed", name)

    def cluster() -> None:
        for name, dataset in clustered.items():
            recluster(dataset, encoder, output=_clusters(folder, name), report=logger.info)

    on_main(ranks, forget)  # before any rank adds features to what other weights left
    for name, dataset in clustered.items():
        extract_features(
            dataset,
            encoder,
            output=_clusters(folder, name),
            part=ranks.rank,
            num_parts=ranks.world_size,
            report=logger.info,
        )
    on_main(ranks, cluster)
    again = dict(datasets)
    changes = {}
    for name, dataset in clustered.items():
        new = relabelled(dataset, _clusters(folder, name))
        again[name] = new
        # the first label of a sample is its nearest cluster
        clusters_before = dataset.labels[:, 0]
        clusters_now = new.labels[:, 0]
        shared = normalised_mutual_information(clusters_before, clusters_now)
        changes[name] = {"classes": new.num_classes, "nmi_with_labels_before": shared}
        logger.info("head %s: new clusters share %.3f NMI with the old ones", name, shared)
    return again, changes


def normalised_mutual_information(left: np.ndarray, right: np.ndarray) -> float:
    """Mutual information of two partitions over the mean of their entropies, 0 to 1. Memory and
    time follow the samples, not the classes."""
    pairs = np.stack([left, right], axis=1).astype(np.int64)
    entropies = _entropy(left) + _entropy(right)
    # I(X; Y) = H(X) + H(Y) - H(X, Y)
    mutual = entropies - _entropy(pairs)
    # two clusterings into one class each have no entropy
    shared = 2 * mutual / max(entropies, 1e-12)
    return round(float(shared), 4)


def _entropy(values: np.ndarray) -> float:
    """Entropy of the distribution of values, or of rows of values, in nats."""
    counts = np.unique(values, axis=0, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
