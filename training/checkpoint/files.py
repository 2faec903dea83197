"""Tensors of a checkpoint to and from safetensors files, by torch.distributed.checkpoint.

Sharded tensors are written as one over all ranks (DTensor), so any number of ranks reads them.
Nothing is unpickled: the files hold tensors and JSON. Written files are read back and compared with
what is in memory. Cost: one write, one read.
"""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.futures import Future

from ..errors import BadCheckpoint, StorageError
from ..parallel import local
from .folder import read_manifest

# Size of a file with several tensors. The library makes every file in memory first; the allocator
# gives memory of up to this size (malloc's largest mmap threshold is 32 MB) again without new
# pages, which cost six times the writing (measured).
FILE_BYTES = 24 << 20


def write_tensors(
    tensors: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup
) -> list[str]:
    """Write this rank's files and return their names. Called by all ranks of `group`; what fails
    on one fails on all. StorageError for what was not written as it is in memory, or is not finite.
    """
    writer = _Writer(folder, files=_files_of(tensors))
    dcp.save(tensors, storage_writer=writer, process_group=group)
    for file_name in writer.names:
        file = folder / file_name
        with safe_open(file, framework="pt") as written:
            for name in written.keys():
                own = written.get_tensor(name)
                # the manifest hashes files as they lie there, so it would seal a wrong write, too
                if not torch.equal(own, local(tensors[name]).cpu()):
                    raise StorageError(f"{name} in {file} is not what was written there")
                if not torch.isfinite(own).all():
                    raise StorageError(f"{name} is not finite, so this state is not kept")
    return writer.names


def read_tensors(tensors: dict[str, torch.Tensor], folder: Path, alone: bool = False) -> None:
    """Fill tensors in place. Called by all ranks of the process group; `alone`: by one process
    without a group.

    Raises BadCheckpoint when the folder has not all of them in their shapes.
    """
    try:
        with warnings.catch_warnings():  # `alone` is meant, so no warning is due
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(tensors, storage_reader=_Reader(folder), no_dist=alone)
    except (CheckpointException, OSError) as error:
        raise BadCheckpoint(
            f"{folder} has not the tensors of this run: {_first_cause(error)}; restore the "
            "configuration that it was saved under, or start over with --resume never"
        ) from error


def _first_cause(error: BaseException) -> str:
    """The error of the first rank that failed; the library's own text is a traceback per rank."""
    failures = getattr(error, "failures", None) or {0: (error, None)}
    cause, _ = next(iter(failures.values()))
    return f"{type(cause).__name__}: {cause}"


class _Writer(HuggingFaceStorageWriter):
    """The library's writer, which keeps the names of the files that it wrote."""

    names: list[str]

    def __init__(self, folder: Path, files: dict[str, int]):
        super().__init__(str(folder), files, save_distributed=True)
        self.fs = _WithoutMkdir()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        """Write this rank's files; what fails here fails the save on all ranks."""
        written = super().write_data(plan, planner)
        self.names = sorted({result.storage_data.relative_path for result in written.wait()})
        return written


class _WithoutMkdir(FileSystem):
    """A file system in which the folder of a save is there already. The library would make it, with
    its parents, and so a run's folder that was removed meanwhile."""

    def mkdir(self, path: str | os.PathLike) -> None:
        """Nothing: writing into a folder that is gone is the error that it should be."""


class _Reader(HuggingFaceStorageReader):
    """The library's reader, limited to the files of the manifest: by itself it reads every file in
    the folder."""

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self.fs = _Listed(read_manifest(folder))


class _Listed(FileSystem):
    """A file system that lists certain files alone."""

    def __init__(self, names: Iterable[str]):
        self._names = sorted(names)

    def ls(self, path: str | os.PathLike) -> list[str]:
        """Paths of these files in `path`."""
        return [os.path.join(path, name) for name in self._names]


def _files_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """{tensor: number of its file, from 1}; a tensor larger than FILE_BYTES has a file of its
    own."""
    numbers = {}
    number = 1
    room = FILE_BYTES
    for name, tensor in tensors.items():
        size = local(tensor).numel() * tensor.element_size()
        is_empty = room == FILE_BYTES
        if size > room and not is_empty:
            number += 1
            room = FILE_BYTES
        numbers[name] = number
        room -= size  # below 0 after a tensor larger than a file: the next one opens another
    return numbers
