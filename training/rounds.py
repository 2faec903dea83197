"""Rounds of training and clustering: the trained encoder makes better classes for the next round.

    round 1   the labels of the dataset                       OUTPUT/round_1/
    round n   features by the encoder of round n - 1, clustered into as many classes, nearest
              labels; the encoder starts from its weights, the centres from the new centroids

Each round is a run of its own with checkpoints and exports, and a killed one goes on where it was;
the last one's exports are also left in OUTPUT. `rounds.json` says what each clustering changed.
Cost of a clustering: one forward pass over the dataset, its shards divided among the ranks, then
k-means on rank 0 while the others wait.
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
from .stop_signals import StopSignals
from .trainer import Trainer

REPORT_NAME = "rounds.json"


def train_rounds(
    config: TrainConfig,
    datasets: dict[str, Dataset | None],
    ranks: Ranks,
    signals: StopSignals,
    logger: logging.Logger,
) -> None:
    """Train `config.rounds` rounds; one round is a plain run in OUTPUT."""
    if config.rounds == 1:
        Trainer(config, datasets, ranks, signals, logger).train()
        return
    if None in datasets.values():
        raise ValueError("--rounds clusters real data again; synthetic patches have none")
    output, report = Path(config.output), []
    _check_resume(config)
    for number in range(1, config.rounds + 1):
        folder = output / f"round_{number}"
        started = _round_config(config, number, folder)
        logger.info("round %d of %d, in %s", number, config.rounds, folder)
        if ranks.is_main:
            folder.mkdir(exist_ok=True)
            write_json(folder / "config.json", json.loads(started.to_json()))
            shutil.copyfile(output / "run.json", folder / "run.json")
        dist.barrier()
        trainer = Trainer(started, datasets, ranks, signals, logger)
        # where a data folder was renamed since, the names on record: files of rounds have them
        config = _named_as(trainer.config, config)
        datasets = trainer.datasets
        trainer.train()
        if number < config.rounds:
            _keep_centers(trainer.heads, datasets, folder, ranks)
            datasets, changes = _cluster_again(datasets, folder, ranks, logger)
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
    path, output = Path(config.resume).resolve(), Path(config.output).resolve()
    rounds = {output / f"round_{number}" for number in range(1, config.rounds + 1)}
    if config.resume not in ("auto", "never") and not rounds & set(path.parents):
        raise ValueError(
            f"--resume {config.resume} lies in no round of {output}: name one that does"
        )


def _keep_centers(heads, datasets, folder: Path, ranks: Ranks) -> None:
    """Leave the trained centres of heads that are not clustered again, for the next round."""
    for name, head in heads.items():
        if not datasets[name].clustered:
            centers = head.whole_centers()
            if ranks.is_main:
                (folder / "centers").mkdir(exist_ok=True)
                path = folder / "centers" / f"{name}.npy"
                write_array(path, centers.numpy())
                write_checksums(path.parent, [path.name], listing=f"{path.name}{OWN_LISTING}")
    dist.barrier()


def _round_config(config: TrainConfig, number: int, folder: Path) -> TrainConfig:
    changes: dict = {"output": str(folder), "rounds": 1}
    if config.resume not in ("auto", "never"):
        inside = folder.resolve() in Path(config.resume).resolve().parents
        changes["resume"] = config.resume if inside else "auto"
    if number > 1:
        before = folder.with_name(f"round_{number - 1}")
        changes["model"] = dataclasses.replace(config.model, init_from=str(before / "hf"))
        changes["heads"] = tuple(
            dataclasses.replace(head, init_from=_start(before, head.name)) for head in config.heads
        )
    return dataclasses.replace(config, **changes)


def _named_as(known: TrainConfig, config: TrainConfig) -> TrainConfig:
    """A configuration whose heads are called as those of a round."""
    pairs = zip(config.heads, known.heads, strict=True)
    heads = tuple(dataclasses.replace(head, head_name=one.head_name) for head, one in pairs)
    return dataclasses.replace(config, heads=heads)


def _start(before: Path, head: str) -> str:
    """Where a head's centres start from: its new centroids, or its centres of the round before."""
    centroids = _clusters(before, head) / "centroids.npy"
    return str(centroids if centroids.is_file() else before / "centers" / f"{head}.npy")


def _clusters(folder: Path, head: str) -> Path:
    return folder / "clusters" / head


def _cluster_again(datasets, folder: Path, ranks: Ranks, logger) -> tuple[dict, dict]:
    """New labels of every head by the encoder in FOLDER/hf, and what changed; heads whose classes
    came from outside keep them."""
    encoder, report = folder / "hf", logger.info
    clustered = {name: dataset for name, dataset in datasets.items() if dataset.clustered}

    def forget() -> None:
        for name, dataset in clustered.items():
            if forget_other_clusters(dataset, encoder, _clusters(folder, name)):
                logger.warning("head %s: clusters of other weights removed", name)

    def cluster() -> None:
        for name, dataset in clustered.items():
            recluster(dataset, encoder, _clusters(folder, name), report)

    on_main(ranks, forget)
    for name, dataset in clustered.items():
        part = (_clusters(folder, name), ranks.rank, ranks.world_size)
        extract_features(dataset, encoder, *part, report)
    on_main(ranks, cluster)
    again, changes = dict(datasets), {}
    for name, dataset in clustered.items():
        again[name] = relabelled(dataset, _clusters(folder, name))
        shared = normalised_mutual_information(dataset.labels[:, 0], again[name].labels[:, 0])
        changes[name] = {"classes": again[name].num_classes, "nmi_with_labels_before": shared}
        logger.info("head %s: new clusters share %.3f NMI with the old ones", name, shared)
    return again, changes


def normalised_mutual_information(left: np.ndarray, right: np.ndarray) -> float:
    """Mutual information of two partitions over the mean of their entropies, 0 to 1. Memory and
    time follow the samples, not the classes."""
    pairs = np.stack([left, right], axis=1).astype(np.int64)
    entropies = [_entropy(np.unique(side, return_counts=True)[1]) for side in (left, right)]
    joint = _entropy(np.unique(pairs, axis=0, return_counts=True)[1])
    mutual = sum(entropies) - joint
    return round(float(2 * mutual / max(sum(entropies), 1e-12)), 4)


def _entropy(counts: np.ndarray) -> float:
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
