"""The trainer: builds a run, restores it if asked, trains it to its end, exports it.

    start    newest whole checkpoint, or fresh weights: one visible choice
    loop     TrainStep.run -> metrics -> checkpoint when due -> end when asked
    end      backbone.pt and hf/ of the last step

State is the step, the position of the data and the number of skipped steps; the learning rate and
every random draw follow from them.
"""

import contextlib
import dataclasses
import logging
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.datasets import Dataset, start_centers
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

from .checkpoint.checkpointer import Checkpointer
from .checkpoint.folder import Commit
from .checkpoint.resume import check_fits, find_commit, heads_on_record, with_stored_names
from .config.schema import HeadConfig, TrainConfig, fingerprint, fingerprint_difference
from .data import SYNTHETIC_CLASSES, TrainingData
from .distributed import Ranks, all_gather_json
from .encoder import build_encoder, export_encoder
from .errors import Preempted
from .losses.partial_fc import PartialFC
from .optimizer import build_optimizer
from .parallel import ParallelEncoder
from .record.files import Ledger, restore_records, seal_records
from .record.metrics import MetricLogger
from .record.speed import StepClock, trace
from .run_folder import arithmetic, read_run_file
from .stop_signals import StopSignals
from .train_step import StepResult, TrainStep

# Shares of pairs of starting centres that the inter-class filter takes out of each other's
# negatives: from CROWDED on a warning, beyond DEAD hardly anything is left to learn from. Both are
# choices, not measured.
CROWDED = 0.2
DEAD = 0.95


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
        # first of all, since centres, streams and random draws go by the names of their heads
        commit = find_commit(self.output, resume=config.resume, ranks=ranks, logger=logger)
        if commit is not None:
            config, datasets = with_stored_names(
                config, datasets=datasets, state=commit.state, logger=logger
            )
        self.config = config
        self.datasets = datasets
        self.ranks = ranks
        self.signals = signals
        self.logger = logger
        self.step = 0

        encoder = self._build_encoder()
        self.encoder = ParallelEncoder(encoder, config.parallel, ranks)
        self.heads = {
            head.name: self._build_head(index, encoder.config.hidden_size)
            for index, head in enumerate(config.heads)
        }
        scaled = {head.name: (self.heads[head.name], head.lr_scale) for head in config.heads}
        self.optimizer = build_optimizer(encoder, heads=scaled, config=config.optimizer)
        self.checkpointer = Checkpointer(
            output=self.output,
            ranks=ranks,
            encoder=encoder,
            heads=self.heads,
            optimizer=self.optimizer,
            config=config.checkpoint,
            logger=logger,
        )
        self.data = TrainingData(
            config=config,
            datasets=datasets,
            patch_size=encoder.config.patch_size,
            ranks=ranks,
            logger=logger,
        )
        self.total_steps = config.schedule.total_steps(self.data.samples_per_step)
        self.clock = StepClock(ranks.device)
        # recorded in checkpoints; a difference moves last bits and is a warning, no error
        self._numerics = arithmetic(ranks) | dataclasses.asdict(config.parallel)
        self.train_step = self._build_step()
        self._restore(commit)

    def _build_step(self) -> TrainStep:
        return TrainStep(
            config=self.config,
            encoder=self.encoder,
            heads=self.heads,
            optimizer=self.optimizer,
            data=self.data,
            ranks=self.ranks,
            clock=self.clock,
            logger=self.logger,
        )

    def train(self, last_step: int | None = None) -> None:
        """Run to the last step; leaves checkpoints, logs and the exported encoder in the output
        folder.

        With `last_step`, a trial: run to that step without saving or exporting anything. Raises
        Preempted when any rank was asked to stop, after saving unless this is a trial.
        """
        self._log_start()
        ledger = Ledger(self.output, self.ranks.rank)
        metrics = MetricLogger(
            output=self.output,
            ranks=self.ranks,
            total_steps=self.total_steps,
            log_every=self.config.log_every,
            step=self.step,
            clock=self.clock,
            logger=self.logger,
            strategy=self.config.parallel.strategy,
        )
        metrics.describe(self.config)
        try:
            self._loop(ledger, metrics, trial_step=last_step)
        finally:
            self.checkpointer.close()
            metrics.close()
            ledger.file.close()
        if last_step is None:
            self._export()

    def _loop(self, ledger: Ledger, metrics: MetricLogger, trial_step: int | None) -> None:
        last_step = trial_step or self.total_steps
        self._saved_at = time.monotonic()
        tracing = trace(self.output, steps=self.config.profile_steps, ranks=self.ranks)
        self.encoder.module.train()
        patch_size = self.encoder.module.config.patch_size
        pictured = False
        with (
            self.signals.deferred(),  # signals wait for the end of the step
            self.data.loader() as loader,
            tracing or contextlib.nullcontext(),
        ):
            while self.step < last_step:
                result = self.train_step.run(
                    step=self.step,
                    total_steps=self.total_steps,
                    loader=loader,
                    ledger=ledger,
                    wishes=self._wishes,
                )
                self.step += 1
                if tracing is not None:
                    tracing.step()
                if not pictured:
                    metrics.picture(self.step, batches=result.batches, patch_size=patch_size)
                    pictured = True
                metrics.record(self.step, values=result.values, counts=result.counts)
                self._end_step(
                    result, ledger=ledger, metrics=metrics, is_trial=trial_step is not None
                )
                if result.stop and trial_step is not None:
                    raise Preempted(f"asked to stop at step {self.step} of a trial: nothing saved")
                if result.stop:
                    saved = f"asked to stop: saved at step {self.step} of {last_step}"
                    raise Preempted(saved, saved=True)

    def _end_step(
        self, result: StepResult, ledger: Ledger, metrics: MetricLogger, is_trial: bool
    ) -> None:
        """Save a checkpoint where one is due: at the end, when asked, and every so often."""
        is_last = result.stop or self.step == self.total_steps
        is_due = result.save or self.step % self.config.checkpoint.every == 0
        if is_trial or not (is_due or is_last):
            return
        metrics.flush()  # the record must hold the steps that the commit binds it at
        records = seal_records([ledger.file, *metrics.files], self._other_records)
        state = {**self.state(), "records": records}
        self.checkpointer.save(self.step, state, wait=is_last)
        self._saved_at = time.monotonic()

    def _wishes(self) -> tuple[bool, bool]:
        """Whether this rank wishes to stop and to save; each wish to save is passed on once."""
        now = time.monotonic()
        # rank 0's clock decides for all: with clocks of their own, ranks would ask at other steps
        interval_s = 60 * self.config.checkpoint.minutes
        due = self.ranks.is_main and now - self._saved_at > interval_s
        if due:
            # the wish is passed on once; the save, a step later, sets this again
            self._saved_at = now
        return self.signals.requested is not None, due

    def _export(self) -> None:
        whole = self.encoder.whole()
        if whole is not None:
            export_encoder(whole, output=self.output, run=self._facts())
            self.logger.info("done: %s and %s", self.output / "hf", self.output / "backbone.pt")

    def state(self) -> dict:
        """JSON-like state of a checkpoint beside its tensors: the data position, what must match on
        resume, and what may differ, at the price of other last bits."""
        classes = {name: head.num_classes for name, head in self.heads.items()}
        return {
            "heads": heads_on_record(self.config, self.datasets, num_classes=classes),
            "data": self.data.state_dict(),
            "skipped_steps": self.train_step.skipped,
            "image_size": self.encoder.module.config.image_size,
            "world_size": self.ranks.world_size,
            "fingerprint": fingerprint(self.config, self.ranks.world_size),
            "may_differ": self._numerics,
        }

    def _restore(self, commit: Commit | None) -> None:
        """Go on from a commit, or start: one visible choice."""
        data_difference: list[str] = []
        if commit is not None:
            data_difference = self.data.difference(commit.state["data"])
            check_fits(
                config=self.config,
                state=commit.state,
                data_difference=data_difference,
                ranks=self.ranks,
                logger=self.logger,
            )
            self._warn_of_other_arithmetic(commit.state.get("may_differ", {}))
            self.step = commit.state["step"]
            self.train_step.skipped = commit.state.get("skipped_steps", 0)
        self.checkpointer.start(commit)
        self._other_records = restore_records(
            self.output, commit=commit, ranks=self.ranks, logger=self.logger
        )
        if commit is not None and data_difference:
            self.data.start_next_epoch(commit.state["data"])
        elif commit is not None:
            self.data.load_state_dict(commit.state["data"])
        dist.barrier()

    def _warn_of_other_arithmetic(self, saved: dict) -> None:
        """One warning for everything that moves last bits and is not as it was at the save."""
        # only what the checkpoint has on record: one of an earlier version has less
        now = {name: self._numerics.get(name) for name in saved}
        difference = fingerprint_difference(saved, now)
        if difference:
            self.logger.warning(
                "last bits may differ from those of an uninterrupted run from here on, since not "
                "everything that they depend on is as it was: %s",
                "; ".join(difference),
            )

    def _build_encoder(self) -> LlavaViTPackingModel:
        encoder = build_encoder(
            self.config.model,
            seed=self.config.seed,
            frames_per_token=self.config.frames_per_token,
        )
        real = [dataset for dataset in self.datasets.values() if dataset is not None]
        if real:
            # what the exported processor resizes to
            encoder.config.image_size = max(data.manifest.settings["size"] for data in real)
        return encoder

    def _build_head(self, index: int, width: int) -> PartialFC:
        head = self.config.heads[index]
        dataset = self.datasets[head.name]
        num_classes = SYNTHETIC_CLASSES
        if dataset is not None:
            num_classes = dataset.num_classes
            _check_negatives(head, index=index, dataset=dataset)
        partial_fc = PartialFC(
            num_classes=num_classes,
            width=width,
            config=head.loss,
            ranks=self.ranks,
            seed=self.config.seed,
            name=head.name,
        )
        if head.init_from:
            partial_fc.load_centers(torch.from_numpy(start_centers(Path(head.init_from))))
            # of all ranks, so that all of them raise or none does
            share = max(all_gather_json(partial_fc.crowding()))
            self._check_crowding(head, share)
        return partial_fc

    def _check_crowding(self, head: HeadConfig, share: float) -> None:
        """Warn of starting centres so close together that the filter hides them from each other;
        ValueError where nearly all are."""
        if share <= CROWDED:
            return
        text = (
            f"head {head.name}: {share:.0%} of the pairs of starting centres are closer than "
            f"the inter-class filter of {head.loss.filter_threshold}, so they are not each "
            "other's negatives: raise --list_filters, or 0 to switch it off"
        )
        if share > DEAD:
            raise ValueError(text)
        self.logger.warning(text)

    def _facts(self) -> dict[str, object]:
        """Facts of the run for the model card."""
        config = self.config
        started = read_run_file(self.output / "run.json")
        classes = {name: head.num_classes for name, head in self.heads.items()}
        return {
            "steps": self.step,
            "samples per step": round(self.data.samples_per_step),
            "datasets": ", ".join(f"{head.name}: {head.dataset}" for head in config.heads),
            "classes": ", ".join(f"{name}: {count}" for name, count in classes.items()),
            "started from": config.model.init_from or "random weights",
            "seed": config.seed,
            "git revision": started.get("git_revision") or "not known",
            "arguments": " ".join(started.get("argv", [])) or "not known",
        }

    def _log_start(self) -> None:
        parameters = self.encoder.module.parameters()
        num_parameters = sum(parameter.numel() for parameter in parameters)
        self.logger.info(
            "%s: %d steps of %d samples on %d x %s (%s); encoder %s, %.1fM parameters",
            f"resuming after step {self.step}" if self.step else "starting",
            self.total_steps,
            self.data.samples_per_step,
            self.ranks.world_size,
            self.ranks.device.type,
            self.config.parallel.strategy,
            self.config.model.name,
            num_parameters / 1e6,
        )
        for name, head in self.heads.items():
            self.logger.info("head %s: %d classes, %s", name, head.num_classes, head.config)


def _check_negatives(head: HeadConfig, index: int, dataset: Dataset) -> None:
    """A loss needs a class that is no label of a row; ValueError where there may be none."""
    used = min(head.stream.labels_per_step, dataset.labels.shape[1])
    if head.loss.mask_co_positives and used >= dataset.num_classes:
        raise ValueError(
            f"head {head.name}: {used} labels of {dataset.num_classes} classes leave no negative "
            f"class: cluster into more, or use fewer labels (--set heads.{index}.stream."
            f"labels_per_step={dataset.num_classes - 1})"
        )
