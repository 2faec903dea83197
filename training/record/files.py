"""The records of a run, bound by its checkpoints: JSON lines that are only ever appended to.

    OUTPUT/metrics.jsonl         losses and the like of every step
    OUTPUT/consumed-RANK.jsonl   which samples a rank trained on, the proof of exactly once
    OUTPUT/speed.jsonl           what the machine did; bound by nothing
    OUTPUT/NAME.damaged          a file as it was found, where it was not as saved

Every commit's state has the length and sha256 of the first two. A resume compares these with the
file and cuts it to just that length: a changed, lost or added byte is found. No training follows
from these files, so damage is logged, the file as found is kept, its readable lines go on, and so
does the run.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from data_pipeline.loading.packing import PackedBatch
from model_factory.files import HASHED_AT_ONCE, DamagedFile, parse_json, sync, write_atomically

from ..checkpoint.folder import FOLDER_NAME, Commit
from ..distributed import Ranks, all_gather_json
from ..errors import StorageError

METRICS_NAME = "metrics.jsonl"
SPEED_NAME = "speed.jsonl"  # one line per log line
CONSUMED = "consumed-*.jsonl"


def consumed_name(rank: int) -> str:
    """Name of the record of samples that a rank was trained on."""
    return f"consumed-{rank:05d}.jsonl"


class RecordFile:
    """One record, open at its end. Each line reaches the system at once, so a kill loses none."""

    def __init__(self, path: Path):
        self.path = path
        # of all that was written so far, so that a save need not read the file again
        self._digest = hashlib.sha256()
        self._size = 0
        try:
            # read as well as written: the digest is of all bytes from the first on
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._descriptor = os.open(path, flags, 0o666)
            while piece := os.read(self._descriptor, HASHED_AT_ONCE):
                self._count(piece)
        except OSError as error:
            raise _with_path(error, path) from error

    def write(self, lines: Iterable[dict]) -> None:
        """Append lines.

        Raises OSError with the path where the disk takes no more, StorageError where the file was
        removed: what is written to it would be lost.
        """
        text = "".join(json.dumps(line) + "\n" for line in lines)
        data = text.encode()
        try:
            # a descriptor goes on taking bytes when its file has no name any more
            if os.fstat(self._descriptor).st_nlink == 0:
                raise StorageError(
                    f"{self.path} was removed while the run writes to it, so the run ends: start "
                    "it again with the same command, it goes on from the newest checkpoint that is "
                    "left"
                )
            while data:
                # a disk that fills up takes a part; the next call has the error
                written = os.write(self._descriptor, data)
                self._count(data[:written])
                data = data[written:]
        except OSError as error:
            raise _with_path(error, self.path) from error

    def seal(self) -> dict:
        """{"bytes", "sha256"} of the whole file, after it was flushed to disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _with_path(error, self.path) from error
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _count(self, data: bytes) -> None:
        self._digest.update(data)
        self._size += len(data)


def _with_path(error: OSError, path: Path) -> OSError:
    """The same error with its file: descriptors have no names."""
    return OSError(error.errno, error.strerror, str(path))


class Ledger:
    """consumed-RANK.jsonl of this rank: {"step", "head", "epoch", "batch", "ids", "replaced"}."""

    def __init__(self, output: Path, rank: int):
        self.file = RecordFile(output / consumed_name(rank))

    def record(self, step: int, batches: dict[str, PackedBatch]) -> None:
        """Write the samples of one micro step; rows of weight 0 are the padding of an epoch's end
        and do not count.

        `replaced` are pairs of a bad sample and its stand-in in `ids`, or -1 where there is none.
        """
        lines = []
        for head, batch in batches.items():
            counts = batch.weights[: batch.num_samples] > 0
            line = {
                "step": step,
                "head": head,
                "batch": batch.index,
                "epoch": batch.epoch,
                "ids": batch.sample_ids[: batch.num_samples][counts].tolist(),
            }
            if batch.replaced:
                line["replaced"] = batch.replaced
            lines.append(line)
        self.file.write(lines)


def seal_records(files: Iterable[RecordFile], others: dict[str, dict]) -> dict[str, dict]:
    """{name: {"bytes", "sha256"}} of the records of all ranks, and of `others`, which no rank
    writes to any more. Called by all ranks."""
    sealed = dict(others)
    for of_rank in all_gather_json({file.path.name: file.seal() for file in files}):
        sealed.update(of_rank)
    return sealed


