"""Nearest neighbours on pooled features: no training, no randomness.

A class's score is its share of a clip's k nearest training clips by cosine, weighted with
exp(cosine / 0.07) as in the DINO protocol. k is chosen on the held-out part of the training list.
Cost: one matrix product of both lists; every rank holds the features of the training list.

Shape legend: N clips of a list, C width, K classes.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from training.distributed import Ranks

from .benchmarks import hold_out
from .features import ClipFeatures, crop_batches
from .metrics import Evaluation, EvaluationBuilder

# DINO's own evaluation tries 10, 20, 100 and 200.
NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
DEFAULT_NEIGHBOURS = 20  # DINO's, for a list of which nothing is held out to choose with
TEMPERATURE = 0.07  # DINO's
ROWS = 256  # clips compared at a time, to bound the memory of cosines


def evaluate_neighbours(
    train: ClipFeatures, val: ClipFeatures, share: float, batch_size: int, ranks: Ranks
) -> tuple[int, Evaluation | None, Evaluation]:
    """Return (k, evaluation of the held-out clips with it, evaluation of the validation list).

    The validation list is compared with all of the training list. share: the held-out part of it,
    without which the second one is None. The one head of both evaluations is that of k. Raises
    ValueError where no training clip outside of the held-out part can be read.
    """
    vectors, readable = _all_features(train, batch_size, ranks=ranks)
    # clips that cannot be read are on neither side
    parts = hold_out(train.clips, share)
    keep, held = (part[readable[part]] for part in parts)
    if not len(keep):
        raise ValueError("no training clip outside of the held-out part can be read")

    k = DEFAULT_NEIGHBOURS
    held_evaluation = None
    if len(held):
        # k neighbours need k clips
        tried = [count for count in NEIGHBOURS if count <= len(keep)]
        every = _evaluate(
            train,
            held,
            queries=vectors[held],
            keys=vectors[keep],
            labels=train.clips.labels[keep],
            tried=tried,
        )
        best = int(every.main().argmax())
        k = tried[best]
        held_evaluation = replace(
            every,
            true_rank=every.true_rank[[best]],
            predicted=every.predicted[[best]],
            scores=None if every.scores is None else every.scores[[best]],
        )

    queries, val_readable = _all_features(val, batch_size, ranks=ranks)
    everything = np.flatnonzero(readable)
    asked = np.flatnonzero(val_readable)
    k = min(k, len(everything))
    evaluation = _evaluate(
        val,
        asked,
        queries=queries[asked],
        keys=vectors[everything],
        labels=train.clips.labels[everything],
        tried=[k],
    )
    return k, held_evaluation, evaluation


def _all_features(
    features: ClipFeatures, batch_size: int, ranks: Ranks
) -> tuple[torch.Tensor, np.ndarray]:
    """(unit vectors [N, C] of a whole list, which of them could be read), on all ranks. A clip's
    vector is the mean of its crops' unit vectors."""
    rows = None
    indices = np.arange(len(features.clips))
    for looks, vectors in crop_batches(features, indices, batch_size=batch_size, ranks=ranks):
        for look, vector in zip(looks, vectors, strict=True):
            if rows is None:
                rows = torch.zeros(len(features.clips), vector.shape[-1])
            rows[look.clip] += F.normalize(vector[0].cpu(), dim=0)

    # A rank without a readable clip learns the width of the features from the others.
    width = torch.tensor(0 if rows is None else rows.shape[1])
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    if rows is None:
        rows = torch.zeros(len(features.clips), int(width))
    # rows of clips of other ranks are zero, so the sum is a union
    dist.all_reduce(rows)
    # a clip that could not be read has added nothing
    readable = (rows != 0).any(dim=1)
    return F.normalize(rows, dim=1), readable.numpy()


def _evaluate(
    features: ClipFeatures,
    indices: np.ndarray,
    queries: torch.Tensor,
    keys: torch.Tensor,
    labels: np.ndarray,
    tried: list[int],
) -> Evaluation:
    """Evaluate the clips `indices` of a list with one head for every k of `tried`.

    queries: vectors [n, C] of those clips; keys, labels: vectors and labels of the clips that they
    are compared with. Every rank computes all of it, so nothing is exchanged.
    """
    clips = features.clips
    builder = EvaluationBuilder(
        labels=clips.labels,
        indices=indices,
        num_heads=len(tried),
        num_classes=clips.num_classes,
    )
    targets = torch.from_numpy(labels)
    if targets.ndim == 1:
        targets = F.one_hot(targets, clips.num_classes)
    for start in range(0, len(queries), ROWS):
        cosines = queries[start : start + ROWS] @ keys.T
        # one search for the largest k; smaller ones are its first columns
        cosine, nearest = cosines.topk(max(tried))
        weights = (cosine / TEMPERATURE).exp()[..., None]
        # Cumulative sums over neighbours, nearest first: row k - 1 has the votes of k neighbours.
        votes = (weights * targets[nearest]).cumsum(dim=1)
        votes = votes / weights.cumsum(dim=1)
        scores = votes[:, [k - 1 for k in tried]]  # [n, B, K]
        scores = scores.movedim(1, 0)
        builder.add(indices[start : start + ROWS].tolist(), scores)
    return builder.evaluation()
