"""Judgements of clips, exact over any number of ranks, and what is said about them.

Every clip of a list is judged once, by the rank that it falls to; ranks then exchange what they
found clip by clip, so that any figure is computed from the same numbers everywhere.

Shape legend: B heads, N clips of the list, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.random import counter_rng

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (any statistics table)
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL975 = 1.96
RESAMPLINGS = 200


@dataclass(frozen=True)
class Judgement:
    """What B heads say of N clips.

    judged     bool [N]       False for clips that could not be read
    scores     float [B, N, K] class scores, of multi-label lists only, else None
    place      int [B, N]     place of the true class among the scores, 1 the first
    predicted  int [B, N]     the class of the largest score
    """

    labels: np.ndarray
    judged: np.ndarray
    place: np.ndarray
    predicted: np.ndarray
    num_classes: int
    scores: np.ndarray | None = None

    @property
    def metric(self) -> str:
        """Name of the main figure: top1 or mAP."""
        return "top1" if self.scores is None else "mAP"

    def main(self) -> np.ndarray:
        """The main figure of every head in percent, float64 [B]."""
        if self.scores is None:
            return self.top(1)
        return np.array([self._aps(head).mean() for head in range(len(self.scores))])

    def top(self, k: int) -> np.ndarray:
        """Share of judged clips whose true class is among the k first, in percent, [B]."""
        return 100 * (self.place[:, self.judged] <= k).mean(axis=1)

    def top5(self) -> np.ndarray | None:
        """Share of clips whose true class is among the five first, [B]; None where that says
        nothing: up to five classes, or several labels."""
        return self.top(5) if self.scores is None and self.num_classes > 5 else None

    def per_class(self, heads: list[int]) -> list[float | None]:
        """Main figure of every class, mean over some heads; None for classes without clips."""
        if self.scores is not None:
            values = np.full(self.labels.shape[1], np.nan)
            values[self._present()] = np.mean([self._aps(h) for h in heads], axis=0)
        else:
            right, labels = self._right(heads), self.labels[self.judged]
            sums = np.bincount(labels, right, minlength=self.num_classes)
            counts = np.bincount(labels, minlength=self.num_classes)
            values = np.where(counts, 100 * sums / np.maximum(1, counts), np.nan)
        return [None if np.isnan(v) else round(float(v), 2) for v in values]

    def confusion(self, heads: list[int]) -> np.ndarray | None:
        """Counts [K true, K predicted] over some heads; None for multi-label lists."""
        if self.scores is not None:
            return None
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        for head in heads:
            np.add.at(counts, (self.labels[self.judged], self.predicted[head, self.judged]), 1)
        return counts

    def clip_interval(self, heads: list[int]) -> float:
        """Half of the 95 % interval of the heads' mean that comes from the choice of clips: normal
        approximation for accuracies, resampled clips for mean average precision."""
        if self.scores is None:
            right = self._right(heads)
            return float(100 * NORMAL975 * right.std() / max(1, len(right)) ** 0.5)
        count, means = int(self.judged.sum()), []
        for number in range(RESAMPLINGS):
            rows = counter_rng(0, "probe interval", number).integers(0, count, count)
            labels = self.labels[self.judged][rows]
            means.append(np.mean([_mean_ap(self.scores[h, self.judged][rows], labels)
                                  for h in heads]))  # fmt: skip
        return float((np.percentile(means, 97.5) - np.percentile(means, 2.5)) / 2)

    def _right(self, heads: list[int]) -> np.ndarray:
        """Share of the heads that are right, for every judged clip."""
        return (self.place[heads][:, self.judged] == 1).mean(axis=0)

    def _present(self) -> np.ndarray:
        return self.labels[self.judged].any(axis=0)

    def _aps(self, head: int) -> np.ndarray:
        """Average precision in percent of the classes that have clips."""
        return average_precision(self.scores[head, self.judged], self.labels[self.judged])


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision in percent of each class that has positives: the mean, over its positive
    clips, of the precision among all clips that score as high or higher. scores, labels [N, K]."""
    order = np.argsort(-scores, axis=0, kind="stable")
    hits = np.take_along_axis(labels.astype(bool), order, axis=0)
    ranked = np.take_along_axis(scores, order, axis=0)
    last = len(hits) - 1
    is_end = np.vstack([ranked[:-1] != ranked[1:], np.ones_like(hits[:1])])
    ends = np.where(is_end, np.arange(len(hits))[:, None], last)  # of the clips that score alike
    ends = np.minimum.accumulate(ends[::-1], axis=0)[::-1]
    precision = np.take_along_axis(np.cumsum(hits, axis=0), ends, axis=0) / (ends + 1)
    positives = hits.sum(axis=0)
    present = positives > 0
    return 100 * (precision * hits).sum(axis=0)[present] / positives[present]


def _mean_ap(scores: np.ndarray, labels: np.ndarray) -> float:
    values = average_precision(scores, labels)
    return float(values.mean()) if len(values) else 0.0


def seed_interval(values) -> float | None:
    """Half of the 95 % interval of a mean over seeds (Student's t); None for a single value."""
    count = len(values)
    if count < 2:
        return None
    quantile = T975[count - 2] if count - 2 < len(T975) else NORMAL975
    return float(quantile * np.std(values, ddof=1) / count**0.5)


class JudgementBuilder:
    """Collects this rank's clips; `gather` exchanges them."""

    def __init__(self, labels: np.ndarray, indices: np.ndarray, num_heads: int, num_classes: int):
        """labels of the whole list; indices: those of its clips that are judged."""
        self._labels, self._row = labels[indices], {int(i): n for n, i in enumerate(indices)}
        self._num_classes = num_classes
        shape = (num_heads, len(indices))
        several = labels.ndim == 2
        self._scores = torch.zeros(*shape, num_classes) if several else None
        self._found = torch.zeros(3, *shape, dtype=torch.int32)  # judged, place, predicted

    def add(self, indices: list[int], scores: torch.Tensor) -> None:
        """scores [B, n, K] of clips, larger is likelier."""
        rows = torch.tensor([self._row[i] for i in indices])
        scores = torch.nan_to_num(scores.float().cpu(), nan=-torch.inf)
        self._found[0, :, rows] = 1
        self._found[2, :, rows] = scores.argmax(dim=-1).int()
        if self._scores is not None:
            self._scores[:, rows] = scores
            return
        truth = torch.from_numpy(self._labels[rows.numpy()])
        own = scores.gather(-1, truth.expand(len(scores), -1)[..., None])
        # classes before the true one that score the same come first, as in argmax
        before = (scores == own) & (torch.arange(scores.shape[-1]) < truth[:, None])
        place = 1 + ((scores > own) | before).sum(dim=-1).int()
        # a head without a number for the true class is wrong, whatever else it says
        self._found[1, :, rows] = place.masked_fill(own[..., 0].isinf(), scores.shape[-1] + 1)

    def gather(self) -> Judgement:
        """The judgement of all ranks' clips, on all ranks."""
        dist.all_reduce(self._found)
        if self._scores is not None:
            dist.all_reduce(self._scores)
        return self.judgement()

    def judgement(self) -> Judgement:
        """The judgement of the clips that were added here."""
        judged, place, predicted = self._found.numpy()
        scores = None if self._scores is None else self._scores.numpy()
        facts = (self._labels, judged[0] > 0, place, predicted, self._num_classes)
        return Judgement(*facts, scores)
