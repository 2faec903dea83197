"""One optimizer step. Reading `TrainStep.run` is reading the training.

batches = loader                                  {head: PackedBatch}
pooled  = encoder(batch)                          ddp or fsdp; heads may share a forward
loss    = sum of weight * PartialFC(pooled)       centres sharded over the ranks
backward, one global gradient norm, clip, AdamW; a step whose norm is not finite is left out, or
ends the run

The batches of the next step are prefetched before the optimizer works, so that ranks agree on them
meanwhile.
"""

import logging
import math
from dataclasses import dataclass

import torch

from data_pipeline.loading.loader import MixtureLoader
from data_pipeline.loading.packing import PackedBatch, joined_inputs

from .config.schema import HeadConfig, TrainConfig
from .data import DataCounts, TrainingData, Wishes
from .distributed import Ranks
from .errors import NonFiniteLoss
from .losses.partial_fc import PartialFC
from .optimizer import clip_gradients, global_grad_norm, lr_factor, set_learning_rate
from .parallel import ParallelEncoder, local
from .record.files import Ledger
from .record.metrics import StepCounts
from .record.speed import StepClock, encoder_flops, softmax_flops

MOST_NAMED = 5  # gradients that an error message names


@dataclass(frozen=True)
class StepResult:
    """Values to log by name, counts of all ranks, whether any rank asked to stop or to save, and
    the batches of the last micro step."""

    values: dict[str, torch.Tensor | float]
    counts: StepCounts
    stop: bool
    save: bool
    batches: dict[str, PackedBatch]


