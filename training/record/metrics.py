"""What a run reports of itself: metrics.jsonl (the record, every step), one console line, copies
for TensorBoard and Weights & Biases.

Losses stay on the device until a line is due, so logging costs no synchronisation per step. On
resume everything after the checkpoint is cut off, so the record holds every step exactly once; what
depends on the machine (rates, times, memory) is in TensorBoard and in speed.jsonl instead.
"""

import hashlib
import logging
import math
import resource
import statistics
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loading.packing import PackedBatch
from model_factory.files import DamagedFile, read_json, write_json

from ..config.schema import TrainConfig
from ..distributed import Ranks
from ..errors import StorageError
from .files import METRICS_NAME, SPEED_NAME, RecordFile
from .pack_picture import pack_picture
from .speed import SpikeWatch, StepClock, compare_ranks, peak_flops

WANDB_NAME = "wandb_run.json"
# of the thread in which TensorBoard writes its events
WRITING_MODULE = "tensorboard.summary.writer"


@dataclass(frozen=True)
class StepCounts:
    """Counts over all ranks when an optimizer step is done."""

    samples: int  # of the step, those that count
    tokens: int  # of these samples
    token_budget: int  # of the step's packs, filling included
    flops: int  # model FLOPs of the step
    bad_samples: int  # of the running epochs so far
    skipped_steps: int  # of the run so far


