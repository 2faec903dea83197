"""What a run says about itself: metrics.jsonl (the record, every step), one console line,
a TensorBoard copy.

Losses stay on the device until a line is due, so logging costs no synchronisation per step. On
resume everything after the checkpoint is cut off, so the record holds every step exactly once.
"""

import json
import logging
import time
from pathlib import Path

import torch

from data_pipeline.shards.writer import write_atomically

from .distributed import Ranks

METRICS_NAME = "metrics.jsonl"


def cut_back_records(output: Path, step: int) -> None:
    """Keep the records of steps up to `step` in metrics.jsonl and in every rank's ledger;
    half-written last lines go too.
    """
    for path in [output / METRICS_NAME, *output.glob("consumed-*.jsonl")]:
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


class Ledger:
    """consumed-RANK.jsonl: which samples this rank trained on at which step;
    the proof of exactly once.
    """

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


class MetricLogger:
    """Collects step values on the device and writes them every `log_every` steps;
    silent on ranks other than 0.
    """

    def __init__(
        self,
        output: Path,
        ranks: Ranks,
        total_steps: int,
        log_every: int,
        step: int,
        logger: logging.Logger,
    ):
        self._ranks, self._total, self._every, self._logger = ranks, total_steps, log_every, logger
        self._pending: list[dict] = []
        self._start_interval()
        self._file = self._board = None
        if ranks.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self._file = open(output / METRICS_NAME, "a")
            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def _start_interval(self) -> None:
        self._since = time.monotonic()
        self._wait = self._fill = 0.0
        self._bad = 0
        self._samples = self._tokens = self._steps = 0

    def record(self, step: int, values: dict, samples: int, tokens: int, data: dict) -> None:
        """Note one optimizer step. values: name -> float or scalar tensor; samples and tokens of
        all ranks; data: `fill`, the share of the token budgets that samples take, `data_wait_s`,
        the seconds that this rank waited for them, and `bad_samples` of the running epochs.
        """
        self._pending.append({"step": step, **values})
        self._samples, self._tokens, self._steps = (
            self._samples + samples,
            self._tokens + tokens,
            self._steps + 1,
        )
        self._wait += data["data_wait_s"]
        self._fill += data["fill"]
        self._bad = data["bad_samples"]
        if step % self._every == 0 or step == self._total:
            self.flush()

    def flush(self) -> None:
        """Write what is pending: every step to the record,
        the last one to console and TensorBoard.
        """
        if self._file is None or not self._pending:
            self._pending.clear()
            return
        records = [{k: _number(v) for k, v in record.items()} for record in self._pending]
        self._pending.clear()
        self._file.writelines(json.dumps(record) + "\n" for record in records)
        self._file.flush()
        seconds = max(time.monotonic() - self._since, 1e-9)
        last = records[-1]
        speed = {
            "samples_per_s": self._samples / seconds,
            "tokens_per_s": self._tokens / seconds,
            "data_wait": self._wait / seconds,
            "data_wait_s": self._wait / max(self._steps, 1),
            "fill": self._fill / max(self._steps, 1),
            "bad_samples": self._bad,
        }
        for name, value in {**last, **speed}.items():
            if name != "step":
                self._board.add_scalar(name, value, last["step"])
        self._logger.info(self._line(last, speed, seconds))
        self._start_interval()

    def _line(self, last: dict, speed: dict, seconds: float) -> str:
        losses = "  ".join(
            f"{name[5:]} {value:.4f}" for name, value in last.items() if name.startswith("loss/")
        )
        left = (self._total - last["step"]) * seconds / max(self._steps, 1)
        return (
            f"step {last['step']}/{self._total} | {losses} | {speed['samples_per_s']:.1f} "
            "samples/s | "
            f"{speed['tokens_per_s'] / 1000:.1f}k tokens/s | data wait {speed['data_wait']:.0%} | "
            f"fill {speed['fill']:.0%} | "
            f"lr {last['lr']:.2e} | grad norm {last['grad_norm']:.2f} | ETA "
            f"{int(left // 60)}:{int(left % 60):02d}"
        )

    def close(self) -> None:
        """Write what is pending and close."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._board.close()


def _number(value) -> float | int:
    return value.item() if isinstance(value, torch.Tensor) else value
