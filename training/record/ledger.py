"""Which samples a run trained on: one append-only file per rank, the proof of exactly once.

    OUTPUT/consumed-00000.jsonl   {"step", "head", "epoch", "batch", "ids", "replaced"} per line

A resume cuts every record of the run back to its checkpoint (record_files.py), so each step is
there once.
"""

from pathlib import Path

from .files import RecordFile, consumed_name


class Ledger:
    """consumed-RANK.jsonl of this rank."""

    def __init__(self, output: Path, rank: int):
        self._file = RecordFile(output / consumed_name(rank))
        self.files = [self._file]

    def record(self, step: int, batches: dict) -> None:
        """Note the samples of one micro step; rows of weight 0 are the tail's
        padding and do not count. `replaced` are pairs of a bad sample and its stand-in in `ids`, or
        -1 where nobody stands in.
        """
        lines = []
        for head, batch in batches.items():
            ids = batch.sample_ids[: batch.num_samples][
                batch.weights[: batch.num_samples] > 0
            ].tolist()
            line = {
                "step": step,
                "head": head,
                "batch": batch.index,
                "epoch": batch.epoch,
                "ids": ids,
            }
            if batch.replaced:
                line["replaced"] = batch.replaced
            lines.append(line)
        self._file.write(lines)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
