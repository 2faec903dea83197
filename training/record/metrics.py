"""What a run says about itself: metrics.jsonl (the record, every step), one console line,
a TensorBoard copy.

Losses stay on the device until a line is due, so logging costs no synchronisation per step. On
resume everything after the checkpoint is cut off, so the record holds every step exactly once; what
depends on the machine (rates, times, memory) is in TensorBoard and in speed.jsonl instead.
"""

import hashlib
import logging
import math
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.folder import StorageError
from ..config.schema import TrainConfig
from ..distributed import Ranks
from .board import Board
from .files import METRICS_NAME, SPEED_NAME, RecordFile
from .flops import peak_flops
from .pack_picture import pack_picture
from .step_clock import StepClock
from .watch import SpikeWatch, compare_ranks


@dataclass(frozen=True)
class StepCounts:
    """Of one optimizer step, over all ranks: samples that count, their tokens, the token budgets,
    model FLOPs, bad samples of the running epochs, skipped steps of the run."""

    samples: int
    tokens: int
    room: int
    flops: int
    bad_samples: int
    skipped_steps: int


class MetricLogger:
    """Collects step values on the device and writes them every `log_every` steps; `flush` is a
    collective, the rest is silent on ranks other than 0.
    """

    def __init__(
        self,
        output: Path,
        ranks: Ranks,
        total_steps: int,
        log_every: int,
        step: int,
        clock: StepClock,
        logger: logging.Logger,
    ):
        self._ranks, self._total, self._every, self._logger = ranks, total_steps, log_every, logger
        self._clock, self._spikes = clock, SpikeWatch(logger)
        self._pending: list[dict] = []
        self._counts: list[StepCounts] = []
        self._record: RecordFile | None = None
        self._speed_file: RecordFile | None = None
        self._wandb = None
        self.board = Board(output / "tensorboard", step=step, logger=logger)
        if ranks.is_main:
            self._peak = peak_flops(ranks.device)
            self._record = RecordFile(output / METRICS_NAME)
            self._speed_file = RecordFile(output / SPEED_NAME)
            self.board.open()
        clock.take()

    @property
    def files(self) -> list[RecordFile]:
        """The records that a checkpoint binds."""
        return [] if self._record is None else [self._record]

    def describe(self, config: TrainConfig) -> None:
        """Put the configuration into TensorBoard, as text and as hyper-parameters."""
        if self._record is None:
            return
        flat = {key: value for key, value in config.flat().items() if value is not None}
        text = f"```\n{config.to_json()}\n```"
        steps = {"hparam/steps": self._total}
        self.board.show(lambda writer: writer.add_text("configuration", text))
        self.board.show(lambda writer: writer.add_hparams(flat, steps, run_name="."))
        if config.wandb_project is not None:
            self._wandb = _wandb_run(config.wandb_project, flat, Path(config.output))

    def picture(self, step: int, batches: dict, patch_size: int) -> None:
        """Show the first items of a step's packs as the encoder sees them."""
        if self._record is None:
            return
        pictures = {f"pack/{name}": pack_picture(b, patch_size) for name, b in batches.items()}

        def draw(writer) -> None:
            for name, picture in pictures.items():
                writer.add_image(name, picture, step, dataformats="HWC")

        self.board.show(draw)

    def record(self, step: int, values: dict, counts: StepCounts) -> None:
        """Note one optimizer step. values: name -> float or scalar tensor."""
        self._pending.append({"step": step, **values})
        self._counts.append(counts)
        if step % self._every == 0 or step == self._total:
            self.flush()

    def flush(self) -> None:
        """Write what is pending: every step to the record, the last one and the speed to console
        and TensorBoard. Called by all ranks at the same step."""
        if not self._pending:
            return
        taken, steps = self._clock.take(), len(self._pending)
        own = compare_ranks(taken, steps, self._logger)
        if self._record is not None:
            self._write(self._write_records(), self._speed(taken, steps, own))
        self._pending.clear()
        self._counts.clear()
        if self._ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def close(self) -> None:
        """Write the steps since the last line to the record and close: whatever ended the run, its
        last losses are there to be seen."""
        try:
            if self._record is not None and self._pending:
                self._write_records()
        except StorageError:
            pass  # a removed folder has ended the run, which says so itself
        except OSError as error:  # what ended the run is not to be hidden by it
            self._logger.warning("the last steps are not on record: %s", error)
        for file in (self._record, self._speed_file):
            if file is not None:
                file.close()
        self.board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write_records(self) -> list[dict]:
        records = [{k: _number(v) for k, v in record.items()} for record in self._pending]
        self._record.write(records)
        return records

    def _speed(self, taken: dict[str, float], steps: int, own: list[float]) -> dict:
        total = max(taken["total"], 1e-9)
        sums = {
            name: sum(getattr(counts, name) for counts in self._counts)
            for name in ("samples", "tokens", "room", "flops")
        }
        speed = {
            "samples_per_s": sums["samples"] / total,
            "tokens_per_s": sums["tokens"] / total,
            "model_flops_per_s": sums["flops"] / total,
            "mfu": self._mfu(sums["flops"] / total),
            "step_s": total / steps,
            "slowest_rank_own_s": max(own),
            "median_rank_own_s": sorted(own)[(len(own) - 1) // 2],
            "data_wait": taken.get("data", 0.0) / total,
            "fill": sums["tokens"] / max(sums["room"], 1),
            "memory_gb": _memory(self._ranks.device) / 1e9,
            "bad_samples": self._counts[-1].bad_samples,
            "skipped_steps": self._counts[-1].skipped_steps,
        }
        parts = {f"time/{name}_s": s / steps for name, s in taken.items() if name != "total"}
        return speed | parts

    def _mfu(self, rate: float) -> float | None:
        """Share of the peak of all ranks that the model FLOPs of a second are; None where no peak
        is known."""
        if self._peak is None:
            return None
        share = rate / (self._peak * self._ranks.world_size)
        if share > 1:
            self._logger.warning(
                "MFU is not known: %.3g model FLOP/s on %d ranks are more than the peak of %.3g "
                "that is assumed of each; correct PEAKS in training/record/flops.py",
                rate,
                self._ranks.world_size,
                self._peak,
            )
            self._peak = None
        return share if share <= 1 else None

    def _write(self, records: list[dict], speed: dict[str, float]) -> None:
        line = {"step": records[-1]["step"], "steps": len(records), **speed}
        self._note_speed(line)
        for line in records:
            for name, value in line.items():
                if name.startswith("loss/") and value is not None:
                    self._spikes.look(line["step"], name, value)
        last = records[-1]
        numbers = {name: value for name, value in {**last, **speed}.items() if value is not None}
        step = numbers.pop("step")

        def draw(writer) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        self.board.show(draw)
        if self._wandb is not None:
            self._wandb.log({**last, **speed}, step=last["step"])
        self._logger.info(self._line(last, speed))

    def _note_speed(self, line: dict) -> None:
        """Add to speed.jsonl; what the machine did is worth no end of a run."""
        try:
            if self._speed_file is not None:
                self._speed_file.write([line])
        except (OSError, StorageError) as error:
            self._speed_file = None
            self._logger.warning("rates are not on record any more: %s", error)

    def _line(self, last: dict, speed: dict) -> str:
        last = {name: math.nan if value is None else value for name, value in last.items()}
        losses = "  ".join(
            f"{name[5:]} {value:.4f}" for name, value in last.items() if name.startswith("loss/")
        )
        mfu = "not known" if speed["mfu"] is None else f"{speed['mfu']:.0%}"
        left = (self._total - last["step"]) * speed["step_s"]
        return (
            f"step {last['step']}/{self._total} | {losses} | {speed['samples_per_s']:.1f} "
            f"samples/s | {speed['tokens_per_s'] / 1000:.1f}k tokens/s | MFU {mfu} | "
            f"data wait {speed['data_wait']:.0%} | fill {speed['fill']:.0%} | "
            f"lr {last['lr']:.2e} | grad norm {last['grad_norm']:.2f} | "
            f"{speed['memory_gb']:.1f} GB | ETA {int(left // 60)}:{int(left % 60):02d}"
        )


def _wandb_run(project: str, config: dict, output: Path):
    """A W&B run that a resumed training goes on with; its own variables (WANDB_MODE and the like)
    decide where it goes."""
    import wandb

    name = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, id=name, config=config, dir=str(output), resume="allow")


def _memory(device: torch.device) -> int:
    """Most bytes that were in use: allocated on a GPU since the last log line, else resident on the
    host since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _number(value) -> float | int | None:
    """A number of the record; None, which JSON has, for what is not finite."""
    number = value.item() if isinstance(value, torch.Tensor) else value
    return number if math.isfinite(number) else None
