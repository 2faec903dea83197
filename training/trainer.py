"""The trainer: builds a run, restores it if asked, trains it to its end, exports it.

    start    newest whole checkpoint, or fresh weights: one visible choice
    loop     TrainStep.run -> metrics -> checkpoint when due -> end when asked
    end      backbone.pt and hf/ of the last step

State is the step, the position of the data and the number of skipped steps; the learning rate and
every random draw follow from them.
"""

import dataclasses
import logging
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.datasets import Dataset, start_centers

from .arithmetic import arithmetic
from .checkpoint.checkpointer import Checkpointer
from .checkpoint.folder import Commit
from .checkpoint.resume import compare, find_commit, heads_on_record, with_stored_names
from .config.schema import HeadConfig, TrainConfig, fingerprint, fingerprint_difference
from .data import SYNTHETIC_CLASSES, TrainingData
from .distributed import Ranks
from .encoder import build_encoder, export_encoder
from .losses.partial_fc import PartialFC
from .optimizer import build_optimizer
from .parallel import ParallelEncoder
from .record.files import restore_records, seal_records
from .record.ledger import Ledger
from .record.metrics import MetricLogger
from .record.profiler import Profiler
from .record.step_clock import StepClock
from .run_folder import read_run_file
from .stop_signals import Preempted, StopSignals
from .train_step import TrainStep

CROWDED, DEAD = 0.2, 0.95  # shares of pairs of centres that the filter takes out