class MetricLogger:
    """Collects step values on the device; rank 0 writes them every `log_every` steps.

    `record` and `flush` are called by all ranks at the same steps: whenever lines are due, ranks
    exchange their times. The other methods write nothing on ranks other than 0.
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
        strategy: str = "ddp",
    ):
        self._ranks = ranks
        self._strategy = strategy
        self._step = step  # that this start goes on from
        self._total_steps = total_steps
        self._log_every = log_every
        self._logger = logger
        self._clock = clock
        self._spikes = SpikeWatch(logger)
        self._pending: list[dict] = []
        self._counts: list[StepCounts] = []
        self._record: RecordFile | None = None
        self._speed_file: RecordFile | None = None
        self._peak: float | None = None
        self._wandb: Any = None
        self.board = Board(output / "tensorboard", step=step, logger=logger)
        if ranks.is_main:
            self._peak = peak_flops(ranks.device)
            self._record = RecordFile(output / METRICS_NAME)
            self._speed_file = RecordFile(output / SPEED_NAME)
            self.board.open()
        clock.take()  # the time since the clock was made is no part of a step

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
        steps = {"hparam/steps": self._total_steps}
        self.board.show(lambda writer: writer.add_text("configuration", text))
        # "." is the run's own folder; by default each call makes a folder named by the clock
        self.board.show(lambda writer: writer.add_hparams(flat, steps, run_name="."))
        if config.wandb_project is not None:
            self._wandb = _wandb_run(
                config.wandb_project, config=flat, output=Path(config.output), step=self._step
            )

    def picture(self, step: int, batches: dict[str, PackedBatch], patch_size: int) -> None:
        """Show the first items of a step's packs as the encoder sees them."""
        if self._record is None:
            return
        images = {}
        for name, batch in batches.items():
            images[f"pack/{name}"] = pack_picture(batch, patch_size)

        def draw(writer: Any) -> None:
            for name, image in images.items():
                writer.add_image(name, image, step, dataformats="HWC")

        self.board.show(draw)

    def record(
        self, step: int, values: dict[str, torch.Tensor | float], counts: StepCounts
    ) -> None:
        """Collect one optimizer step. values: name -> float or scalar tensor."""
        self._pending.append({"step": step, **values})
        self._counts.append(counts)
        if step % self._log_every == 0 or step == self._total_steps:
            self.flush()

    def flush(self) -> None:
        """Write what is pending: every step to the record, the last one and the speed to console
        and TensorBoard. Called by all ranks at the same step."""
        if not self._pending:
            return
        taken = self._clock.take()
        own = compare_ranks(
            taken, steps=len(self._pending), logger=self._logger, strategy=self._strategy
        )
        if self._record is not None:
            self._write(self._record, self._speed(taken, own))
        self._pending.clear()
        self._counts.clear()
        if self._ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # so that a line has the peak of its own steps

    def close(self) -> None:
        """Write the steps since the last line to the record and close, so that the last losses
        before whatever ended the run are on record."""
        try:
            if self._record is not None and self._pending:
                self._record.write(self._numbers())
        except StorageError:
            pass  # a removed folder has ended the run, whose own error reports it
        # Must not hide the error that ended the run. RuntimeError: after a fault on a CUDA device
        # every later read of a tensor there fails.
        except (OSError, RuntimeError) as error:
            self._logger.warning("the last steps are not on record: %s", error)
        finally:
            self._close_files()

    def _close_files(self) -> None:
        for file in (self._record, self._speed_file):
            if file is not None:
                file.close()
        self.board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _numbers(self) -> list[dict]:
        """The pending steps, with numbers that JSON has: None for what is not finite."""
        return [
            {name: _number(value) for name, value in record.items()} for record in self._pending
        ]

    def _speed(self, taken: dict[str, float], own: list[float]) -> dict[str, Any]:
        """Rates, times, memory and counts of the pending steps.

        taken: seconds per section; own: seconds of a step of each rank without waiting.
        """
        total = max(taken["total"], 1e-9)  # a clock may stand still between two calls
        steps = len(self._pending)
        tokens = sum(counts.tokens for counts in self._counts)
        token_budget = sum(counts.token_budget for counts in self._counts)
        flops_rate = sum(counts.flops for counts in self._counts) / total
        speed = {
            "samples_per_s": sum(counts.samples for counts in self._counts) / total,
            "tokens_per_s": tokens / total,
            "model_flops_per_s": flops_rate,
            "mfu": self._mfu(flops_rate),
            "step_s": total / steps,
            "slowest_rank_own_s": max(own),
            "median_rank_own_s": statistics.median_low(own),
            "data_wait": taken.get("data", 0.0) / total,
            "fill": tokens / max(token_budget, 1),
            "memory_gb": _memory(self._ranks.device) / 1e9,
            "bad_samples": self._counts[-1].bad_samples,
            "skipped_steps": self._counts[-1].skipped_steps,
        }
        sections = {name: seconds for name, seconds in taken.items() if name != "total"}
        per_step = {f"time/{name}_s": seconds / steps for name, seconds in sections.items()}
        return speed | per_step

    def _mfu(self, rate: float) -> float | None:
        """Share of the peak of all ranks that `rate` model FLOP/s are; None where no peak is
        known."""
        if self._peak is None:
            return None
        share = rate / (self._peak * self._ranks.world_size)
        if share <= 1:
            return share
        self._logger.warning(
            "MFU is not known: %.3g model FLOP/s on %d ranks are more than the peak of %.3g "
            "that is assumed of each; correct PEAKS in training/record/speed.py",
            rate,
            self._ranks.world_size,
            self._peak,
        )
        self._peak = None
        return None

    def _write(self, record: RecordFile, speed: dict[str, Any]) -> None:
        lines = self._numbers()
        record.write(lines)
        last = lines[-1]
        position = {"step": last["step"], "steps": len(lines)}
        self._write_speed({**position, **speed})
        for line in lines:
            for name, value in line.items():
                if name.startswith("loss/") and value is not None:
                    self._spikes.look(step=line["step"], name=name, value=value)
        values = {**last, **speed}

        def draw(writer: Any) -> None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    writer.add_scalar(name, value, last["step"])

        self.board.show(draw)
        if self._wandb is not None:
            self._wandb.log(values, step=last["step"])
        self._logger.info(self._line(last, speed))

    def _write_speed(self, line: dict) -> None:
        """Add to speed.jsonl; a fault there does not end the run."""
        try:
            if self._speed_file is not None:
                self._speed_file.write([line])
        except (OSError, StorageError) as error:
            self._speed_file = None
            self._logger.warning("rates are not on record any more: %s", error)

    def _line(self, last: dict, speed: dict[str, Any]) -> str:
        """The console line of a step."""
        # the record has None for what is not finite, which no number format takes
        values = {name: math.nan if value is None else value for name, value in last.items()}
        losses = "  ".join(
            f"{name.removeprefix('loss/')} {value:.4f}"
            for name, value in values.items()
            if name.startswith("loss/")
        )
        mfu = "not known" if speed["mfu"] is None else f"{speed['mfu']:.0%}"
        left = int((self._total_steps - last["step"]) * speed["step_s"])  # seconds
        minutes, seconds = divmod(left, 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"step {last['step']}/{self._total_steps} | {losses} | {speed['samples_per_s']:.1f} "
            f"samples/s | {speed['tokens_per_s'] / 1000:.1f}k tokens/s | MFU {mfu} | "
            f"data wait {speed['data_wait']:.0%} | fill {speed['fill']:.0%} | "
            f"lr {values['lr']:.2e} | grad norm {values['grad_norm']:.2f} | "
            f"{speed['memory_gb']:.1f} GB | ETA {hours}:{minutes:02d}:{seconds:02d}"
        )


