"""Which samples a run trained on: one append-only file per rank, the proof of exactly once.

    OUTPUT/consumed-00000.jsonl   {"step", "head", "epoch", "batch", "ids", "replaced"} per line

A resume cuts every record of the run back to its checkpoint, so each step is there once.
"""

import json
from pathlib import Path

from model_factory.files import write_atomically

METRICS_NAME = "metrics.jsonl"
SPEED_NAME = "speed.jsonl"  # one line per log line


class Ledger:
    """consumed-RANK.jsonl of this rank."""

    def __init__(self, output: Path, rank: int):
        self._file = open(output / f"consumed-{rank:05d}.jsonl", "a", buffering=1)

    def record(self, step: int, batches: dict) -> None:
        """Note the samples of one micro step; rows of weight 0 are the tail's
        padding and do not count. `replaced` are pairs of a bad sample and its stand-in in `ids`, or
        -1 where nobody stands in.
        """
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
            self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_back_records(output: Path, step: int) -> None:
    """Keep the records of steps up to `step` in metrics.jsonl, speed.jsonl and every rank's ledger;
    half-written last lines go too.
    """
    for path in [output / METRICS_NAME, output / SPEED_NAME, *output.glob("consumed-*.jsonl")]:
        if not path.exists():
            continue
        kept = []
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if record["step"] <= step:
                kept.append(line + "\n")
        write_atomically(path, "".join(kept).encode())


def bad_samples_on_record(output: Path) -> dict[str, dict[int, list[int]]]:
    """{head: {epoch: bad samples}} of the ledgers of all ranks."""
    found: dict[str, dict[int, list[int]]] = {}
    for path in sorted(output.glob("consumed-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            epochs = found.setdefault(record["head"], {})
            bad = [bad for bad, _ in record.get("replaced", ())]
            epochs.setdefault(record["epoch"], []).extend(bad)
    return found
