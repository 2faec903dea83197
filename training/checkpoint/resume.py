"""Which commit a start goes on from, under which names of heads, and whether it fits.

    find_commit         auto, or PATH of a run -> its newest commit whose bytes are as saved;
                        PATH of a commit -> that one; never -> none
    with_stored_names   a head is known by its data, so a folder may be moved or renamed
    check_fits          configuration and data of the checkpoint against those of this start

Nothing is loaded here. All functions that take `ranks` are called by all of them.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.datasets import Dataset

from ..config.schema import (
    TrainConfig,
    check_allowed,
    compared,
    fingerprint,
    fingerprint_difference,
    is_allowed,
)
from ..distributed import Ranks, broadcast_object, on_main
from ..errors import BadCheckpoint, ConfigMismatch
from .folder import FOLDER_NAME, CheckpointFolder, Commit, read_state, verify_checkpoint

NEW_EPOCH = "--set resume_data=new-epoch"
# Ends of fields that decide which tensors a checkpoint has (moments of a frozen encoder, a step
# count for every sampled centre). Tensors saved under another value may not fit, so no flag is
# advised that would let them differ.
SHAPING = (
    *("model.name", "model.frozen", "loss.sample_rate", "loss.sparse_gradient"),
    "view.frames_per_token",
)


def find_commit(output: Path, resume: str, ranks: Ranks, logger: logging.Logger) -> Commit | None:
    """The checkpoint to start from by the rule auto | never | PATH; None for a fresh start.

    A launcher starts the same command again: once this job has saved, a restart goes on from that;
    before, what was asked for holds again.

    Raises BadCheckpoint on all ranks when a named checkpoint, or every existing one, is unusable.
    """
    # Only rank 0 verifies, since hashing a large checkpoint takes minutes; on_main lets the others
    # poll meanwhile, so that no collective times out.
    chosen: dict = {}

    def choose() -> None:
        rule = _rule(output, resume=resume, restarted=ranks.restarted, logger=logger)
        chosen.update(_choose(output, resume=rule, logger=logger))

    on_main(ranks, choose)
    chosen = broadcast_object(chosen)
    # an error raised inside on_main would reach the other ranks as a lost peer
    if "error" in chosen:
        raise BadCheckpoint(chosen["error"])
    if chosen["path"] is None:
        return None
    return Commit(path=Path(chosen["path"]), state=chosen["state"])


def _rule(output: Path, resume: str, restarted: bool, logger: logging.Logger) -> str:
    """`resume` as it holds for this start."""
    folder = CheckpointFolder(output / FOLDER_NAME)
    if not restarted:
        folder.forget_start()
        return resume
    if resume == "auto":
        return resume
    if folder.has_saved():
        text = "--resume %s was for the first start: going on from this job's newest commit"
        logger.warning(text, resume)
        return "auto"
    logger.warning("restarted before the first save: --resume %s holds again", resume)
    return resume


def _choose(output: Path, resume: str, logger: logging.Logger) -> dict:
    """{"path", "state"} of the commit to start from, or {"error"}."""
    if resume == "never":
        return {"path": None}
    named = Path(resume)
    commits = [named]
    if resume == "auto":
        commits = CheckpointFolder(output / FOLDER_NAME).commits()
    elif (named / FOLDER_NAME).is_dir():
        commits = CheckpointFolder(named / FOLDER_NAME).commits()
        if not commits:
            return {"error": f"{named} holds no checkpoint: name another with --resume PATH"}
    damaged: list[str] = []
    for path in commits:
        problems = verify_checkpoint(path)
        if not problems:
            for newer in damaged:
                logger.error("DAMAGED CHECKPOINT, using an older one: %s", newer)
            return {"path": str(path), "state": read_state(path)}
        damaged.append(f"{path}: {'; '.join(problems)}")
    if not damaged:
        return {"path": None}
    return {
        "error": "no usable checkpoint:\n  "
        + "\n  ".join(damaged)
        + "\nname an intact one with --resume PATH, or start over with --resume never"
    }


def identity(dataset: Dataset | None) -> str:
    """Identity of a head's data, wherever they lie: a digest of shards and labels."""
    return "synthetic" if dataset is None else dataset.sha256


def heads_on_record(
    config: TrainConfig, datasets: Mapping[str, Dataset | None], num_classes: Mapping[str, int]
) -> list[dict]:
    """Names, data and classes of the heads, in their order, as a checkpoint has them."""
    return [
        {
            "name": head.name,
            "data": identity(datasets[head.name]),
            "num_classes": num_classes[head.name],
        }
        for head in config.heads
    ]