class Board:
    """TensorBoard's writer of one run; it does nothing until it is opened and after its first
    fault, which is logged once and does not end the run."""

    def __init__(self, folder: Path, step: int, logger: logging.Logger):
        self._folder = folder
        self._step = step
        self._logger = logger
        self._writer: Any = None
        self._hook: Callable | None = None

    def open(self) -> None:
        """Start writing; what an earlier start wrote beyond `step` is hidden."""
        # the library writes in a thread, and keeps an error for the next call; without this hook
        # the thread would print a traceback, too
        self._hook = threading.excepthook
        threading.excepthook = self._on_thread_error

        def start(_: Any) -> None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._step + 1)

        self._attempt(start)

    def show(self, draw: Callable[[Any], None]) -> None:
        """Call draw(writer), where there is one."""
        if self._writer is not None:
            self._attempt(draw)

    def close(self) -> None:
        """Write what is waiting and stop."""
        if self._writer is not None:
            self._attempt(lambda writer: writer.close())
        if self._hook is not None:
            threading.excepthook = self._hook

    def _attempt(self, work: Callable[[Any], None]) -> None:
        try:
            work(self._writer)
        except OSError as error:  # a full disk, a folder that was removed
            self._writer = None
            if not self._folder.parent.is_dir():
                return  # the whole output is gone, which ends the run with an error of its own
            self._logger.warning(
                "TensorBoard gets no more of this run: %s: %s; metrics.jsonl has every step",
                self._folder,
                error.strerror or error,
            )

    def _on_thread_error(self, arguments: threading.ExceptHookArgs) -> None:
        is_ours = type(arguments.thread).__module__.startswith(WRITING_MODULE)
        if self._hook is not None and not (is_ours and issubclass(arguments.exc_type, OSError)):
            self._hook(arguments)


def _wandb_run(project: str, config: dict, output: Path, step: int) -> Any:
    """A W&B run that a resumed training goes on with; its own variables (WANDB_MODE and the like)
    decide where it goes."""
    import wandb

    return wandb.init(
        project=project, id=_wandb_id(output, step), config=config, dir=str(output), resume="allow"
    )


def _wandb_id(output: Path, step: int) -> str:
    """Id of the W&B run: a new one for a start from step 0, since W&B ignores steps up to the last
    one of a run that it has; a resume goes on with that of its start."""
    path = output / WANDB_NAME
    if step == 0:
        write_json(path, {"id": uuid.uuid4().hex[:16]})
    try:
        return read_json(path, {"id": str})["id"]
    except (FileNotFoundError, DamagedFile):
        # runs of earlier versions have the id of their folder
        return hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]


def _memory(device: torch.device) -> int:
    """Most bytes that were in use: allocated on a GPU since the last log line, else resident on the
    host since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _number(value: torch.Tensor | float) -> float | int | None:
    number = value.item() if isinstance(value, torch.Tensor) else value
    return number if math.isfinite(number) else None
