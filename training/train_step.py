"""One optimizer step. Reading `TrainStep.run` is reading the training.

batches = loader                                  {head: PackedBatch}
pooled  = encoder(batch)                          ddp or fsdp; heads may share a forward
loss    = sum of weight * PartialFC(pooled)       centres sharded over the ranks
backward, one global gradient norm, stop unless finite, clip, AdamW

The batches of the next step are drawn before the optimizer works, so that ranks agree on them
meanwhile.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.loading.loader import MixtureLoader
from data_pipeline.loading.packing import PackedBatch, joined_inputs

from .config.schema import TrainConfig
from .data import DataCounts, TrainingData
from .distributed import Ranks
from .losses.partial_fc import PartialFC
from .lr_scheduler import lr_factor
from .optimizer import clip_gradients, global_grad_norm, set_learning_rate
from .parallel import ParallelEncoder, local
from .record.flops import encoder_flops, softmax_flops
from .record.ledger import Ledger
from .record.metrics import StepCounts
from .record.step_clock import StepClock


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is NaN or infinite; no weight was touched by it."""

    outcome = "non-finite"


@dataclass(frozen=True)
class StepResult:
    """Values to log by name, counts of all ranks, whether any rank wished to stop or save, and the
    batches of the last micro step."""

    values: dict[str, torch.Tensor | float]
    counts: StepCounts
    stop: bool
    save: bool
    batches: dict[str, PackedBatch]


class TrainStep:
    """What a step works on; `skipped` counts the steps left out for gradients that were not finite
    and is part of the run's state."""

    def __init__(
        self,
        config: TrainConfig,
        encoder: ParallelEncoder,
        heads: dict[str, PartialFC],
        optimizer: torch.optim.Optimizer,
        data: TrainingData,
        ranks: Ranks,
        clock: StepClock,
        logger: logging.Logger,
    ):
        self._config, self._encoder, self._heads = config, encoder, heads
        self._optimizer, self._data, self._ranks = optimizer, data, ranks
        self._clock, self._logger = clock, logger
        self.skipped = 0

    def run(
        self, step: int, total_steps: int, loader: MixtureLoader, ledger: Ledger, wishes: Callable
    ) -> StepResult:
        """The step after `step` steps, over `grad_accum_steps` micro steps. `wishes()` tells
        whether this rank wishes to stop and to save."""
        config, accumulate, clock = self._config, self._config.grad_accum_steps, self._clock
        factor = lr_factor(step, total_steps, config.schedule)
        set_learning_rate(self._optimizer, config.optimizer.lr, factor)
        reported = {head.name: torch.zeros((), device=self._ranks.device) for head in config.heads}
        counts, softmax = DataCounts(), 0
        for micro in range(accumulate):
            batches, new = self._data.next_batches(loader, clock, wishes)
            counts += new
            softmax += self._softmax_flops(batches)
            ledger.record(step + 1, batches)
            last = micro == accumulate - 1
            with self._encoder.accumulation(last):
                objective = self._objective(batches, reported, step * accumulate + micro)
                with clock.section("backward"):
                    (objective / accumulate).backward()
            if not last or step + 1 < total_steps:
                self._data.draw(loader, clock, wishes)

        with clock.section("optimizer"):
            norm = global_grad_norm(self._encoder.module, list(self._heads.values()))
            if self._is_usable(norm, step, reported, batches):
                parameters = [p for g in self._optimizer.param_groups for p in g["params"]]
                clip_gradients(parameters, norm, config.optimizer.clip_norm)
                self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        values = {f"loss/{name}": loss / accumulate for name, loss in reported.items()}
        values |= {"grad_norm": norm, "lr": config.optimizer.lr * factor}
        wished = (counts.stop > 0, counts.save > 0)
        return StepResult(values, self._step_counts(counts, softmax), *wished, batches)

    def _objective(
        self, batches: dict[str, PackedBatch], reported: dict, draw: int
    ) -> torch.Tensor:
        """Weighted sum of the heads' losses; adds what is reported to `reported`."""
        total = torch.zeros((), device=self._ranks.device)
        for group in self._groups(batches):
            moved = [batches[head.name].to(self._ranks.device) for head in group]
            with self._clock.section("forward"):
                pooled = self._encoder(**joined_inputs(moved))
            starts = np.cumsum([0] + [len(batch.cu_seqlens) - 1 for batch in moved]).tolist()
            for head, batch, start in zip(group, moved, starts, strict=False):
                with self._clock.section("loss"):
                    own = pooled[start : start + batch.num_samples]
                    loss = self._heads[head.name](own, batch.labels, batch.weights, draw)
                reported[head.name] += loss.reported
                total = total + head.loss_weight * loss.objective
        return total

    def _groups(self, batches: dict[str, PackedBatch]) -> list[list]:
        """Heads in order, together while their packs fit one forward pass."""
        groups, room = [], 0
        for head in self._config.heads:
            tokens = len(batches[head.name].pixels)
            if groups and tokens <= room:
                groups[-1].append(head)
            else:
                groups.append([head])
                room = self._config.parallel.forward_tokens
            room -= tokens
        return groups

    def _is_usable(self, norm: torch.Tensor, step: int, reported: dict, batches: dict) -> bool:
        """Whether the gradients are finite. The norm covers all ranks, so all of them decide alike;
        it is the one value read back per step.

        Raises NonFiniteLoss when no further step may be left out.
        """
        if np.isfinite(norm.item()):
            return True
        for head in self._heads.values():
            head.check_labels()
        losses = {name: round(value.item(), 4) for name, value in reported.items()}
        ids = {
            name: batch.sample_ids[: batch.num_samples].tolist() for name, batch in batches.items()
        }
        text = (
            f"step {step + 1}: gradient norm {norm.item()}, losses {losses}; not finite: "
            f"{', '.join(self._non_finite()) or 'nothing of this rank'}; samples of rank "
            f"{self._ranks.rank}: {ids}. No weight was changed"
        )
        if self.skipped >= self._config.max_skipped_steps:
            raise NonFiniteLoss(
                f"{text}: lower --lr (with --resume_allow optimizer.lr where there is a checkpoint)"
                ", or resume from an older checkpoint with --resume PATH, or let some steps pass "
                "with --max_skipped_steps N"
            )
        self.skipped += 1
        limit = self._config.max_skipped_steps
        self._logger.warning("%s: step skipped, %d of at most %d", text, self.skipped, limit)
        return False

    def _non_finite(self, most: int = 5) -> list[str]:
        """Names of some gradients that are not finite."""
        named = list(self._encoder.module.named_parameters())
        named += [(f"centers of {name}", head.centers) for name, head in self._heads.items()]
        found = []
        for name, parameter in named:
            if parameter.grad is not None:
                grad = local(parameter.grad)
                values = grad.coalesce().values() if grad.is_sparse else grad
                if not torch.isfinite(values).all():
                    found.append(name)
        return found[:most] + [f"and {len(found) - most} more"] * (len(found) > most)

    def _softmax_flops(self, batches: dict[str, PackedBatch]) -> int:
        width, flops = self._encoder.module.config.hidden_size, 0
        for name, batch in batches.items():
            head = self._heads[name]
            rows = len(batch.weights) * self._ranks.world_size
            flops += softmax_flops(rows, width, head.num_classes * head.config.sample_rate)
        return flops

    def _step_counts(self, counts: DataCounts, softmax: int) -> StepCounts:
        flops = encoder_flops(self._encoder.module.config, counts.tokens, counts.squares)
        return StepCounts(
            counts.samples,
            counts.tokens,
            counts.room,
            flops + softmax,
            counts.bad_samples,
            self.skipped,
        )
