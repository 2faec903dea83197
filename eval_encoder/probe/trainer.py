"""Training and judging the bank of heads on frozen features.

    order of an epoch   drawn from (seed, epoch), the same on any number of ranks
    seeds               attentive heads differ in their initial weights and share every batch; a
                        linear head's problem is convex, so that initial weights move nothing, and
                        each seed has an order of its own
    global batch        batch_size clips per rank; the loss is the mean over all of its clips
    judging             the held-out part of train (to choose with) and the validation list

A head whose gradient is not finite is left as it was and takes no further part.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_pipeline.random import counter_rng
from training.distributed import Ranks

from .bank import HeadBank, HeadSetting
from .benchmarks import hold_out
from .config import HeadsConfig, ProbeConfig
from .features import ClipFeatures, refuse_unreadable
from .metrics import Judgement, JudgementBuilder


class NonFiniteProbe(ValueError):
    """All heads had gradients that are NaN or infinite."""

    outcome = "non-finite"


@dataclass(frozen=True)
class HeadBatch:
    """What some heads of the bank learn from in one step, on this rank: their numbers in the bank,
    clips, and the features [L_i, C] of those."""

    heads: list[int]
    clips: list[int]
    features: list[torch.Tensor]


@dataclass
class History:
    """Figures per judged epoch, float64 [B] each, when each was judged (seconds from the start),
    the last judgement of the validation list, which heads went astray, and whether anything that
    their seeds decide can change a result."""

    settings: list[HeadSetting]
    epochs: list[int] = field(default_factory=list)
    held: list[np.ndarray] = field(default_factory=list)
    main: list[np.ndarray] = field(default_factory=list)
    top5: list[np.ndarray] = field(default_factory=list)
    loss: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    last: Judgement | None = None
    astray: set[int] = field(default_factory=set)
    seeds_matter: bool = True


def settings_of(config: HeadsConfig) -> list[HeadSetting]:
    """Every combination of learning rate, weight decay and seed."""
    seeds = range(config.seed, config.seed + config.num_seeds)
    return [
        HeadSetting(lr, decay, seed)
        for lr in config.lrs
        for decay in config.weight_decays
        for seed in seeds
    ]


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
        board=None,
    ):
        """board: TensorBoard writer of rank 0."""
        self._config, self._heads_config = config, config.heads
        self._train, self._val, self._ranks = train, val, ranks
        self._log, self._board = log, board
        self._num_classes = val.clips.num_classes
        settings = settings_of(config.heads)
        self.bank = HeadBank(config.heads.kind, width, self._num_classes, settings)
        self.bank.to(ranks.device)
        self._seeds = [setting.seed for setting in settings]
        groups = [
            {"params": list(head.parameters()), "peak": s.lr, "weight_decay": s.weight_decay}
            for head, s in zip(self.bank.heads, settings, strict=True)
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=1.0)
        self.history, self._started = History(settings), time.perf_counter()

    def run(self) -> History:
        """All epochs. Raises UnreadableClips at the first judging after a clip could not be read,
        ValueError when nothing is left to choose settings with, NonFiniteProbe when no head is."""
        config = self._heads_config
        keep, held = hold_out(self._train.clips, config.holdout)
        size = config.batch_size * self._ranks.world_size
        steps = -(-len(keep) // size)
        self._look_at_seeds(steps)
        for epoch in range(1, config.epochs + 1):
            sums, count = np.zeros(len(self.bank.heads)), 0
            for number, batches in enumerate(self._head_batches(epoch, keep, size)):
                progress = ((epoch - 1) * steps + number) / (config.epochs * steps)
                sums += self._step(batches, progress)
                count += len(batches[0].clips)  # over an epoch, all seeds have the same clips
            last = epoch == config.epochs
            if epoch == 1 or last or epoch % config.eval_every == 0:
                totals = torch.tensor([*sums, count], dtype=torch.float64)
                dist.all_reduce(totals)
                self._judge(epoch, held, (totals[:-1] / totals[-1].clamp(min=1)).numpy())
                if last or epoch % config.log_every < config.eval_every:
                    self._say(epoch)
        return self.history

    def judge(self, features: ClipFeatures, indices: np.ndarray) -> Judgement:
        """Scores of the clips `indices` by all heads: the mean over the crops of the shares that
        the softmax gives (multi-label: of the logits)."""
        clips, config = features.clips, self._heads_config
        builder = JudgementBuilder(clips.labels, indices, len(self.bank.heads), clips.num_classes)
        mine = indices[self._ranks.rank :: self._ranks.world_size]
        chunks = [mine[i : i + config.batch_size] for i in range(0, len(mine), config.batch_size)]
        looks = [features.crops(chunk) for chunk in chunks]
        with torch.no_grad():
            for found, tokens in features.batches(looks):
                if found:
                    logits = self.bank(tokens).double()
                    scores = logits if clips.is_multi_label else logits.softmax(dim=-1)
                    builder.add(*_mean_over_crops([look.clip for look in found], scores))
        return builder.gather()

    def _look_at_seeds(self, steps: int) -> None:
        """Note seeds that can decide nothing: a linear head with all clips in one batch is the
        same whatever its order."""
        config = self._heads_config
        self.history.seeds_matter = config.kind != "linear" or steps > 1
        if config.num_seeds > 1 and not self.history.seeds_matter:
            self._log.warning(
                "--num_seeds %d does nothing: one batch holds all training clips, and a linear "
                "head comes to the same end from any start; lower --batch_size %d",
                config.num_seeds,
                config.batch_size,
            )

    def _head_batches(self, epoch: int, keep: np.ndarray, size: int) -> Iterator[list[HeadBatch]]:
        """What is learned from in every step of an epoch, for all heads of the bank once. Clips are
        read once, in the order of the first seed."""
        config = self._heads_config
        ranks = self._ranks
        shared = _chunks(config.seed, epoch, keep, size)
        mine = [chunk[ranks.rank :: ranks.world_size] for chunk in shared]
        read = self._train.batches([self._train.drawn_looks(chunk, epoch) for chunk in mine])
        if config.kind == "linear" and config.num_seeds > 1:
            seeds = dict.fromkeys(self._seeds)
            yield from self._batches_by_seed(
                read, {seed: _chunks(seed, epoch, keep, size) for seed in seeds}
            )
            return
        everyone = list(range(len(self.bank.heads)))
        for found, features in read:
            yield [HeadBatch(everyone, [look.clip for look in found], features)]

    def _batches_by_seed(
        self, read: Iterator, orders: dict[int, list[np.ndarray]]
    ) -> Iterator[list[HeadBatch]]:
        """One batch per seed and step, each in the seed's own order, after all of the epoch was
        read: a pooled feature is one row, so that those of all clips fit into memory (fp16, as
        they are stored). A step's clips of a seed lie on several ranks; each rank takes those that
        it has read, since gradients are summed over the ranks anyway."""
        rows = {}
        for found, features in read:
            for look, feature in zip(found, features, strict=True):
                rows[look.clip] = feature.half()
        for step in range(len(orders[self._heads_config.seed])):
            batches = []
            for seed, chunks in orders.items():
                heads = [number for number, own in enumerate(self._seeds) if own == seed]
                clips = [clip for clip in chunks[step].tolist() if clip in rows]
                batches.append(HeadBatch(heads, clips, [rows[clip].float() for clip in clips]))
            yield batches

    def _judge(self, epoch: int, held: np.ndarray, losses: np.ndarray) -> None:
        history = self.history
        judged = self.judge(self._val, np.arange(len(self._val.clips)))
        chosen_with = self.judge(self._train, held) if len(held) else None
        if chosen_with is not None and chosen_with.judged.any():
            history.held.append(chosen_with.main())
        refuse_unreadable(self._train, self._val, self._config.allow_partial)
        self._check_choice(held)
        history.epochs.append(epoch)
        history.main.append(judged.main())
        history.top5.append(judged.top5())
        history.loss.append(losses)
        history.last = judged
        history.seconds.append(time.perf_counter() - self._started)
        if self._board is not None:
            for number, s in enumerate(self.bank.settings):
                name = f"lr{s.lr:g}_wd{s.weight_decay:g}_seed{s.seed}"
                self._board.add_scalar(f"loss/{name}", losses[number], epoch)
                self._board.add_scalar(f"{judged.metric}/{name}", history.main[-1][number], epoch)
                if history.held:
                    value = history.held[-1][number]
                    self._board.add_scalar(f"held_out_{judged.metric}/{name}", value, epoch)

    def _check_choice(self, held: np.ndarray) -> None:
        """Several settings need held-out clips that can be read."""
        names, unreadable = self._train.clips.names, self._train.unreadable
        settings = {(s.lr, s.weight_decay) for s in self.bank.settings}
        if len(settings) > 1 and all(names[i] in unreadable for i in held):
            raise ValueError(
                f"{len(settings)} settings but no held-out training clip to choose with: give more "
                "training clips, a larger --holdout, or one setting"
            )

    def _labels(self, indices: list[int]) -> torch.Tensor:
        return torch.from_numpy(self._train.clips.labels[indices]).to(self._ranks.device)

    def _step(self, batches: list[HeadBatch], progress: float) -> np.ndarray:
        """One step of every head; returns the sums of this rank's losses [B]."""
        config = self._heads_config
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] + (config.min_lr - group["peak"]) * progress
        counts = torch.tensor([float(len(batch.clips)) for batch in batches])
        counts = counts.to(self._ranks.device)
        dist.all_reduce(counts)
        self._optimizer.zero_grad(set_to_none=False)
        losses = torch.zeros(len(self.bank.heads))
        for batch, count in zip(batches, counts, strict=True):
            if batch.clips:
                logits = self.bank(batch.features, batch.heads)
                sums = _losses(logits, self._labels(batch.clips), config.smoothing)
                (sums.sum() / count.clamp(min=1)).backward()
                losses[batch.heads] = sums.detach().cpu()
        self._sum_gradients()
        self._clip()
        self._optimizer.step()
        return losses.double().numpy()

    def _sum_gradients(self) -> None:
        """Over the ranks, in one collective."""
        if self._ranks.world_size == 1:
            return
        parameters = list(self.bank.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        dist.all_reduce(flat)
        pieces = flat.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad.copy_(piece.view_as(parameter))

    def _clip(self) -> None:
        """Bound every head's gradient; a head without a finite one is left where it is."""
        config, astray = self._heads_config, self.history.astray
        for number, head in enumerate(self.bank.heads):
            norm = torch.nn.utils.clip_grad_norm_(head.parameters(), config.clip_grad)
            if number not in astray and not torch.isfinite(norm):
                astray.add(number)
                self._log.warning("head %s went astray", self.bank.settings[number])
            if number in astray:
                for parameter in head.parameters():
                    parameter.grad = None
        if len(astray) == len(self.bank.heads):
            raise NonFiniteProbe(
                f"the gradients of all heads are not finite: lower --default_lr_list {config.lrs}"
            )

    def _say(self, epoch: int) -> None:
        history = self.history
        sound = [i for i in range(len(self.bank.heads)) if i not in history.astray]
        self._log.info(
            "epoch %d/%d | loss %.4f | %s of the heads %.2f to %.2f",
            epoch,
            self._heads_config.epochs,
            history.loss[-1][sound].mean(),
            history.last.metric,
            history.main[-1][sound].min(),
            history.main[-1][sound].max(),
        )


def _chunks(seed: int, epoch: int, clips: np.ndarray, size: int) -> list[np.ndarray]:
    """Global batches of an epoch in a seed's order."""
    order = counter_rng(seed, "probe order", epoch).permutation(clips)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _losses(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Sum over the clips of every head's loss [B]: cross entropy, or for several labels the mean
    over the classes of binary cross entropies."""
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
    number = {clip: row for row, clip in enumerate(once)}
    rows = torch.tensor([number[clip] for clip in clips], device=scores.device)
    total = scores.new_zeros(len(scores), len(once), scores.shape[-1]).index_add_(1, rows, scores)
    return once, total / rows.bincount()[:, None]
