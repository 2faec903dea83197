"""Nearest neighbours on pooled features: no training, no chance.

A clip's class scores are the shares, of its k nearest training clips by cosine, weighted with
exp(cosine / 0.07) as in the DINO protocol. k is chosen on the held-out part of train.
Cost: one matrix product of both lists; features of the training list are held by every rank.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from training.distributed import Ranks

from .benchmarks import hold_out
from .features import ClipFeatures
from .metrics import Judgement, JudgementBuilder

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
ROWS = 256  # clips compared at a time


def judge_neighbours(
    train: ClipFeatures, val: ClipFeatures, share: float, batch_size: int, ranks: Ranks
) -> tuple[int, Judgement | None, Judgement]:
    """(k, judgement of the held-out clips with it, judgement of the validation list by all of
    train); without a held-out part k is 20. The one head of both judgements is k's."""
    known, readable = _all_features(train, batch_size, ranks)
    keep, held = (part[readable[part]] for part in hold_out(train.clips, share))
    if not len(keep):
        raise ValueError("no training clip outside of the held-out part can be read")
    k, held_judgement = 20, None
    if len(held):
        tried = [k for k in NEIGHBOURS if k <= len(keep)]
        judged = _judge(train, held, known[held], known[keep], train.clips.labels[keep], tried)
        best = int(judged.main().argmax())
        k, held_judgement = tried[best], _head(judged, best)
    asked, found = _all_features(val, batch_size, ranks)
    everything, listed = np.flatnonzero(readable), np.flatnonzero(found)
    labels = train.clips.labels[everything]
    k = min(k, len(labels))
    judged = _judge(val, listed, asked[listed], known[everything], labels, [k])
    return k, held_judgement, judged


def _all_features(
    features: ClipFeatures, batch_size: int, ranks: Ranks
) -> tuple[torch.Tensor, np.ndarray]:
    """(unit vectors [N, C] of a whole list, which of them are there), on all ranks; the mean of a
    clip's crops."""
    mine = np.arange(len(features.clips))[ranks.rank :: ranks.world_size]
    chunks = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    rows = None
    for looks, vectors in features.batches([features.crops(chunk) for chunk in chunks]):
        for look, vector in zip(looks, vectors, strict=True):
            if rows is None:
                rows = torch.zeros(len(features.clips), vector.shape[-1])
            rows[look.clip] += F.normalize(vector[0].cpu(), dim=0)
    width = torch.tensor(0 if rows is None else rows.shape[1])
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    rows = torch.zeros(len(features.clips), int(width)) if rows is None else rows
    dist.all_reduce(rows)
    return F.normalize(rows, dim=1), (rows != 0).any(dim=1).numpy()


def _judge(features, indices, asked, known, labels, tried: list[int]) -> Judgement:
    """One head for every k; every rank computes all, so nothing is exchanged."""
    clips = features.clips
    builder = JudgementBuilder(clips.labels, indices, len(tried), clips.num_classes)
    targets = torch.from_numpy(labels)
    if targets.ndim == 1:
        targets = F.one_hot(targets, clips.num_classes)
    for start in range(0, len(asked), ROWS):
        cosine, nearest = (asked[start : start + ROWS] @ known.T).topk(max(tried))
        weights = (cosine / TEMPERATURE).exp()[..., None]
        votes = (weights * targets[nearest]).cumsum(dim=1) / weights.cumsum(dim=1)
        totals = votes[:, [k - 1 for k in tried]].movedim(1, 0)
        builder.add(indices[start : start + ROWS].tolist(), totals)
    return builder.judgement()


def _head(judgement: Judgement, number: int) -> Judgement:
    """One head of a judgement."""
    part = slice(number, number + 1)
    scores = None if judgement.scores is None else judgement.scores[part]
    return replace(
        judgement, place=judgement.place[part], predicted=judgement.predicted[part], scores=scores
    )
