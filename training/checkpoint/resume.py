"""What a start goes on from: which commit, under which names of heads, and whether it fits.

    find_commit         auto | never | PATH -> the newest commit whose bytes are as saved
    with_stored_names   a head is known by its data, so a folder may be moved or renamed
    compare             configuration and data of the checkpoint against those of this start

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
from .folder import (
    FOLDER_NAME,
    BadCheckpoint,
    CheckpointFolder,
    Commit,
    read_state,
    verify_checkpoint,
)

NEW_EPOCH = "--set resume_data=new-epoch"
# ends of fields that decide which tensors there are (moments of a frozen encoder, a step count for
# every sampled centre): what another value left may not fit, so no flag is advised
SHAPING = ("model.name", "model.frozen", "loss.sample_rate", "loss.sparse_gradient")


class ConfigMismatch(ValueError):
    """A checkpoint of another configuration or dataset."""

    outcome = "other configuration"


def find_commit(output: Path, resume: str, ranks: Ranks, logger: logging.Logger) -> Commit | None:
    """The checkpoint to start from by the rule auto | never | PATH; None for a fresh start.

    Raises BadCheckpoint on all ranks when a named checkpoint, or every existing one, is unusable.
    """
    if ranks.restarted and resume != "auto":
        logger.warning("--resume %s was for the first start: going on from the newest", resume)
        resume = "auto"
    found: list[dict] = []
    on_main(ranks, lambda: found.append(_choose(output, resume, logger)))  # hashing takes its time
    answer = broadcast_object(found[0] if found else None)
    if "error" in answer:
        raise BadCheckpoint(answer["error"])
    return None if answer["path"] is None else Commit(Path(answer["path"]), answer["state"])


def _choose(output: Path, resume: str, logger: logging.Logger) -> dict:
    """{"path", "state"} of the commit to start from, or {"error"}."""
    if resume == "never":
        return {"path": None}
    commits = CheckpointFolder(output / FOLDER_NAME).commits()
    complaints = []
    for path in commits if resume == "auto" else [Path(resume)]:
        problems = verify_checkpoint(path)
        if not problems:
            for complaint in complaints:
                logger.error("DAMAGED CHECKPOINT, using an older one: %s", complaint)
            return {"path": str(path), "state": read_state(path)}
        complaints.append(f"{path}: {'; '.join(problems)}")
    if not complaints:
        return {"path": None}
    return {
        "error": "no usable checkpoint:\n  "
        + "\n  ".join(complaints)
        + "\nname an intact one with --resume PATH, or start over with --resume never"
    }


def identity(dataset: Dataset | None) -> str:
    """What a head's data are known by, wherever they lie: bytes of shards and labels."""
    return "synthetic" if dataset is None else dataset.sha256


def heads_on_record(config: TrainConfig, datasets: Mapping, num_classes: Mapping) -> list[dict]:
    """What a checkpoint keeps of its heads, in their order."""
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
    stored = _stored_heads(state)
    _check_heads(config=config, datasets=datasets, stored=stored)
    names = [entry["name"] for entry in stored]
    renamed, heads = {}, []
    for head, name in zip(config.heads, names, strict=True):
        renamed[name] = datasets[head.name]
        heads.append(head if head.name == name else dataclasses.replace(head, head_name=name))
        if head.name != name:
            text = "head %s: its data are read from %s now, the name stays as in the checkpoint"
            logger.info(text, name, head.dataset)
    return dataclasses.replace(config, heads=tuple(heads)), renamed


def _stored_heads(state: dict) -> list[dict]:
    # checkpoints of earlier versions have the names alone, in the order of the heads
    return state.get("heads", [{"name": name} for name in state["data"]])


def _check_heads(config: TrainConfig, datasets: Mapping, stored: list[dict]) -> None:
    """Whether heads and those of a checkpoint can be told apart and paired by their places."""
    names = [entry["name"] for entry in stored]
    given = [head.name for head in config.heads]
    if len(names) != len(given):
        raise ConfigMismatch(
            f"the checkpoint has {len(names)} heads ({', '.join(names)}), this run {len(given)} "
            f"({', '.join(given)}): name as many with --list_datasets, or start over with "
            "--resume never or another --output"
        )
    for place, (head, entry) in enumerate(zip(config.heads, stored, strict=True)):
        dataset = datasets[head.name]
        if entry.get("data", identity(dataset)) == identity(dataset):
            continue
        others = [e["name"] for e in stored[:place] + stored[place + 1 :]
                  if e.get("data") == identity(dataset)]  # fmt: skip
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


def compare(
    config: TrainConfig,
    state: dict,
    other_data: list[str],
    ranks: Ranks,
    logger: logging.Logger,
) -> None:
    """Compare the configuration of this start with the checkpoint's; `other_data` are the lines of
    TrainingData.difference.

    Raises ConfigMismatch, with the flags to go on all the same, for what is not allowed to differ.
    """
    now = fingerprint(config, ranks.world_size)
    check_allowed(config.resume_allow, now)
    difference = fingerprint_difference(compared(state["fingerprint"]), now)
    allowed = [line for line in difference if is_allowed(line, config.resume_allow)]
    refused = [line for line in difference if line not in allowed]
    if refused or (other_data and config.resume_data != "new-epoch"):
        raise ConfigMismatch(
            "the checkpoint belongs to another configuration:\n  "
            + "\n  ".join(refused + other_data)
            + "\nrestore these, or start over with --resume never or another --output"
            + _way_on(config, refused=refused, other_data=other_data)
        )
    for line in [*allowed, *other_data]:
        logger.warning("resuming all the same, %s", line)


def _way_on(config: TrainConfig, refused: list[str], other_data: list[str]) -> str:
    """The flags that let this start go on in spite of what differs, where any do."""
    fields = [line.partition(":")[0] for line in refused]
    if any(field.endswith(SHAPING) for field in fields):
        return ""
    flags = [f"--resume_allow {','.join([*config.resume_allow, *fields])}"] if fields else []
    flags += [NEW_EPOCH] if other_data else []
    return f"; to go on all the same, add {' '.join(flags)}"