def restore_records(
    output: Path, commit: Commit | None, ranks: Ranks, logger: logging.Logger
) -> dict[str, dict]:
    """Cut the records of a run back to the commit that it goes on from (None: to nothing).

    Called by all ranks; each restores its own file, rank 0 also those of ranks that only earlier
    starts had. Returns {name: {"bytes", "sha256"}} of these, on rank 0.
    """
    names = [consumed_name(ranks.rank)]
    others: list[str] = []
    bound = {} if commit is None else commit.state.get("records", {})
    if ranks.is_main:
        own = {consumed_name(rank) for rank in range(ranks.world_size)}
        on_disk = {path.name for path in output.glob(CONSUMED)}
        on_record = {name for name in bound if name != METRICS_NAME}
        others = sorted((on_disk | on_record) - own)
        names += [METRICS_NAME, SPEED_NAME, *others]
    for name in names:
        _restore(output / name, entry=bound.get(name), commit=commit, logger=logger)
    dist.barrier()
    entries = {}
    for name in others:
        if (output / name).is_file():
            file = RecordFile(output / name)
            entries[name] = file.seal()
            file.close()
    return entries


def _restore(path: Path, entry: dict | None, commit: Commit | None, logger: logging.Logger) -> None:
    """Cut one record back to a commit; `entry` is what the commit knows of it, if anything."""
    if commit is not None and entry is not None:
        difference = _difference(path, entry)
        if difference is None:
            # steps after the commit are run again, and would be on record twice
            if path.stat().st_size > entry["bytes"]:
                os.truncate(path, entry["bytes"])
                sync(path)
            return
        if commit.path.resolve().parent != (path.parent / FOLDER_NAME).resolve():
            # --resume PATH of another folder: the run's record so far lies beside its checkpoint,
            # and what lies here is of another run
            if os.path.lexists(path):
                text = "%s is of another run than %s; kept as %s"
                logger.warning(text, path, commit.path, _set_aside(path))
            return
    else:
        difference = None
    step = 0 if commit is None else commit.state["step"]
    readable, num_unreadable = _lines_up_to(path, step)
    if difference is None and num_unreadable:
        difference = f"{num_unreadable} lines are unreadable"
    if difference is None:
        if os.path.lexists(path):
            write_atomically(path, readable)
        return
    rest = "its lines up to there are lost"
    if os.path.lexists(path):
        count = readable.count(b"\n")
        rest = f"kept as {_set_aside(path)}, and its {count} readable lines up to there in place"
        write_atomically(path, readable)
    logger.error(
        "DAMAGED RECORD: %s is not as written up to step %d: %s; %s. The run goes on from its "
        "checkpoint, which needs no record",
        path,
        step,
        difference,
        rest,
    )


def _difference(path: Path, entry: dict) -> str | None:
    """How the beginning of a file differs from what a commit knows of it; None: not at all."""
    digest = hashlib.sha256()
    left = entry["bytes"]  # what follows them was written after the commit
    try:
        with open(path, "rb") as stream:
            while left and (piece := stream.read(min(left, HASHED_AT_ONCE))):
                digest.update(piece)
                left -= len(piece)
    except FileNotFoundError:
        return "it is gone"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if left:
        return f"{left} of its {entry['bytes']} bytes are missing at the end"
    if digest.hexdigest() != entry["sha256"]:
        return f"its first {entry['bytes']} bytes changed (sha256 differs)"
    return None


def _lines_up_to(path: Path, step: int) -> tuple[bytes, int]:
    """(readable lines of steps up to `step`, number of unreadable lines). A last line that a kill
    cut off is neither."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return b"", 0
    except OSError:
        return b"", 1
    readable = []
    num_unreadable = 0
    for line in lines:
        record = read_line(line)
        if record is None:
            num_unreadable += line.endswith(b"\n")
        elif record["step"] <= step:
            readable.append(line)
    return b"".join(readable), num_unreadable


def read_line(line: bytes) -> dict | None:
    """One line of a record; None where it is no whole object with the number of a step."""
    try:
        record = parse_json(line, "line")
    except DamagedFile:
        return None
    is_whole = line.endswith(b"\n")
    has_step = type(record.get("step")) is int  # the very type: True is an int for isinstance
    return record if is_whole and has_step else None


def _set_aside(path: Path) -> Path:
    """Rename a file to a name that is free; returns it."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    os.rename(path, aside)
    return aside
