"""Checkpoints that are whole or do not exist, are written beside the training, and load on any
number of ranks.

    save    copy tensors to host memory (the loop waits for this only)
            in a thread: space? -> write -> compare with the copy -> manifest -> rename -> prune
    start   a commit (resume.py says which) -> every tensor, resharded

Tensors go through torch.distributed.checkpoint into safetensors files: encoder, centres and AdamW
moments under their names, sharded ones as one tensor over all ranks (DTensor), so another number of
ranks, or another strategy of parallel.py, can read them. Nothing is ever unpickled from a file. A
save that fails is removed and counted; MAX_FAILURES in a row end the run. Folder layout: folder.py.
Cost: three times the parameters in bytes (weight and two moments, fp32) on disk and once more in
host memory.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from ..distributed import Ranks, all_gather_json
from ..errors import StorageError
from ..losses.partial_fc import PartialFC
from ..optimizer import RowAdamW, ensure_moments
from ..parallel import local
from .files import read_tensors, write_tensors
from .folder import (
    FOLDER_NAME,
    STATE_NAME,
    CheckpointFolder,
    Commit,
    write_manifest,
    write_state,
)

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # tensors of AdamW's state
MAX_FAILURES = 3  # saves in a row, after which a disk counts as one that stays full


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    A commit every `every` steps or `minutes`, whichever comes first; the newest `keep` and those
    of every `keep_every`-th step stay (0: no more than the newest). `background` False: the loop
    waits for the disk, and no second copy of the state is in memory.
    """

    every: int = 2000
    minutes: float = 30.0
    keep: int = 3
    keep_every: int = 10_000
    background: bool = True

    def __post_init__(self) -> None:
        counts_fit = self.every >= 1 and self.keep >= 1 and self.keep_every >= 0
        if not counts_fit or self.minutes <= 0:
            raise ValueError(
                f"checkpoint.every {self.every} and keep {self.keep} must be at least 1, "
                f"keep_every {self.keep_every} not negative, minutes {self.minutes} positive"
            )


@dataclass(frozen=True)
class Saved:
    """Outcome of one save, the same on every rank but for the times: seconds that the loop waited
    and that the writing took, bytes of all ranks, and why it failed (None: committed)."""

    step: int
    waited_s: float
    seconds: float
    num_bytes: int
    failure: str | None