class Trainer:
    """One run. Every method is called by all ranks."""

    def __init__(
        self,
        config: TrainConfig,
        datasets: dict[str, Dataset | None],
        ranks: Ranks,
        signals: StopSignals,
        logger: logging.Logger,
    ):
        self.output = Path(config.output)
        commit = find_commit(self.output, config.resume, ranks, logger)
        if commit is not None:
            config, datasets = with_stored_names(config, datasets, commit.state, logger)
        self.config, self.ranks, self.logger = config, ranks, logger
        self.signals, self.datasets = signals, datasets
        self.step = 0

        encoder = build_encoder(config.model, config.seed)
        sizes = [data.manifest.settings["size"] for data in datasets.values() if data is not None]
        if sizes:
            encoder.config.image_size = max(sizes)  # what the exported processor resizes to
        self.encoder = ParallelEncoder(encoder, config.parallel, ranks)
        width = encoder.config.hidden_size
        self.heads = {head.name: self._build_head(head, width) for head in config.heads}
        self.optimizer = build_optimizer(
            encoder,
            {h.name: (self.heads[h.name], h.lr_scale) for h in config.heads},
            config.optimizer,
        )
        self.checkpointer = Checkpointer(
            self.output, ranks, encoder, self.heads, self.optimizer, config.checkpoint, logger
        )
        self.data = TrainingData(config, datasets, encoder.config.patch_size, ranks, logger)
        self.total_steps = config.schedule.total_steps(self.data.samples_per_step)
        self.clock = StepClock(ranks.device)
        self.train_step = TrainStep(
            config, self.encoder, self.heads, self.optimizer, self.data, ranks, self.clock, logger
        )
        self._may_differ = arithmetic(ranks) | dataclasses.asdict(config.parallel)
        self._restore(commit)

    def train(self, last_step: int | None = None) -> None:
        """Run to the last step, or to an earlier one without leaving anything behind; leaves
        checkpoints, logs and the exported encoder in the output folder.

        Raises Preempted, after saving, when any rank was asked to stop.
        """
        self._announce()
        ledger = Ledger(self.output, self.ranks.rank)
        metrics = MetricLogger(
            self.output,
            self.ranks,
            self.total_steps,
            self.config.log_every,
            self.step,
            self.clock,
            self.logger,
        )
        metrics.describe(self.config)
        try:
            self._loop(last_step or self.total_steps, ledger, metrics, trial=last_step is not None)
        finally:
            self.checkpointer.close()
            metrics.close()
            ledger.close()
        if last_step is None:
            self._export()

    def _loop(self, last_step: int, ledger: Ledger, metrics: MetricLogger, trial: bool) -> None:
        profiler = Profiler(self.output, self.config.profile_steps, self.ranks)
        self._saved_at, encoder, first = time.monotonic(), self.encoder.module.train(), True
        with self.signals.deferred(), self.data.loader() as loader, profiler:
            while self.step < last_step:
                result = self.train_step.run(
                    self.step, self.total_steps, loader, ledger, self._wishes
                )
                self.step += 1
                profiler.step()
                if first:
                    metrics.picture(self.step, result.batches, encoder.config.patch_size)
                    first = False
                self._end_step(result, last_step, ledger, metrics, trial)
                if result.stop:
                    saved = f"asked to stop: saved at step {self.step} of {last_step}"
                    raise Preempted(saved, saved=True)

    def _end_step(self, result, last_step, ledger, metrics, trial) -> None:
        metrics.record(self.step, result.values, result.counts)
        done = result.stop or self.step == last_step
        if not trial and (self._is_due(result.save) or done):
            metrics.flush()
            records = seal_records([*ledger.files, *metrics.files], self._other_records)
            state = {**self.state(), "records": records}
            self.checkpointer.save(self.step, state, wait=done)
            self._saved_at = time.monotonic()

    def _wishes(self) -> tuple[bool, bool]:
        """Whether this rank wishes to stop and to save; a wish to save is uttered once."""
        now, asked = time.monotonic(), self.signals.requested is not None
        due = self.ranks.is_main and now - self._saved_at > 60 * self.config.checkpoint.minutes
        if due:
            self._saved_at = now
        return asked, due

    def _is_due(self, wished: bool) -> bool:
        return wished or self.step % self.config.checkpoint.every == 0

    def _export(self) -> None:
        whole = self.encoder.whole()
        if self.ranks.is_main:
            export_encoder(whole, self.output, self._facts())
            self.logger.info("done: %s and %s", self.output / "hf", self.output / "backbone.pt")

    def state(self) -> dict:
        """What a checkpoint stores beside tensors: the data position, what must match on resume and
        what may differ, at the price of other last bits."""
        classes = {name: head.num_classes for name, head in self.heads.items()}
        return {
            "heads": heads_on_record(self.config, self.datasets, classes),
            "data": self.data.state_dict(),
            "skipped_steps": self.train_step.skipped,
            "image_size": self.encoder.module.config.image_size,
            "world_size": self.ranks.world_size,
            "fingerprint": fingerprint(self.config, self.ranks.world_size),
            "may_differ": self._may_differ,
        }

    def _restore(self, commit: Commit | None) -> None:
        """Go on from a commit, or start: one visible choice."""
        other_data: list[str] = []
        if commit is not None:
            other_data = self.data.difference(commit.state["data"])
            compare(self.config, commit.state, other_data, self.ranks, self.logger)
            self._name_other_arithmetic(commit.state.get("may_differ", {}))
            self.step = commit.state["step"]
            self.train_step.skipped = commit.state.get("skipped_steps", 0)
        self.checkpointer.start(commit)
        self._other_records = restore_records(self.output, commit, self.ranks, self.logger)
        if commit is not None and other_data:
            self.data.start_next_epoch(commit.state["data"])
        elif commit is not None:
            self.data.load_state_dict(commit.state["data"])
        dist.barrier()

    def _name_other_arithmetic(self, saved: dict) -> None:
        """One warning for everything that moves last bits and is not as it was at the save."""
        # of what the checkpoint has on record: one of an earlier version has less
        now = {name: self._may_differ.get(name) for name in saved}
        difference = fingerprint_difference(saved, now)
        if difference:
            self.logger.warning(
                "last bits may differ from those of an uninterrupted run from here on, since not "
                "everything that they depend on is as it was: %s",
                "; ".join(difference),
            )

    def _build_head(self, head: HeadConfig, width: int) -> PartialFC:
        dataset = self.datasets[head.name]
        num_classes = dataset.num_classes if dataset else SYNTHETIC_CLASSES
        if dataset is not None:
            place = [one.name for one in self.config.heads].index(head.name)
            _check_negatives(head, place, dataset.labels.shape[1], num_classes)
        facts = (num_classes, width, head.loss, self.ranks, self.config.seed, head.name)
        partial_fc = PartialFC(*facts)
        if head.init_from:
            partial_fc.load_centers(torch.from_numpy(start_centers(Path(head.init_from))))
            self._check_crowding(head, partial_fc.crowding())
        return partial_fc

    def _check_crowding(self, head: HeadConfig, share: float) -> None:
        if share > CROWDED:
            text = (
                f"head {head.name}: {share:.0%} of the pairs of starting centres are closer than "
                f"the inter-class filter of {head.loss.filter_threshold}, so they are not each "
                "other's negatives: raise --list_filters, or 0 to switch it off"
            )
            if share > DEAD:
                raise ValueError(text)
            self.logger.warning(text)

    def _facts(self) -> dict[str, object]:
        """What the model card says about the run."""
        config, record = self.config, self.output / "run.json"
        launched = read_run_file(record)
        return {
            "steps": self.step,
            "samples per step": round(self.data.samples_per_step),
            "datasets": ", ".join(f"{head.name}: {head.dataset}" for head in config.heads),
            "classes": ", ".join(f"{name}: {h.num_classes}" for name, h in self.heads.items()),
            "started from": config.model.init_from or "random weights",
            "seed": config.seed,
            "git revision": launched.get("git_revision") or "not known",
            "arguments": " ".join(launched.get("argv", [])) or "not known",
        }

    def _announce(self) -> None:
        encoder = sum(parameter.numel() for parameter in self.encoder.module.parameters())
        start = f"resuming after step {self.step}" if self.step else "starting"
        self.logger.info(
            "%s: %d steps of %d samples on %d x %s (%s); encoder %s, %.1fM parameters",
            start,
            self.total_steps,
            self.data.samples_per_step,
            self.ranks.world_size,
            self.ranks.device.type,
            self.config.parallel.strategy,
            self.config.model.name,
            encoder / 1e6,
        )
        for name, head in self.heads.items():
            self.logger.info("head %s: %d classes, %s", name, head.num_classes, head.config)


def _check_negatives(head: HeadConfig, place: int, num_labels: int, num_classes: int) -> None:
    """Without a class that is no label of a row there is nothing to learn."""
    used = min(head.stream.labels_per_step, num_labels)
    if head.loss.mask_co_positives and used >= num_classes:
        raise ValueError(
            f"head {head.name}: {used} labels of {num_classes} classes leave no negative class: "
            f"cluster into more, or use fewer labels (--set heads.{place}.stream."
            f"labels_per_step={num_classes - 1})"
        )
