"""Evaluations of clips, exact over any number of ranks, and the figures that are computed of them.

Every clip of a list is evaluated once, by one rank. Ranks then exchange results clip by clip, so
that every rank computes every figure from the same numbers.

Shape legend: B heads, N clips of the list, K classes.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from ..intervals import bootstrap_bounds, normal_half_width

# 200 instead of the usual 1000 resamplings: a mean average precision sorts every class anew
RESAMPLINGS = 200


@dataclass(frozen=True)
class Evaluation:
    """Results of B heads on N clips.

    labels     int [N], or 0/1 [N, K] where clips have several
    evaluated  bool [N]        False for clips that could not be read
    true_rank  int [B, N]      rank of the true class among the scores, from 1
    predicted  int [B, N]      the class of the largest score
    scores     float [B, N, K] class scores, of multi-label lists only, else None
    """

    labels: np.ndarray
    evaluated: np.ndarray
    true_rank: np.ndarray
    predicted: np.ndarray
    num_classes: int
    scores: np.ndarray | None = None

    def of_heads(self, heads: list[int]) -> "Evaluation":
        """The results of some heads alone."""
        return replace(
            self,
            true_rank=self.true_rank[heads],
            predicted=self.predicted[heads],
            scores=None if self.scores is None else self.scores[heads],
        )

    @property
    def metric(self) -> str:
        """Name of the main figure: top1 or mAP."""
        return "top1" if self.scores is None else "mAP"

    def main(self) -> np.ndarray:
        """The main figure of every head in percent, float64 [B]."""
        if self.scores is None:
            return self.top(1)
        heads = range(len(self.scores))
        return np.array([self._precisions(head).mean() for head in heads])

    def top(self, k: int) -> np.ndarray:
        """Share of evaluated clips whose true class is among the k first, in percent, [B]."""
        # clips that could not be read have a true_rank of 0, and must not count as hits
        return 100 * (self.true_rank[:, self.evaluated] <= k).mean(axis=1)

    def top5(self) -> np.ndarray | None:
        """Top-5 accuracy [B]; None where it carries no information: up to five classes, or several
        labels."""
        if self.scores is not None or self.num_classes <= 5:
            return None
        return self.top(5)

    def per_class(self, heads: list[int]) -> list[float | None]:
        """Main figure of every class, mean over some heads; None for classes without clips."""
        labels = self.labels[self.evaluated]
        if self.scores is not None:
            values = np.full(labels.shape[1], np.nan)
            has_clips = labels.any(axis=0)
            values[has_clips] = np.mean([self._precisions(head) for head in heads], axis=0)
        else:
            sums = np.bincount(labels, self._correct(heads), minlength=self.num_classes)
            counts = np.bincount(labels, minlength=self.num_classes)
            percents = 100 * sums / np.maximum(1, counts)
            values = np.where(counts, percents, np.nan)
        return [None if np.isnan(value) else round(float(value), 2) for value in values]

    def confusion(self, heads: list[int]) -> np.ndarray | None:
        """Counts [K true, K predicted] over some heads; None for multi-label lists."""
        if self.scores is not None:
            return None
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        for head in heads:
            cells = (self.labels[self.evaluated], self.predicted[head, self.evaluated])
            # unlike counts[cells] += 1, it counts a cell that occurs several times as often
            np.add.at(counts, cells, 1)
        return counts

    def clip_interval(self, heads: list[int]) -> float:
        """Half of the 95 % interval of the heads' mean that comes from the choice of clips: normal
        approximation for accuracies, bootstrap for mean average precision."""
        if self.scores is None:
            correct = self._correct(heads)
            return normal_half_width(correct.std(), len(correct))
        labels = self.labels[self.evaluated]
        scores = [self.scores[head, self.evaluated] for head in heads]

        def resampled(draw: np.random.Generator) -> dict[str, float]:
            rows = draw.integers(0, len(labels), len(labels))
            precisions = [average_precision(head[rows], labels[rows]) for head in scores]
            # a sample may have drawn no positive clip of any class
            means = [values.mean() if len(values) else 0.0 for values in precisions]
            return {"mAP": float(np.mean(means))}

        bounds = bootstrap_bounds(resampled, purpose="probe interval", resamplings=RESAMPLINGS)
        lower, upper = bounds["mAP"]
        return (upper - lower) / 2

    def _correct(self, heads: list[int]) -> np.ndarray:
        """Share of the heads that are right, for every evaluated clip."""
        is_right = self.true_rank[heads][:, self.evaluated] == 1
        return is_right.mean(axis=0)

    def _precisions(self, head: int) -> np.ndarray:
        """Average precision in percent of the classes that have clips."""
        assert self.scores is not None  # lists of one label have accuracies
        scores = self.scores[head, self.evaluated]
        return average_precision(scores, labels=self.labels[self.evaluated])


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision in percent of each class that has positives: the mean, over its positive
    clips, of the precision among all clips that score as high or higher. scores, labels [N, K]."""
    order = np.argsort(-scores, axis=0, kind="stable")
    hits = np.take_along_axis(labels.astype(bool), order, axis=0)
    ranked = np.take_along_axis(scores, order, axis=0)

    # Clips with equal scores are one group, as their order in the list is arbitrary: the precision
    # of each is that at the end of its group.
    is_end = np.vstack([ranked[:-1] != ranked[1:], np.ones_like(hits[:1])])
    own_rank = np.arange(len(hits))[:, None]
    ends = np.where(is_end, own_rank, len(hits) - 1)
    # from behind: a clip takes over the end that follows it
    ends = np.minimum.accumulate(ends[::-1], axis=0)[::-1]

    # hits among the first clips, up to the end of the group, by the number of these clips
    precision = np.take_along_axis(np.cumsum(hits, axis=0), ends, axis=0) / (ends + 1)
    positives = hits.sum(axis=0)
    present = positives > 0
    sums = (precision * hits).sum(axis=0)
    return 100 * sums[present] / positives[present]


