"""Training and validating the bank of heads on frozen tokens.

Validation counts every clip exactly once over all ranks. Training steps are the same number on
every rank; each epoch has its own order, drawn from (seed, epoch).
"""

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_pipeline.counter_rng import counter_rng
from training.distributed import Ranks

from .probe_config import ProbeConfig
from .probe_head import HeadBank
from .probe_loader import ClipTokens


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent, of one head at one epoch."""

    lr: float
    epoch: int
    top1: float
    top5: float


class NonFiniteProbe(RuntimeError):
    """A head whose loss became NaN or infinite."""


def train_heads(
    config: ProbeConfig,
    num_classes: int,
    width: int,
    train: ClipTokens,
    val: ClipTokens,
    ranks: Ranks,
    log: logging.Logger,
) -> list[list[Accuracy]]:
    """Accuracies per head and validated epoch, on all ranks. Raises NonFiniteProbe."""
    bank = HeadBank(width, num_classes, len(config.lrs), config.seed).to(ranks.device)
    groups = [
        {"params": list(head.parameters()), "peak": lr}
        for head, lr in zip(bank.heads, config.lrs, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=config.weight_decay)
    steps_per_epoch = _steps_per_epoch(train, config.batch_size, ranks)
    total_steps, step = config.epochs * steps_per_epoch, 0
    history: list[list[Accuracy]] = [[] for _ in config.lrs]
    for epoch in range(1, config.epochs + 1):
        order = (
            counter_rng(config.seed, "probe order", epoch, ranks.rank)
            .permutation(train.indices)
            .tolist()
        )
        batches = train.batches(order, config.batch_size)
        for _ in range(steps_per_epoch):
            loss = _train_step(bank, next(batches), optimizer, step / total_steps, config)
            step += 1
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            for scores, lr, accuracy in zip(
                history, config.lrs, evaluate(bank, val, config, ranks), strict=True
            ):
                scores.append(Accuracy(lr, epoch, *accuracy))
        if epoch % config.log_every == 0 or epoch == config.epochs:
            best = max(scores[-1].top1 for scores in history) if history[0] else float("nan")
            log.info("epoch %d/%d | loss %.4f | top-1 %.2f", epoch, config.epochs, loss, best)
    return history


def _steps_per_epoch(train: ClipTokens, batch_size: int, ranks: Ranks) -> int:
    smallest = torch.tensor([train.num_readable], device=ranks.device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    if int(smallest) < 1:
        raise ValueError(
            "a rank has no readable training clip: use fewer processes or repair the data"
        )
    return max(1, int(smallest) // batch_size)


def _train_step(bank: HeadBank, batch, optimizer, progress: float, config: ProbeConfig) -> float:
    tokens, bounds, longest, labels = batch
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] + (config.min_lr - group["peak"]) * progress
    logits = bank(tokens, bounds, longest)
    losses = [F.cross_entropy(one, labels, label_smoothing=config.smoothing) for one in logits]
    optimizer.zero_grad()
    sum(losses).backward()
    _average_gradients(bank)
    for head in bank.heads:
        norm = torch.nn.utils.clip_grad_norm_(head.parameters(), config.clip_grad)
        if not torch.isfinite(norm):
            raise NonFiniteProbe(
                f"the gradient of a head is {norm.item()}: lower --default_lr_list {config.lrs}"
            )
    optimizer.step()
    return float(torch.stack(losses).detach().mean())


def _average_gradients(bank: HeadBank) -> None:
    """Mean over the ranks, in one collective."""
    gradients = [parameter.grad for parameter in bank.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


@torch.inference_mode()
def evaluate(
    bank: HeadBank, val: ClipTokens, config: ProbeConfig, ranks: Ranks
) -> list[tuple[float, float]]:
    """(top-1, top-5) in percent of every head over all ranks' clips."""
    counts = torch.zeros(len(bank.heads), 3, dtype=torch.float64, device=ranks.device)
    for tokens, bounds, longest, labels in val.batches(val.indices, config.batch_size):
        logits = bank(tokens, bounds, longest)
        ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[None, :, None]
        counts[:, 0] += ranked[..., 0].sum(dim=1)
        counts[:, 1] += ranked.any(dim=-1).sum(dim=1)
        counts[:, 2] += len(labels)
    dist.all_reduce(counts)
    if not counts[0, 2]:
        raise ValueError("no validation clip can be read: repair the data")
    return [(100 * top1 / n, 100 * top5 / n) for top1, top5, n in counts.tolist()]
