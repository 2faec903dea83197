"""Partial FC: learnable class centres, sharded over the ranks,
trained with a margin softmax over a sample of them.

    rows     = unit(all_gather(embeddings))                       every rank sees the global batch
    sample   = all classes that are labels of the batch, and every other class with probability
             sample_rate
    lse      = log sum exp over sampled non-label classes          streamed, all_reduce
    cosines  = rows . unit(centers[labels])                        filled in by the owning rank,
             all_reduce
    loss     = mean over rows of mean (or sum) over labels of margin_losses

Class c lives on the rank that owns row c of a chunked [num_classes, D] matrix. Which classes are
sampled and how centres start depends on (seed, step, global class id) alone, so results do not
depend on the world size. Cost per step: one [B, M] matmul for all labels, three small collectives
and two of size [B, D].

Shape legend: b rows of this rank, B rows of all, L labels, D width, M sampled classes of this rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data_pipeline.counter_hash import counter_normal, counter_uniform

from ..distributed import Ranks, all_gather_rows, gather_rows_with_grad, sum_over_ranks
from .margin import margin_losses
from .sharded_softmax import NegativeLogSumExp

LABEL_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class PartialFCConfig:
    """Loss of one head.

    `filter_threshold` 0 switches the inter-class filter off; `label_reduction` "sum" has the public
    training's gradient (of the sum over the labels).
    """

    sample_rate: float = 0.1
    margin: float = 0.3
    scale: float = 64.0
    filter_threshold: float = 0.75
    label_reduction: str = "mean"
    mask_co_positives: bool = False
    init_std: float = 0.01

    def __post_init__(self):
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"--list_sample_rates {self.sample_rate} must lie in (0, 1]")
        if self.label_reduction not in LABEL_REDUCTIONS:
            raise ValueError(
                f"label_reduction {self.label_reduction!r}: choose one of "
                f"{', '.join(LABEL_REDUCTIONS)}"
            )
        if self.scale <= 0:
            raise ValueError(f"scale {self.scale} must be positive")

    @property
    def threshold(self) -> float:
        """The filter's threshold on cosines; infinite when it is off."""
        return self.filter_threshold if self.filter_threshold > 0 else float("inf")


@dataclass(frozen=True)
class PartialFCLoss:
    """`objective` is what backward runs on; `reported` the mean over rows and labels, detached;
    `losses` [B, L].
    """

    objective: torch.Tensor
    reported: torch.Tensor
    losses: torch.Tensor


def class_range(num_classes: int, rank: int, world_size: int) -> tuple[int, int]:
    """First class and end of a rank's shard: chunks of ceil(N / W),
    the sharding rule of DTensor's Shard(0).
    """
    chunk = -(-num_classes // world_size)
    return min(rank * chunk, num_classes), min((rank + 1) * chunk, num_classes)


class PartialFC(nn.Module):
    """Centres of this rank's classes and the loss over all of them."""

    def __init__(
        self, num_classes: int, width: int, config: PartialFCConfig, ranks: Ranks, seed: int = 0
    ):
        super().__init__()
        self.num_classes, self.config, self.seed = num_classes, config, seed
        self.class_start, self.class_end = class_range(num_classes, ranks.rank, ranks.world_size)
        classes = torch.arange(self.class_start, self.class_end, device=ranks.device)
        self.centers = nn.Parameter(
            counter_normal(classes, width, seed, "centers") * config.init_std
        )

    def load_centers(self, centers: torch.Tensor) -> None:
        """Take this rank's rows of a full matrix [num_classes, D]; ValueError for another shape."""
        expected = (self.num_classes, self.centers.shape[1])
        if tuple(centers.shape) != expected:
            raise ValueError(
                f"initial centres have shape {list(centers.shape)}, this head needs "
                f"{list(expected)}"
            )
        with torch.no_grad():
            self.centers.copy_(centers[self.class_start : self.class_end])

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, step: int
    ) -> PartialFCLoss:
        """embeddings fp32 [b, D], labels int64 [b, L] (-1 ignored),
        weights [b] (0 takes a row out), same b everywhere.

        Raises ValueError on all ranks when any label is not below num_classes (on the CPU; on a GPU
        reading the maximum would wait for the device, and load_labels has checked the file).
        """
        config = self.config
        rows = F.normalize(gather_rows_with_grad(embeddings), dim=-1)
        labels, weights = all_gather_rows(labels), all_gather_rows(weights)
        self._check_labels(labels)
        labels = labels.masked_fill(weights[:, None] == 0, -1)

        local = labels - self.class_start
        here = (labels >= self.class_start) & (labels < self.class_end)
        sampled, columns = self._sample(local, here, step)
        centers = F.normalize(self.centers[sampled], dim=-1)

        lse = NegativeLogSumExp.apply(rows, centers, columns, config.scale, config.threshold)
        cosines = sum_over_ranks(_label_cosines(rows, centers, columns)).clamp(-1.0, 1.0)
        losses = margin_losses(
            cosines,
            labels,
            lse,
            config.scale,
            config.margin,
            config.threshold,
            config.mask_co_positives,
        )
        valid = (labels >= 0).float()
        per_row = valid.sum(dim=1)
        row_weights = weights * (per_row > 0)
        total = row_weights.sum().clamp(min=1e-12)
        mean = (row_weights * losses.sum(dim=1) / per_row.clamp(min=1)).sum() / total
        summed = (row_weights * losses.sum(dim=1)).sum() / total
        objective = mean if config.label_reduction == "mean" else summed
        return PartialFCLoss(objective, mean.detach(), losses)

    def _check_labels(self, labels: torch.Tensor) -> None:
        highest = int(labels.max()) if not labels.is_cuda else None
        if highest is not None and highest >= self.num_classes:
            raise ValueError(
                f"label {highest} is out of range, the head has {self.num_classes} classes: label "
                "the data again"
            )

    def _sample(
        self, local: torch.Tensor, here: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sorted local indices of the sampled classes [M], and each label's column among them (-1:
        not this rank's).
        """
        count = self.class_end - self.class_start
        chosen = torch.ones(count, dtype=torch.bool, device=local.device)
        if self.config.sample_rate < 1:
            classes = torch.arange(self.class_start, self.class_end, device=local.device)
            chosen = (
                counter_uniform(classes, self.seed, "negatives", step) < self.config.sample_rate
            )
            chosen[local[here]] = True
        column_of_class = chosen.cumsum(0) - 1
        columns = torch.full_like(local, -1)
        columns[here] = column_of_class[local[here]]
        return chosen.nonzero().squeeze(1), columns


def _label_cosines(
    rows: torch.Tensor, centers: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Cosine of each row with its labels [B, L]; 0 for labels of other ranks."""
    here = columns >= 0
    row_index = torch.arange(len(rows), device=rows.device)[:, None].expand_as(columns)[here]
    values = (rows[row_index] * centers[columns[here]]).sum(dim=-1)
    return torch.zeros(columns.shape, device=rows.device).masked_scatter(here, values)
