"""Tensors of a checkpoint to and from safetensors files, by torch.distributed.checkpoint.

Sharded tensors are written as one over all ranks (DTensor), so any number of ranks reads them.
Nothing is unpickled: the files hold tensors and JSON. Written files are read back and compared with
what is in memory. Cost: one write, one read.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from .checkpoint_folder import StorageError
from .fault_points import reach
from .parallel import local

# of a file with several tensors: memory of this size is reused by the allocator
FILE_BYTES = 24 << 20


class BadCheckpoint(ValueError):
    """A checkpoint that is damaged, missing or not of this run;
    the message says which and what to do.
    """

    outcome = "bad checkpoint"


def write_tensors(
    tensors: dict[str, torch.Tensor], folder: Path, step: int, rank: int, group: dist.ProcessGroup
) -> None:
    """Write this rank's files. Called by all ranks of `group`; what fails on one fails on all.
    StorageError for what was not written as it is in memory, or is not finite.
    """
    writer = _Writer(str(folder), _files_of(tensors), save_distributed=True)
    writer.training_step = step
    dcp.save(tensors, storage_writer=writer, process_group=group)
    for file in folder.glob(f"shard-{rank + 1:05d}-*.safetensors"):
        with safe_open(file, framework="pt") as written:
            for name in written.keys():
                own = written.get_tensor(name)
                if not torch.equal(own, local(tensors[name]).cpu()):
                    raise StorageError(f"{name} in {file} is not what was written there")
                if not torch.isfinite(own).all():
                    raise StorageError(f"{name} is not finite, so this state is not kept")


def read_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Fill tensors in place; BadCheckpoint when the folder has not all of them in their shapes."""
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        raise BadCheckpoint(f"{folder} has not the tensors of this run: {error}") from error


class _Writer(HuggingFaceStorageWriter):
    """The library's writer, with a place for faults inside of its own collective."""

    training_step = 0

    def write_data(self, plan, planner):
        """Write this rank's files; what fails here fails the save on all ranks."""
        reach("checkpoint.write", self.training_step)
        return super().write_data(plan, planner)


def _files_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Number of the file, from 1, that each tensor goes to; a large one has its own. The library
    makes every file in memory first, and fresh memory costs six times the writing (measured)."""
    numbers, number, room = {}, 1, FILE_BYTES
    for name, tensor in tensors.items():
        size = local(tensor).numel() * tensor.element_size()
        if size > room and room < FILE_BYTES:
            number, room = number + 1, FILE_BYTES
        numbers[name] = number
        room -= size
    return numbers
