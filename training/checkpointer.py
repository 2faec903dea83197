"""Checkpoints that are whole or do not exist, and load on any number of ranks.

    OUTPUT/checkpoints/
      step_00000200/
        *.safetensors     encoder, centres and AdamW moments, written by
                          torch.distributed.checkpoint: centres and their moments as one tensor over
                          all classes (DTensor), so another world size can read them
        state.json        step, data position, configuration fingerprint, versions
        manifest.json     size and sha256 of every file; written last
      .step_00000400.tmp/ a save in progress; a leftover is deleted at the next start

A save is committed by one directory rename after everything is on disk. Before loading, every byte
is checked against the manifest; when the newest commit is damaged the previous one is used, loudly.
Nothing is ever unpickled. Cost: three times the parameters in bytes (weight and two moments, fp32),
hashed once when saved and once when loaded.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from data_pipeline.shards.writer import file_sha256, write_atomically

from .distributed import Ranks, broadcast_object
from .losses.partial_fc import PartialFC
from .optimizer import ensure_moments

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class BadCheckpoint(ValueError):
    """A checkpoint that is damaged, missing or not of this run;
    the message says which and what to do.
    """


@dataclass(frozen=True)
class Commit:
    """A verified checkpoint: its folder and its state.json."""

    path: Path
    state: dict


class Checkpointer:
    """Saves and restores encoder, heads and optimizer of one run."""

    def __init__(
        self,
        output: Path,
        ranks: Ranks,
        encoder: nn.Module,
        heads: dict[str, PartialFC],
        optimizer: torch.optim.Optimizer,
        keep: int,
        logger: logging.Logger,
    ):
        self._directory = output / "checkpoints"
        self._ranks, self._encoder, self._heads, self._optimizer = ranks, encoder, heads, optimizer
        self._keep, self._logger = keep, logger
        if ranks.is_main:
            self._directory.mkdir(parents=True, exist_ok=True)
            for leftover in self._directory.glob(".step_*.tmp"):
                shutil.rmtree(leftover)
        dist.barrier()

    def save(self, step: int, state: dict) -> Path:
        """Write and commit the checkpoint of `step`; `state` is JSON-like. Called by all ranks."""
        final = self._directory / f"step_{step:08d}"
        temporary = self._directory / f".{final.name}.tmp"
        if self._ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        dist.barrier()
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(self._tensors(), storage_writer=writer)
        dist.barrier()
        if self._ranks.is_main:
            write_atomically(
                temporary / "state.json", json.dumps({"step": step, **state}, indent=1).encode()
            )
            _write_manifest(temporary)
            os.rename(temporary, final)
            _sync_folder(self._directory)
            for old in self._commits()[self._keep :]:
                shutil.rmtree(old)
        dist.barrier()
        return final

    def find(self, resume: str) -> Commit | None:
        """The checkpoint to start from by the rule auto | never | PATH; None for a fresh start.

        Raises BadCheckpoint on all ranks when a named checkpoint, or every existing one, is
        unusable. Nothing is loaded yet, so the caller can compare the state first.
        """
        answer = broadcast_object(self._choose(resume) if self._ranks.is_main else None)
        if "error" in answer:
            raise BadCheckpoint(answer["error"])
        return None if answer["path"] is None else Commit(Path(answer["path"]), answer["state"])

    def start(self, commit: Commit | None) -> None:
        """Load the tensors of a commit, and set aside the commits that lie beyond the start: they
        are another run's future and would otherwise outlive, and outrank, the new ones.
        """
        if commit is not None:
            reader = HuggingFaceStorageReader(str(commit.path))
            dcp.load(self._tensors(), storage_reader=reader)
        dist.barrier()
        first = 0 if commit is None else commit.state["step"]
        if self._ranks.is_main:
            for path in self._commits():
                if int(path.name.removeprefix("step_")) > first:
                    aside = path.with_name(f"superseded_{path.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(path, aside)
                    self._logger.warning("%s lies beyond the start; kept as %s", path, aside)
        dist.barrier()

    def _choose(self, resume: str) -> dict:
        if resume == "never":
            return {"path": None}
        candidates = self._commits() if resume == "auto" else [Path(resume)]
        complaints = []
        for path in candidates:
            problems = verify_checkpoint(path)
            if not problems:
                for complaint in complaints:
                    self._logger.error("DAMAGED CHECKPOINT, using an older one: %s", complaint)
                return {"path": str(path), "state": json.loads((path / "state.json").read_bytes())}
            complaints.append(f"{path}: {'; '.join(problems)}")
        if complaints:
            return {
                "error": "no usable checkpoint:\n  "
                + "\n  ".join(complaints)
                + "\nname an intact one with --resume PATH, or start over with --resume never"
            }
        return {"path": None}

    def _commits(self) -> list[Path]:
        """Committed checkpoints, newest step first."""
        return sorted(self._directory.glob("step_*"), reverse=True)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the run by name, sharing memory with it."""
        ensure_moments(self._optimizer)
        tensors = {}
        for name, parameter in self._encoder.named_parameters():
            tensors[f"encoder.{name}"] = parameter.data
            tensors.update(self._moments(f"encoder.{name}", parameter))
        for head_name, head in self._heads.items():
            name = f"head.{head_name}.centers"
            tensors[name] = head.sharded(head.centers.data)
            for key, moment in self._moments(name, head.centers).items():
                tensors[key] = moment if moment.ndim == 0 else head.sharded(moment)
        return tensors

    def _moments(self, name: str, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state = self._optimizer.state.get(parameter, {})
        return {
            f"optimizer.{moment}.{name}": state[moment] for moment in MOMENTS if moment in state
        }


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint directory;
    an empty list means every byte is as it was saved.
    """
    manifest_path = path / "manifest.json"
    if not manifest_path.is_file():
        return ["no manifest.json: not a committed checkpoint"]
    try:
        files = json.loads(manifest_path.read_bytes())["files"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return ["manifest.json is unreadable"]
    problems = []
    for name, entry in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["size"]:
            problems.append(f"{name} is missing or has another size")
        elif file_sha256(file) != entry["sha256"]:
            problems.append(f"{name} changed since it was saved (sha256 differs)")
    return problems


def _write_manifest(directory: Path) -> None:
    files = {}
    for file in sorted(directory.iterdir()):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
        files[file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    write_atomically(directory / "manifest.json", json.dumps({"files": files}, indent=1).encode())


def _sync_folder(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