@dataclass
class TrainStep:
    """The parts of a run that a step works on; `skipped` counts the steps left out for gradients
    that were not finite and is part of the run's state."""

    config: TrainConfig
    encoder: ParallelEncoder
    heads: dict[str, PartialFC]
    optimizer: torch.optim.Optimizer
    data: TrainingData
    ranks: Ranks
    clock: StepClock
    logger: logging.Logger
    skipped: int = 0

    def run(
        self, step: int, total_steps: int, loader: MixtureLoader, ledger: Ledger, wishes: Wishes
    ) -> StepResult:
        """The step after `step` steps, over `grad_accum_steps` micro steps.

        wishes() returns whether this rank wishes to stop and to save, of which all ranks learn with
        the batches.
        """
        config = self.config
        accumulate = config.grad_accum_steps
        factor = lr_factor(step, total_steps=total_steps, config=config.schedule)
        set_learning_rate(self.optimizer, base_lr=config.optimizer.lr, factor=factor)
        reported = {head.name: torch.zeros((), device=self.ranks.device) for head in config.heads}
        counts = DataCounts()
        flops = 0
        for micro in range(accumulate):
            batches, new_counts = self.data.next_batches(loader, clock=self.clock, wishes=wishes)
            counts += new_counts
            flops += self._softmax_flops(batches)
            ledger.record(step + 1, batches)
            last = micro == accumulate - 1
            with self.encoder.accumulation(last):
                # each micro step samples negatives of its own
                objective = self._objective(batches, reported, draw=step * accumulate + micro)
                with self.clock.section("backward"):
                    (objective / accumulate).backward()
            # after the run's last micro step nobody would take them
            if not last or step + 1 < total_steps:
                self.data.prefetch(loader, clock=self.clock, wishes=wishes)

        with self.clock.section("optimizer"):
            # one norm over encoder and all heads: a head's outlier shortens the whole step
            norm = global_grad_norm(self.encoder.module, list(self.heads.values()))
            if self._is_usable(norm, step=step, reported=reported, batches=batches):
                groups = self.optimizer.param_groups
                parameters = [parameter for group in groups for parameter in group["params"]]
                clip_gradients(parameters, norm=norm, clip_norm=config.optimizer.clip_norm)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        values = {f"loss/{name}": loss / accumulate for name, loss in reported.items()}
        model = self.encoder.module.config
        flops += encoder_flops(model, tokens=counts.tokens, squares=counts.squares)
        return StepResult(
            values={**values, "grad_norm": norm, "lr": config.optimizer.lr * factor},
            counts=StepCounts(
                samples=counts.samples,
                tokens=counts.tokens,
                token_budget=counts.room,
                flops=flops,
                bad_samples=counts.bad_samples,
                skipped_steps=self.skipped,
            ),
            stop=counts.stop > 0,
            save=counts.save > 0,
            batches=batches,
        )

    def _objective(
        self, batches: dict[str, PackedBatch], reported: dict[str, torch.Tensor], draw: int
    ) -> torch.Tensor:
        """Weighted sum of the heads' losses; adds the losses to log to `reported`."""
        total = torch.zeros((), device=self.ranks.device)
        for group in self._groups(batches):
            moved = [batches[head.name].to(self.ranks.device) for head in group]
            with self.clock.section("forward"):
                pooled = self.encoder(**joined_inputs(moved))
            start = 0  # of a head's items among those of the joined pack
            for head, batch in zip(group, moved, strict=True):
                own = pooled[start : start + batch.num_samples]
                with self.clock.section("loss"):
                    loss = self.heads[head.name](
                        embeddings=own, labels=batch.labels, weights=batch.weights, draw=draw
                    )
                reported[head.name] += loss.reported
                total = total + head.loss_weight * loss.objective
                # filling is an item of its own in cu_seqlens, but no sample
                start += len(batch.cu_seqlens) - 1
        return total

    def _groups(self, batches: dict[str, PackedBatch]) -> list[list[HeadConfig]]:
        """Heads in order, together while their packs fit one forward pass."""
        groups: list[list[HeadConfig]] = []
        room = 0  # tokens that the last group has left
        for head in self.config.heads:
            tokens = len(batches[head.name].pixels)
            if groups and tokens <= room:
                groups[-1].append(head)
            else:
                # forward_tokens 0 leaves no room for a second head
                groups.append([head])
                room = self.config.parallel.forward_tokens
            room -= tokens
        return groups

    def _is_usable(
        self,
        norm: torch.Tensor,
        step: int,
        reported: dict[str, torch.Tensor],
        batches: dict[str, PackedBatch],
    ) -> bool:
        """Whether the gradients are finite. The norm covers all ranks, so all of them decide alike.
        Reading it back waits for the whole backward pass.

        Raises NonFiniteLoss when no further step may be left out.
        """
        if math.isfinite(norm.item()):
            return True
        for head in self.heads.values():
            head.check_labels()  # on a GPU, a label out of range shows as NaN first
        losses = {name: round(value.item(), 4) for name, value in reported.items()}
        ids = {
            name: batch.sample_ids[: batch.num_samples].tolist() for name, batch in batches.items()
        }
        text = (
            f"step {step + 1}: gradient norm {norm.item()}, losses {losses}; not finite: "
            f"{', '.join(self._non_finite()) or 'nothing of this rank'}; samples of rank "
            f"{self.ranks.rank}: {ids}. No weight was changed"
        )
        limit = self.config.max_skipped_steps
        if self.skipped >= limit:
            raise NonFiniteLoss(
                f"{text}: lower --lr (with --resume_allow optimizer.lr where there is a checkpoint)"
                ", or resume from an older checkpoint with --resume PATH, or let some steps pass "
                "with --max_skipped_steps N"
            )
        self.skipped += 1
        self.logger.warning("%s: step skipped, %d of at most %d", text, self.skipped, limit)
        return False

    def _non_finite(self) -> list[str]:
        """Names of some gradients of this rank that are not finite."""
        named = list(self.encoder.module.named_parameters())
        for head_name, head in self.heads.items():
            named.append((f"centers of {head_name}", head.centers))
        names = []
        for name, parameter in named:
            if parameter.grad is not None:
                grad = local(parameter.grad)
                values = grad.coalesce().values() if grad.is_sparse else grad
                if not torch.isfinite(values).all():
                    names.append(name)
        unnamed = len(names) - MOST_NAMED
        if unnamed > 0:
            return [*names[:MOST_NAMED], f"and {unnamed} more"]
        return names

    def _softmax_flops(self, batches: dict[str, PackedBatch]) -> int:
        """Model FLOPs of the heads' losses over the global batch."""
        flops = 0
        for name, batch in batches.items():
            head = self.heads[name]
            flops += softmax_flops(
                # every rank pads its rows to the same number, and gathers those of all
                rows=len(batch.weights) * self.ranks.world_size,
                width=self.encoder.module.config.hidden_size,
                num_sampled_classes=head.num_classes * head.config.sample_rate,
            )
        return flops