class Checkpointer:
    """Saves and restores encoder, heads and optimizer of one run. Every method but `close` is
    called by all ranks."""

    def __init__(
        self,
        output: Path,
        ranks: Ranks,
        encoder: nn.Module,
        heads: dict[str, PartialFC],
        optimizer: RowAdamW,
        config: CheckpointConfig,
        logger: logging.Logger,
    ):
        self._folder = CheckpointFolder(output / FOLDER_NAME, config.keep, config.keep_every)
        self._ranks = ranks
        self._encoder = encoder
        self._heads = heads
        self._optimizer = optimizer
        self._config = config
        self._logger = logger
        # a group of its own: saves have collectives in a thread, beside those of the training
        self._group = dist.new_group(backend="gloo")
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[Saved] | None = None
        self._copies: dict[str, torch.Tensor] = {}
        self._failures = 0
        self.last: Saved | None = None
        if ranks.is_main:
            self._folder.prepare()
        dist.barrier()

    def save(self, step: int, state: dict, wait: bool = False) -> None:
        """Start saving the checkpoint of `step`, after the one before is done; `state` is
        JSON-like. With `wait`, return when it is committed; a failed save is tried once more,
        unless it is the MAX_FAILURES-th failure in a row.

        Raises StorageError on all ranks when MAX_FAILURES saves in a row failed, or with `wait`.
        """
        started = time.monotonic()
        self.wait()  # the thread reads the buffers that the next copy goes to
        tensors = self._stage(step)
        waited = time.monotonic() - started
        self._running = self._thread.submit(self._write, step, state, tensors, waited)
        if not wait and self._config.background:
            return
        failure = self.wait()
        if wait and failure is not None:  # no later save would try again
            self._logger.warning("trying once more to save step %d", step)
            self._running = self._thread.submit(self._write, step, state, tensors, waited)
            failure = self.wait()
            if failure is not None:
                raise StorageError(
                    f"step {step} could not be saved: {failure}; free space in "
                    f"{self._folder.path} and start again, the newest commit there is whole"
                )

    def wait(self) -> str | None:
        """Wait until the save under way, if any, is committed or has failed; returns its
        failure."""
        if self._running is None:
            return None
        self.last = self._running.result()
        self._running = None
        if self.last.failure is None:
            self._failures = 0
            return None
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise StorageError(
                f"{self._failures} checkpoints in a row could not be saved, the last at step "
                f"{self.last.step}: {self.last.failure}; free space in {self._folder.path} and "
                "start again, the newest commit there is whole"
            )
        return self.last.failure

    def close(self) -> None:
        """Let a save under way finish, committed or failed."""
        self._thread.shutdown(wait=True)

    def start(self, commit: Commit | None) -> None:
        """Load the tensors of a commit, and set aside the commits that lie beyond the start."""
        if commit is not None:
            read_tensors(self._tensors(), commit.path)
        dist.barrier()
        if self._ranks.is_main:
            first = 0 if commit is None else commit.state["step"]
            for aside in self._folder.set_aside_beyond(first):
                self._logger.warning("a commit lies beyond the start; kept as %s", aside)
            self._folder.note_start(first)
        dist.barrier()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the run by name, sharing memory with it."""
        # before the first step, and for heads whose classes were never sampled
        ensure_moments(self._optimizer)
        tensors = {}
        for name, parameter in self._encoder.named_parameters():
            tensors[f"encoder.{name}"] = parameter.data
            tensors.update(self._moments(f"encoder.{name}", parameter))
        for head_name, head in self._heads.items():
            name = f"head.{head_name}.centers"
            tensors[name] = head.sharded(head.centers.data)
            for key, moment in self._moments(name, head.centers).items():
                # the step count of dense gradients is one number for all classes
                tensors[key] = moment if moment.ndim == 0 else head.sharded(moment)
        return tensors

    def _moments(self, name: str, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """AdamW's state of a parameter by name; {} for one that is not trained."""
        state = self._optimizer.state.get(parameter, {})
        present = [key for key in MOMENTS if key in state]
        return {f"optimizer.{key}.{name}": state[key] for key in present}

    def _stage(self, step: int) -> dict[str, torch.Tensor]:
        """The tensors of `step`, as they stay while the training goes on: a copy in host memory, in
        the buffers of the save before. In the foreground nothing changes them, so no copy."""
        if not self._config.background:
            return self._tensors()
        staged = {}
        for name, tensor in self._tensors().items():
            own = local(tensor)
            if name not in self._copies:
                pinned = own.is_cuda  # pageable memory would make each copy wait for the device
                self._copies[name] = torch.empty(own.shape, dtype=own.dtype, pin_memory=pinned)
            # all copies are queued first; one wait after the loop covers them
            self._copies[name].copy_(own, non_blocking=True)
            staged[name] = self._like(tensor, self._copies[name])
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return staged

    def _like(self, tensor: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        """A host copy of this rank's part, as the same part of the whole tensor."""
        if not isinstance(tensor, DTensor):
            return copy
        return DTensor.from_local(
            copy,
            self._mesh,
            tensor.placements,
            shape=tensor.shape,
            stride=tensor.stride(),
            run_check=False,  # it would be a collective per tensor
        )

    def _write(
        self, step: int, state: dict, tensors: dict[str, torch.Tensor], waited: float
    ) -> Saved:
        """In the thread: one save, and its outcome, agreed on by all ranks."""
        started = time.monotonic()
        mine = sum(_own_bytes(tensor, self._ranks.is_main) for tensor in tensors.values())
        num_bytes = sum(all_gather_json(mine, self._group))
        names: list[str] = []

        def write() -> None:
            folder = self._folder.temporary(step)
            names.extend(write_tensors(tensors, folder=folder, group=self._group))

        # each part is agreed on by all ranks before the next, so that all take the same collectives
        failure = self._agreed(lambda: self._make_room(step, num_bytes))
        failure = failure or self._agreed(write)
        written = [name for of_rank in all_gather_json(names, self._group) for name in of_rank]
        failure = failure or self._agreed(lambda: self._commit(step, state=state, written=written))
        seconds = time.monotonic() - started
        saved = Saved(
            step=step, waited_s=waited, seconds=seconds, num_bytes=num_bytes, failure=failure
        )
        if self._ranks.is_main:
            self._log(saved)
        return saved

    def _agreed(self, work: Callable[[], None]) -> str | None:
        """Do a part of a save; the failure of the first rank that has one, on all ranks."""
        mine = None
        try:
            work()
        # a CheckpointException is a BaseException; whatever it is, the training goes on
        except BaseException as error:
            what = f"{type(error).__name__}: {error}"
            mine = f"rank {self._ranks.rank}: {what}"
        everywhere = all_gather_json(mine, self._group)
        return next((text for text in everywhere if text), None)

    def _make_room(self, step: int, num_bytes: int) -> None:
        if not self._ranks.is_main:
            return
        self._folder.discard(step)
        free = self._folder.free_bytes()
        if free < num_bytes:
            needed_gb = num_bytes / 1e9
            raise StorageError(f"{needed_gb:.2f} GB to write, {free / 1e9:.2f} GB free")
        self._folder.temporary(step).mkdir()

    def _commit(self, step: int, state: dict, written: list[str]) -> None:
        if not self._ranks.is_main:
            return
        folder = self._folder.temporary(step)
        write_state(folder, {"step": step, **state})
        # after the state: the manifest hashes all files, and its presence makes a checkpoint
        write_manifest(folder, [*written, STATE_NAME])
        self._folder.commit(step)
        try:
            self._folder.prune()
        except Exception as error:  # the commit stands; the next save tries again
            self._logger.warning("an old checkpoint could not be removed: %s", error)

    def _log(self, saved: Saved) -> None:
        """Log a save on rank 0; remove one that failed."""
        if saved.failure is None:
            self._logger.info(
                "checkpoint of step %d: %.1f MB saved and checked in %.1f s (%.0f MB/s)",
                saved.step,
                saved.num_bytes / 1e6,
                saved.seconds,
                saved.num_bytes / 1e6 / max(saved.seconds, 1e-9),
            )
            return
        self._folder.discard(saved.step)
        text = "CHECKPOINT OF STEP %d FAILED, the training goes on: %s"
        self._logger.error(text, saved.step, saved.failure)


def _own_bytes(tensor: torch.Tensor, is_main: bool) -> int:
    """Bytes of a tensor that this rank adds to the sum over ranks: its part of a sharded one, whole
    ones on rank 0."""
    counts = is_main or isinstance(tensor, DTensor)
    return local(tensor).numel() * tensor.element_size() if counts else 0
