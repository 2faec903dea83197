"""Training and evaluation of the bank of heads on frozen features.

    order of an epoch   drawn from (seed, epoch), the same on any number of ranks
    seeds               attentive heads differ in their initial weights and share every batch;
                        linear heads start almost at zero, so their initial weights change next to
                        nothing, and each seed has an order of its own instead
    global batch        batch_size clips per rank; the loss is the mean over all of its clips
    evaluation          the held-out part of train (to choose with) and the validation list

A head whose gradient is not finite has diverged: it is left as it was and takes no further part.

Shape legend: B heads of the bank, n clips, m crops, K classes, L tokens, C width.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_pipeline.random import counter_rng
from training.distributed import Ranks

from .bank import HeadBank, HeadSetting
from .benchmarks import hold_out
from .config import HeadsConfig, ProbeConfig
from .features import ClipFeatures, FeatureBatch, crop_batches, refuse_unreadable
from .metrics import Evaluation, EvaluationBuilder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class NonFiniteProbe(ValueError):
    """All heads had gradients that are NaN or infinite."""

    outcome = "non-finite"


@dataclass(frozen=True)
class HeadBatch:
    """What some heads of the bank learn from in one step, on this rank.

    heads     indices of the heads in the bank
    clips     indices of the clips in the training list
    features  [L_i, C] of each clip
    """

    heads: list[int]
    clips: list[int]
    features: list[torch.Tensor]


@dataclass(frozen=True)
class EpochFigures:
    """Figures of every head at an evaluated epoch, float64 [B], in percent.

    main, top5  of the validation clips; top5 None where it carries no information
    held        main figure of the held-out clips; None where none of them could be read
    loss        mean training loss
    seconds     since the start of the trainer
    """

    epoch: int
    main: np.ndarray
    top5: np.ndarray | None
    held: np.ndarray | None
    loss: np.ndarray
    seconds: float = 0.0


@dataclass
class History:
    """Results of a bank.

    epochs        figures of the evaluated epochs, in order
    last          the last evaluation of the validation list, clip by clip
    diverged      indices of heads that diverged
    seeds_matter  whether anything that their seeds decide can change a result
    """

    settings: list[HeadSetting]
    epochs: list[EpochFigures] = field(default_factory=list)
    last: Evaluation | None = None
    diverged: set[int] = field(default_factory=set)
    seeds_matter: bool = True


class ProbeTrainer:
    """One bank on the features of two lists. Every method is called by all ranks."""

    def __init__(
        self,
        config: ProbeConfig,
        width: int,
        train: ClipFeatures,
        val: ClipFeatures,
        ranks: Ranks,
        log: logging.Logger,
        board: "SummaryWriter | None" = None,
    ) -> None:
        """width of the features; board: TensorBoard writer of rank 0."""
        self._config = config
        self._heads_config = config.heads
        self._train = train
        self._val = val
        self._ranks = ranks
        self._log = log
        self._board = board

        settings = settings_of(config.heads)
        num_classes = val.clips.num_classes
        bank = HeadBank(
            config.heads.kind,
            width=width,
            num_classes=num_classes,
            settings=settings,
        )
        self.bank = bank.to(ranks.device)
        # one group per head, which has a learning rate and a weight decay of its own
        groups = [
            {"params": list(head.parameters()), "peak": s.lr, "weight_decay": s.weight_decay}
            for head, s in zip(self.bank.heads, settings, strict=True)
        ]
        # `_step` sets the learning rate of every group before it is used.
        self._optimizer = torch.optim.AdamW(groups, lr=1.0)
        self.history = History(settings)
        self._started = time.perf_counter()

    def run(self) -> History:
        """Train and evaluate all epochs.

        Raises UnreadableClips at the first evaluation after a clip could not be read, ValueError
        when nothing is left to choose settings with, NonFiniteProbe when all heads diverged.
        """
        config = self._heads_config
        keep, held = hold_out(self._train.clips, config.holdout)
        size = config.batch_size * self._ranks.world_size
        steps = -(-len(keep) // size)  # the last batch of an epoch may be smaller
        self._check_seeds(steps)
        for epoch in range(1, config.epochs + 1):
            sums = np.zeros(len(self.bank.heads))
            num_clips = 0
            for step, batches in enumerate(self._head_batches(epoch, keep, size=size)):
                # 0 at the first step; the step after the last one would have 1
                steps_done = (epoch - 1) * steps + step
                progress = steps_done / (config.epochs * steps)
                sums += self._step(batches, progress)
                num_clips += len(batches[0].clips)  # over an epoch, all seeds have the same clips
            is_last = epoch == config.epochs
            if epoch == 1 or is_last or epoch % config.eval_every == 0:
                totals = torch.tensor([*sums, num_clips], dtype=torch.float64)
                dist.all_reduce(totals)
                clips_seen = totals[-1].clamp(min=1)
                losses = (totals[:-1] / clips_seen).numpy()
                self._evaluate_epoch(epoch, held, losses=losses)
                # the first evaluated epoch at or after a multiple of log_every
                if is_last or epoch % config.log_every < config.eval_every:
                    self._log_epoch(epoch)
        return self.history

    def evaluate(self, features: ClipFeatures, indices: np.ndarray) -> Evaluation:
        """Evaluate the clips `indices` with all heads. A clip's scores are the mean over its crops
        of the softmax (multi-label: of the logits)."""
        clips = features.clips
        builder = EvaluationBuilder(
            labels=clips.labels,
            indices=indices,
            num_heads=len(self.bank.heads),
            num_classes=clips.num_classes,
        )
        batches = crop_batches(
            features, indices, batch_size=self._heads_config.batch_size, ranks=self._ranks
        )
        with torch.no_grad():
            for looks, tokens in batches:
                if looks:  # a batch may hold nothing that can be read
                    # fp64 until the mean over crops is taken
                    logits = self.bank(tokens).double()
                    scores = logits if clips.is_multi_label else logits.softmax(dim=-1)
                    once, means = _mean_over_crops([look.clip for look in looks], scores)
                    builder.add(once, means)
        return builder.gather()

    def _check_seeds(self, steps: int) -> None:
        """Note, and warn of, seeds that can change nothing: a linear head with all clips in one
        batch is the same whatever their order."""
        config = self._heads_config
        self.history.seeds_matter = config.kind != "linear" or steps > 1
        if config.num_seeds > 1 and not self.history.seeds_matter:
            self._log.warning(
                "--num_seeds %d does nothing: one batch holds all training clips, and linear "
                "heads of all seeds start almost at zero; lower --batch_size %d",
                config.num_seeds,
                config.batch_size,
            )

    def _head_batches(self, epoch: int, keep: np.ndarray, size: int) -> Iterator[list[HeadBatch]]:
        """For every step of an epoch, what each head of the bank learns from. Clips are read once,
        in the order of the first seed.

        keep: indices of the clips to learn from; size of a global batch.
        """
        config = self._heads_config
        ranks = self._ranks
        # Every rank draws the order of all ranks and takes its share, so nothing is exchanged.
        shared = _chunks(config.seed, epoch, clips=keep, size=size)
        mine = [chunk[ranks.rank :: ranks.world_size] for chunk in shared]
        looks_of_batches = [self._train.drawn_looks(chunk, epoch) for chunk in mine]
        read = self._train.batches(looks_of_batches)
        if config.kind == "linear" and config.num_seeds > 1:
            yield from self._batches_by_seed(read, epoch=epoch, keep=keep, size=size)
            return
        all_heads = list(range(len(self.bank.heads)))
        for looks, features in read:
            clips = [look.clip for look in looks]
            yield [HeadBatch(heads=all_heads, clips=clips, features=features)]

    def _batches_by_seed(
        self, read: Iterator[FeatureBatch], epoch: int, keep: np.ndarray, size: int
    ) -> Iterator[list[HeadBatch]]:
        """One batch per seed and step, each in the seed's own order, after all of the epoch was
        read: a pooled feature is one row, so those of all clips fit into memory (fp16, as they are
        stored). The clips of a step and a seed lie on several ranks. Each rank takes those that it
        has read, since gradients are summed over the ranks anyway."""
        rows = {}
        for looks, features in read:
            for look, feature in zip(looks, features, strict=True):
                rows[look.clip] = feature.half()

        heads_of_seed: dict[int, list[int]] = {}
        for head, setting in enumerate(self.bank.settings):
            heads_of_seed.setdefault(setting.seed, []).append(head)
        orders = {seed: _chunks(seed, epoch, clips=keep, size=size) for seed in heads_of_seed}
        for step in range(len(orders[self._heads_config.seed])):
            batches = []
            for seed, heads in heads_of_seed.items():
                clips_of_step = orders[seed][step].tolist()
                clips = [clip for clip in clips_of_step if clip in rows]
                features = [rows[clip].float() for clip in clips]
                batches.append(HeadBatch(heads=heads, clips=clips, features=features))
            yield batches

    def _evaluate_epoch(self, epoch: int, held: np.ndarray, losses: np.ndarray) -> None:
        """Evaluate both lists and note the figures. held: indices of the held-out clips."""
        every_clip = np.arange(len(self._val.clips))
        evaluation = self.evaluate(self._val, every_clip)
        held_figures = None
        if len(held):
            held_evaluation = self.evaluate(self._train, held)
            if held_evaluation.evaluated.any():
                held_figures = held_evaluation.main()
        # after both lists were looked at, so that one message names all that cannot be read
        refuse_unreadable(self._train, self._val, allow_partial=self._config.allow_partial)
        self._check_choice(held)

        figures = EpochFigures(
            epoch=epoch,
            main=evaluation.main(),
            top5=evaluation.top5(),
            held=held_figures,
            loss=losses,
            seconds=time.perf_counter() - self._started,
        )
        self.history.epochs.append(figures)
        self.history.last = evaluation
        if self._board is not None:
            for head, setting in enumerate(self.bank.settings):
                rates = f"lr{setting.lr:g}_wd{setting.weight_decay:g}"
                name = f"{rates}_seed{setting.seed}"
                self._board.add_scalar(f"loss/{name}", losses[head], epoch)
                tag = f"{evaluation.metric}/{name}"
                self._board.add_scalar(tag, figures.main[head], epoch)
                if held_figures is not None:
                    tag = f"held_out_{evaluation.metric}/{name}"
                    self._board.add_scalar(tag, held_figures[head], epoch)

    def _check_choice(self, held: np.ndarray) -> None:
        """Raise ValueError for several settings without held-out clips that can be read."""
        names = self._train.clips.names
        settings = {(s.lr, s.weight_decay) for s in self.bank.settings}
        unreadable = self._train.unreadable
        # also where nothing is held out, since `all` of nothing is true
        has_no_choice = all(names[index] in unreadable for index in held)
        if len(settings) > 1 and has_no_choice:
            raise ValueError(
                f"{len(settings)} settings but no held-out training clip to choose with: give more "
                "training clips, a larger --holdout, or one setting"
            )

    def _step(self, batches: list[HeadBatch], progress: float) -> np.ndarray:
        """Take one step with every head; returns the sums of this rank's losses [B]. progress of
        the linear schedule, 0 to 1."""
        config = self._heads_config
        for group in self._optimizer.param_groups:
            # linear, from the head's own peak to min_lr
            change = (config.min_lr - group["peak"]) * progress
            group["lr"] = group["peak"] + change
        # A rank's share of a batch may be smaller than another's, or lack clips that cannot be
        # read: the loss is the mean over what all ranks have.
        counts = torch.tensor([float(len(batch.clips)) for batch in batches])
        counts = counts.to(self._ranks.device)
        dist.all_reduce(counts)
        # zeros, not None: a head without clips on this rank takes part in the sum over ranks
        self._optimizer.zero_grad(set_to_none=False)
        losses = torch.zeros(len(self.bank.heads))
        for batch, count in zip(batches, counts, strict=True):
            if batch.clips:
                labels = torch.from_numpy(self._train.clips.labels[batch.clips])
                logits = self.bank(batch.features, batch.heads)
                sums = _losses(logits, labels.to(logits.device), smoothing=config.smoothing)
                # Heads share no weights: the gradient of the sum is that of every head's own loss.
                (sums.sum() / count.clamp(min=1)).backward()
                losses[batch.heads] = sums.detach().cpu()
        self._sum_gradients()
        self._clip_gradients()
        self._optimizer.step()
        return losses.double().numpy()

    def _sum_gradients(self) -> None:
        """Sum gradients over the ranks, in one collective."""
        if self._ranks.world_size == 1:
            return
        parameters = list(self.bank.parameters())
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:  # before the first backward pass, and after a divergence
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def _clip_gradients(self) -> None:
        """Bound every head's gradient norm; a head without a finite gradient has diverged, and
        takes no step. Raises NonFiniteProbe when none is left."""
        diverged = self.history.diverged
        for number, head in enumerate(self.bank.heads):
            # One norm for each head: a common one would let a large head's gradient shrink all.
            norm = torch.nn.utils.clip_grad_norm_(head.parameters(), self._heads_config.clip_grad)
            if number not in diverged and not torch.isfinite(norm):
                diverged.add(number)
                self._log.warning("head %s diverged", self.bank.settings[number])
            if number in diverged:
                # AdamW passes over parameters without a gradient; zeros would still decay weights
                for parameter in head.parameters():
                    parameter.grad = None
        if len(diverged) == len(self.bank.heads):
            raise NonFiniteProbe(
                "the gradients of all heads are not finite: lower --default_lr_list "
                f"{self._heads_config.lrs}"
            )

    def _log_epoch(self, epoch: int) -> None:
        assert self.history.last is not None
        diverged = self.history.diverged
        every_head = range(len(self.bank.heads))
        heads = [head for head in every_head if head not in diverged]
        figures = self.history.epochs[-1]
        self._log.info(
            "epoch %d/%d | loss %.4f | %s of the heads %.2f to %.2f",
            epoch,
            self._heads_config.epochs,
            figures.loss[heads].mean(),
            self.history.last.metric,
            figures.main[heads].min(),
            figures.main[heads].max(),
        )


def settings_of(config: HeadsConfig) -> list[HeadSetting]:
    """Every combination of learning rate, weight decay and seed."""
    return [
        HeadSetting(lr, decay, seed)
        for lr in config.lrs
        for decay in config.weight_decays
        for seed in range(config.seed, config.seed + config.num_seeds)
    ]


def _chunks(seed: int, epoch: int, clips: np.ndarray, size: int) -> list[np.ndarray]:
    """Global batches of an epoch in a seed's order."""
    order = counter_rng(seed, "probe order", epoch).permutation(clips)
    starts = range(0, len(order), size)
    return [order[start : start + size] for start in starts]


def _losses(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Sum over the clips of every head's loss [B], of logits [B, n, K]: cross entropy, or for
    several labels [n, K] the mean over the classes of binary cross entropies, which are never
    smoothed."""
    if labels.ndim == 2:
        targets = labels.float().expand_as(logits)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1).sum(1)
    heads, clips = logits.shape[:2]
    flat = F.cross_entropy(
        logits.flatten(0, 1), labels.repeat(heads), label_smoothing=smoothing, reduction="none"
    )
    return flat.view(heads, clips).sum(dim=1)


def _mean_over_crops(clips: list[int], scores: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """(clips once each, mean scores [B, n, K]) of scores of crops [B, m, K]."""
    once = list(dict.fromkeys(clips))
    row_of = {clip: row for row, clip in enumerate(once)}
    rows = torch.tensor([row_of[clip] for clip in clips], device=scores.device)
    shape = (len(scores), len(once), scores.shape[-1])
    total = scores.new_zeros(shape)
    total.index_add_(1, rows, scores)
    return once, total / rows.bincount()[:, None]