class EvaluationBuilder:
    """Collects results of this rank's clips; `gather` exchanges them."""

    def __init__(
        self, labels: np.ndarray, indices: np.ndarray, num_heads: int, num_classes: int
    ) -> None:
        """labels of the whole list; indices: those of its clips that are evaluated."""
        self._labels = labels[indices]
        self._row = {int(index): row for row, index in enumerate(indices)}
        self._num_classes = num_classes
        # Clips of other ranks stay zero, so that a sum over ranks is a union. The three results are
        # parts of one tensor, which one collective exchanges.
        shape = (num_heads, len(indices))
        self._results = torch.zeros((3, *shape), dtype=torch.int32)
        self._evaluated, self._true_rank, self._predicted = self._results
        self._scores: torch.Tensor | None = None
        if labels.ndim == 2:
            self._scores = torch.zeros((*shape, num_classes))

    def add(self, indices: list[int], scores: torch.Tensor) -> None:
        """Add scores [B, n, K] of the n clips `indices`; a larger score is more likely."""
        rows = torch.tensor([self._row[index] for index in indices])
        # true infinities become finite, so that afterwards -inf marks NaN and nothing else
        scores = torch.nan_to_num(scores.float().cpu(), nan=-torch.inf)
        self._evaluated[:, rows] = 1
        self._predicted[:, rows] = scores.argmax(dim=-1).int()
        if self._scores is not None:
            self._scores[:, rows] = scores
            return
        truth = torch.from_numpy(self._labels[rows.numpy()])
        truth_of_heads = truth.expand(len(scores), -1)
        own = scores.gather(-1, truth_of_heads[..., None])  # [B, n, 1]
        # Of equal scores the lowest class comes first, as in argmax. Otherwise a head that scores
        # all classes alike would always be right.
        classes = torch.arange(scores.shape[-1])
        is_lower_class = classes < truth[:, None]
        before = (scores == own) & is_lower_class
        true_rank = 1 + ((scores > own) | before).sum(dim=-1).int()
        # A head whose score of the true class is NaN is wrong, whatever its other scores are.
        is_nan = own[..., 0].isinf()
        behind_all = scores.shape[-1] + 1
        self._true_rank[:, rows] = true_rank.masked_fill(is_nan, behind_all)

    def gather(self) -> Evaluation:
        """The evaluation of all ranks' clips, on all ranks."""
        dist.all_reduce(self._results)
        if self._scores is not None:
            dist.all_reduce(self._scores)
        return self.evaluation()

    def evaluation(self) -> Evaluation:
        """The evaluation of the clips that were added here."""
        return Evaluation(
            labels=self._labels,
            evaluated=self._evaluated[0].numpy() > 0,
            true_rank=self._true_rank.numpy(),
            predicted=self._predicted.numpy(),
            num_classes=self._num_classes,
            scores=None if self._scores is None else self._scores.numpy(),
        )
