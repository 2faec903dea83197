"""The trainer: owns the order of things and nothing else. Reading `train_step` is reading a step.

    batches = loader                                  {head: PackedBatch}
    pooled  = encoder(batch)                          replicated, gradients averaged over the ranks
    loss    = sum of weight * PartialFC(pooled)       centres sharded over the ranks
    backward, one global gradient norm, stop unless finite, clip, AdamW, log, checkpoint

State is the step and the position of the data; the learning rate and every random draw follow
from them.
"""

import contextlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.datasets import Dataset
from data_pipeline.loading.packing import PackedBatch

from .checkpointer import Checkpointer
from .config import HeadConfig, TrainConfig, fingerprint, fingerprint_difference
from .data import SYNTHETIC_CLASSES, DataCounts, TrainingData
from .distributed import Ranks, broadcast_object, wrap_encoder
from .encoder import build_encoder, export_encoder
from .losses.partial_fc import PartialFC
from .lr_scheduler import lr_factor
from .metrics import Ledger, MetricLogger, bad_samples_on_record, cut_back_records
from .optimizer import build_optimizer, clip_gradients, global_grad_norm, set_learning_rate

CROWDED, DEAD = 0.2, 0.95  # shares of pairs of centres that the filter takes out


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is NaN or infinite; no weight was touched by it."""


class ConfigMismatch(ValueError):
    """A checkpoint of another configuration or dataset."""


class Trainer:
    """Builds a run, restores it if asked, trains it to its end."""

    def __init__(
        self,
        config: TrainConfig,
        datasets: dict[str, Dataset | None],
        ranks: Ranks,
        logger: logging.Logger,
    ):
        self.config, self.ranks, self.logger = config, ranks, logger
        self.output = Path(config.output)
        self.step = 0
        self.datasets = datasets

        self.encoder = build_encoder(config.model, config.seed).to(ranks.device)
        sizes = [data.manifest.settings["size"] for data in datasets.values() if data is not None]
        if sizes:
            self.encoder.config.image_size = max(sizes)  # what the exported processor resizes to
        width = self.encoder.config.hidden_size
        self.heads = {head.name: self._build_head(head, width) for head in config.heads}
        self.optimizer = build_optimizer(
            self.encoder,
            {h.name: (self.heads[h.name], h.lr_scale) for h in config.heads},
            config.optimizer,
        )
        self.checkpointer = Checkpointer(
            self.output,
            ranks,
            self.encoder,
            self.heads,
            self.optimizer,
            config.checkpoints_kept,
            logger,
        )
        patch_size = self.encoder.config.patch_size
        self.data = TrainingData(config, datasets, patch_size, ranks, logger)
        self.total_steps = config.schedule.total_steps(self.data.samples_per_step)
        self._restore()
        self.forward = self.encoder if config.model.frozen else wrap_encoder(self.encoder, ranks)

    def train(self) -> None:
        """Run to the last step; leaves checkpoints,
        logs and the exported encoder in the output folder.
        """
        config = self.config
        self._announce()
        self.encoder.train()
        ledger = Ledger(self.output, self.ranks.rank)
        metrics = MetricLogger(
            self.output, self.ranks, self.total_steps, config.log_every, self.step, self.logger
        )
        try:
            with self.data.loader() as loader:
                while self.step < self.total_steps:
                    self.train_step(loader, ledger, metrics)
                    if self.step % config.checkpoint_every == 0 or self.step == self.total_steps:
                        metrics.flush()
                        self.checkpointer.save(self.step, self.state())
        finally:
            metrics.close()
            ledger.close()
        if self.ranks.is_main:
            export_encoder(self.encoder, self.output, self._facts())
            self.logger.info("done: %s and %s", self.output / "hf", self.output / "backbone.pt")

    def train_step(self, loader, ledger: Ledger, metrics: MetricLogger) -> None:
        """One optimizer step over `grad_accum_steps` micro steps."""
        config, accumulate = self.config, self.config.grad_accum_steps
        factor = lr_factor(self.step, self.total_steps, config.schedule)
        set_learning_rate(self.optimizer, config.optimizer.lr, factor)
        reported = {head.name: torch.zeros((), device=self.ranks.device) for head in config.heads}
        counts, waited = DataCounts(), loader.wait_s
        for micro in range(accumulate):
            batches, new = self.data.next_batches(loader)
            counts += new
            ledger.record(self.step + 1, batches)
            with self._gradient_sync(last=micro == accumulate - 1):
                objective = self._objective(batches, reported, self.step * accumulate + micro)
                (objective / accumulate).backward()

        norm = global_grad_norm(self.encoder, list(self.heads.values()))
        self._stop_unless_finite(norm, reported, batches)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        clip_gradients(parameters, norm, config.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        values = {f"loss/{name}": loss / accumulate for name, loss in reported.items()}
        values |= {"grad_norm": norm, "lr": config.optimizer.lr * factor}
        data = {"fill": counts.tokens / counts.room, "data_wait_s": loader.wait_s - waited}
        data["bad_samples"] = counts.bad_samples
        metrics.record(self.step, values, counts.samples, counts.tokens, data)

    def _objective(
        self, batches: dict[str, PackedBatch], reported: dict, draw: int
    ) -> torch.Tensor:
        """Weighted sum of the heads' losses; adds what is reported to `reported`."""
        total = torch.zeros((), device=self.ranks.device)
        for head in self.config.heads:
            batch = batches[head.name].to(self.ranks.device)
            with torch.autocast(
                self.ranks.device.type, torch.bfloat16, enabled=self.ranks.device.type == "cuda"
            ):
                pooled = self.forward(**batch.model_inputs()).pooler_output[: batch.num_samples]
            loss = self.heads[head.name](pooled.float(), batch.labels, batch.weights, draw)
            reported[head.name] += loss.reported
            total = total + head.loss_weight * loss.objective
        return total

    def _gradient_sync(self, last: bool):
        return (
            contextlib.nullcontext()
            if last or self.forward is self.encoder
            else self.forward.no_sync()
        )

    def _stop_unless_finite(
        self, norm: torch.Tensor, reported: dict, batches: dict[str, PackedBatch]
    ) -> None:
        """The norm covers all ranks, so all ranks stop together;
        the one value read back per step.
        """
        if np.isfinite(norm.item()):
            return
        for head in self.heads.values():
            head.check_labels()
        losses = {name: round(value.item(), 4) for name, value in reported.items()}
        ids = {
            name: batch.sample_ids[: batch.num_samples].tolist() for name, batch in batches.items()
        }
        raise NonFiniteLoss(
            f"step {self.step + 1}: gradient norm {norm.item()}, losses {losses}; samples of rank "
            f"{self.ranks.rank}: "
            f"{ids}. No weight was changed: lower --lr, or resume from an older checkpoint with "
            "--resume PATH"
        )

    def state(self) -> dict:
        """What a checkpoint stores beside tensors:
        the data position and what must match on resume.
        """
        return {
            "data": self.data.state_dict(),
            "world_size": self.ranks.world_size,
            "fingerprint": fingerprint(self.config, self.ranks.world_size),
            "torch": torch.__version__,
        }

    def _restore(self) -> None:
        """Decide between resuming and starting: one visible choice."""
        commit = self.checkpointer.find(self.config.resume)
        if commit is not None:
            difference = fingerprint_difference(
                commit.state["fingerprint"], fingerprint(self.config, self.ranks.world_size)
            )
            difference += self.data.difference(commit.state["data"])
            if difference:
                raise ConfigMismatch(
                    "the checkpoint belongs to another configuration:\n  "
                    + "\n  ".join(difference)
                    + "\nrestore these, or start over with --resume never or another --output"
                )
            self.step = commit.state["step"]
        self.checkpointer.start(commit)
        if self.ranks.is_main:
            cut_back_records(self.output, self.step)
        if commit is not None:
            bad = broadcast_object(
                bad_samples_on_record(self.output) if self.ranks.is_main else None
            )
            bad = {head: {int(e): ids for e, ids in epochs.items()} for head, epochs in bad.items()}
            self.data.load_state_dict(commit.state["data"], bad)
        dist.barrier()

    def _build_head(self, head: HeadConfig, width: int) -> PartialFC:
        dataset = self.datasets[head.name]
        num_classes = dataset.num_classes if dataset else SYNTHETIC_CLASSES
        if dataset is not None:
            _check_negatives(head, dataset.labels.shape[1], num_classes)
        facts = (num_classes, width, head.loss, self.ranks, self.config.seed, head.name)
        partial_fc = PartialFC(*facts)
        if head.init_from:
            partial_fc.load_centers(torch.from_numpy(np.load(head.init_from, allow_pickle=False)))
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
        launched = json.loads(record.read_bytes()) if record.is_file() else {}
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
        encoder = sum(parameter.numel() for parameter in self.encoder.parameters())
        start = f"resuming after step {self.step}" if self.step else "starting"
        self.logger.info(
            "%s: %d steps of %d samples on %d x %s; encoder %s, %.1fM parameters",
            start,
            self.total_steps,
            self.data.samples_per_step,
            self.ranks.world_size,
            self.ranks.device.type,
            self.config.model.name,
            encoder / 1e6,
        )
        for name, head in self.heads.items():
            self.logger.info("head %s: %d classes, %s", name, head.num_classes, head.config)


def _check_negatives(head: HeadConfig, num_labels: int, num_classes: int) -> None:
    """Without a class that is no label of a row there is nothing to learn."""
    used = min(head.stream.labels_per_step, num_labels)
    if head.loss.mask_co_positives and used >= num_classes:
        raise ValueError(
            f"head {head.name}: {used} labels of {num_classes} classes leave no negative class: "
            "cluster into more, or use fewer labels (--set heads.0.stream.labels_per_step=N)"
        )