def with_stored_names(
    config: TrainConfig,
    datasets: dict[str, Dataset | None],
    state: dict,
    logger: logging.Logger,
) -> tuple[TrainConfig, dict[str, Dataset | None]]:
    """Configuration and datasets with the names that heads have in a checkpoint.

    Names are parts of the state (tensors, records, random draws), so a head keeps the one it began
    with wherever its folder lies now.

    Raises ConfigMismatch for another number of heads, for other classes, and for the same data in
    another order.
    """
    # checkpoints of earlier versions have the names alone, in the order of the heads
    stored = state.get("heads", [{"name": name} for name in state["data"]])
    _check_heads(config=config, datasets=datasets, stored=stored)
    datasets_by_stored_name = {}
    heads = []
    for head, entry in zip(config.heads, stored, strict=True):
        name = entry["name"]
        datasets_by_stored_name[name] = datasets[head.name]
        if head.name != name:
            text = "head %s: its data are read from %s now, the name stays as in the checkpoint"
            logger.info(text, name, head.dataset)
            head = dataclasses.replace(head, head_name=name)
        heads.append(head)
    return dataclasses.replace(config, heads=tuple(heads)), datasets_by_stored_name


def _check_heads(
    config: TrainConfig, datasets: Mapping[str, Dataset | None], stored: list[dict]
) -> None:
    """Check that heads and those of a checkpoint can be paired in their order."""
    names = [entry["name"] for entry in stored]
    given = [head.name for head in config.heads]
    if len(names) != len(given):
        raise ConfigMismatch(
            f"the checkpoint has {len(names)} heads ({', '.join(names)}), this run {len(given)} "
            f"({', '.join(given)}): name as many with --list_datasets, or start over with "
            "--resume never or another --output"
        )
    for head, entry in zip(config.heads, stored, strict=True):
        dataset = datasets[head.name]
        if entry.get("data", identity(dataset)) == identity(dataset):
            continue
        # other data: of another head, of other classes, or changed (TrainingData.difference)
        others = [other["name"] for other in stored if other.get("data") == identity(dataset)]
        if others:
            raise ConfigMismatch(
                f"the checkpoint has its heads in another order: {', '.join(names)}; {head.dataset}"
                f" has the data of {others[0]}. Name them in that order with --list_datasets"
            )
        if dataset is not None and entry["num_classes"] != dataset.num_classes:
            raise ConfigMismatch(
                f"head {entry['name']} has {entry['num_classes']} classes in the checkpoint, "
                f"{head.dataset} has {dataset.num_classes}: restore its labels, or start over with "
                "--resume never or another --output"
            )


def check_fits(
    config: TrainConfig,
    state: dict,
    data_difference: list[str],
    ranks: Ranks,
    logger: logging.Logger,
) -> None:
    """Compare the configuration of this start with the checkpoint's; `data_difference` are the
    lines of TrainingData.difference.

    Raises ConfigMismatch, with the flags to go on all the same, where a field differs that is not
    allowed to.
    """
    now = fingerprint(config, ranks.world_size)
    check_allowed(config.resume_allow, now)
    difference = fingerprint_difference(compared(state["fingerprint"]), now)
    allowed = [line for line in difference if is_allowed(line, config.resume_allow)]
    refused = [line for line in difference if line not in allowed]
    refused_data = [] if config.resume_data == "new-epoch" else data_difference
    if refused or refused_data:
        raise ConfigMismatch(
            "the checkpoint belongs to another configuration:\n  "
            + "\n  ".join(refused + refused_data)
            + "\nrestore these, or start over with --resume never or another --output"
            + _advice(config, refused=refused, refused_data=refused_data)
        )
    for line in [*allowed, *data_difference]:
        logger.warning("resuming all the same, %s", line)


def _advice(config: TrainConfig, refused: list[str], refused_data: list[str]) -> str:
    """The flags that let this start go on in spite of the differences; "" where none do."""
    fields = [line.partition(":")[0] for line in refused]
    if any(field.endswith(SHAPING) for field in fields):
        return ""
    flags = []
    if fields:
        allowed = [*config.resume_allow, *fields]
        flags.append(f"--resume_allow {','.join(allowed)}")
    if refused_data:
        flags.append(NEW_EPOCH)
    return f"; to go on all the same, add {' '.join(flags)}"
