"""Partial FC: learnable class centres, sharded over the ranks, trained with a margin softmax over a
sample of them.

    rows     = unit(all_gather(embeddings, labels, weights))      every rank sees the global batch
    sample   = all classes that are labels of the batch, and every other class with probability
               sample_rate; one sample for all labels
    lse      = log sum exp over sampled non-label classes          streamed
    cosines  = of rows with their labels                           filled in by the owning rank
    loss     = mean over rows of mean (or sum) over labels of margin_losses

Class c belongs to the rank that owns row c of a chunked [num_classes, D] matrix. Which classes are
sampled and how centres start depends on (seed, name, step, global class id), so results do not
depend on the world size. Collectives: one all-gather and one all-reduce forward, one
reduce-scatter backward, which runs beside the gradient of the centres. Time and memory follow the
sampled classes, not the labels per row; the choice itself is one hash per class.

Shape legend: b samples of this rank, R rows of each rank, B rows of all, L labels, D width, M
sampled classes of this rank.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, init_device_mesh

from data_pipeline.random import counter_normal, counter_uniform

from ..distributed import Ranks, all_gather_rows, reduce_scatter_rows
from .margin import margin_losses
from .sharded_softmax import SampledSoftmax

LABEL_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class PartialFCConfig:
    """Loss of one head.

    `filter_threshold` 0 switches the inter-class filter off; `label_reduction` "sum" has the public
    training's gradient (of the sum over the labels). `sparse_gradient`: gradients of centres hold
    sampled classes only; their AdamW is then lazy (optimizer.py).
    """

    sample_rate: float = 0.1
    margin: float = 0.3
    scale: float = 64.0
    filter_threshold: float = 0.75
    label_reduction: str = "mean"
    mask_co_positives: bool = False
    init_std: float = 0.01
    sparse_gradient: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"--list_sample_rates {self.sample_rate} must lie in (0, 1]")
        if self.label_reduction not in LABEL_REDUCTIONS:
            raise ValueError(
                f"label_reduction {self.label_reduction!r}: choose one of "
                f"{', '.join(LABEL_REDUCTIONS)}"
            )
        for name in ("scale", "init_std"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} {value} must be positive and finite")
        if not -2 <= self.margin <= 2 or not 0 <= self.filter_threshold <= 1:
            raise ValueError(
                f"--list_margins {self.margin} must lie in [-2, 2], --list_filters "
                f"{self.filter_threshold} in [0, 1] (0: off)"
            )

    @property
    def is_sparse(self) -> bool:
        """Whether gradients of centres hold sampled classes only."""
        return self.sparse_gradient and self.sample_rate < 1

    @property
    def threshold(self) -> float:
        """The filter's threshold on cosines; infinite when it is off."""
        return self.filter_threshold if self.filter_threshold > 0 else float("inf")


@dataclass(frozen=True)
class PartialFCLoss:
    """`objective` is the scalar to run backward on; `reported` the mean over rows and labels,
    detached; `losses` fp32 [B, L], detached."""

    objective: torch.Tensor
    reported: torch.Tensor
    losses: torch.Tensor


def class_range(num_classes: int, rank: int, world_size: int) -> tuple[int, int]:
    """First class and end of a rank's shard: chunks of ceil(N / W), the sharding rule of DTensor's
    Shard(0)."""
    chunk = -(-num_classes // world_size)  # rounded up, so the last ranks may have fewer, or none
    start = min(rank * chunk, num_classes)
    end = min(start + chunk, num_classes)
    return start, end


class PartialFC(nn.Module):
    """Centres of this rank's classes and the loss over all of them."""

    def __init__(
        self,
        num_classes: int,
        width: int,
        config: PartialFCConfig,
        ranks: Ranks,
        seed: int = 0,
        name: str = "",
    ):
        super().__init__()
        # purposes of random draws, so that heads of one seed have other numbers
        self._centers_draw = f"centers {name}".strip()
        self._negatives_draw = f"negatives {name}".strip()
        self.num_classes = num_classes
        self.config = config
        self.seed = seed
        self._range: torch.Tensor | None = None  # smallest and largest label since the last check
        self.class_start, self.class_end = class_range(
            num_classes, rank=ranks.rank, world_size=ranks.world_size
        )
        classes = torch.arange(self.class_start, self.class_end, device=ranks.device)
        self.centers = nn.Parameter(
            counter_normal(classes, width, seed, self._centers_draw) * config.init_std
        )

    def load_centers(self, centers: torch.Tensor) -> None:
        """Take this rank's rows of a full matrix [num_classes, D]; ValueError for another shape."""
        expected = (self.num_classes, self.centers.shape[1])
        if tuple(centers.shape) != expected:
            raise ValueError(
                f"initial centres have shape {list(centers.shape)}, this head needs "
                f"{list(expected)}"
            )
        centers = centers[self.class_start : self.class_end]
        # a row of zeros has no direction, and so no cosine with anything
        lost = ~(centers.isfinite().all(dim=1) & centers.any(dim=1))
        if lost.any():
            first = self.class_start + int(lost.nonzero()[0])
            raise ValueError(
                f"{int(lost.sum())} initial centres are zero or not finite, the first is of class "
                f"{first}: cluster again"
            )
        with torch.no_grad():
            self.centers.copy_(centers)

    def crowding(self, most: int = 2048) -> float:
        """Share of pairs of this rank's first `most` centres that are closer than the filter's
        threshold: classes of such a pair would not be each other's negatives.

        2048 centres make a matrix of cosines of 16 MB, which is enough to estimate a share.
        """
        first = self.centers.detach()[:most].float()
        unit = F.normalize(first, dim=-1)
        pairs = len(unit) * (len(unit) - 1)
        if pairs == 0 or self.config.threshold >= 1:
            return 0.0
        # the diagonal, each centre with itself, is no pair
        is_close = (unit @ unit.T) > self.config.threshold
        close = is_close.sum() - len(unit)
        # a cosine with itself may be rounded below a threshold close to 1
        return max(0.0, close.item() / pairs)

    def whole_centers(self) -> torch.Tensor:
        """Centres of all ranks, float32 [num_classes, D] on the CPU. Called by all ranks."""
        return self.sharded(self.centers.detach()).full_tensor().cpu()

    @cached_property
    def _mesh(self) -> DeviceMesh:
        """All ranks in one dimension; made once, by a collective."""
        return init_device_mesh(self.centers.device.type, (dist.get_world_size(),))

    def sharded(self, local: torch.Tensor) -> DTensor:
        """This rank's values for each of its classes [n, ...] as part of one tensor over all global
        class ids [num_classes, ...]."""
        shape = torch.Size((self.num_classes, *local.shape[1:]))
        # given, since chunks of ceil(N / W) leave the last rank fewer rows or none
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self._mesh, [Shard(0)], shape=shape, stride=stride, run_check=False
        )

    def forward(
        self, embeddings: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, draw: int
    ) -> PartialFCLoss:
        """embeddings fp32 [b, D], labels int64 [R, L] (-1 ignored), weights [R] (0 takes a row
        out); the same R on every rank, b at most R: rows beyond b must weigh 0. `draw` numbers the
        random choice of negatives.

        Raises ValueError on all ranks when any label is below -1 or not below num_classes; on a
        GPU, where reading labels would wait for the device, loss and gradients become NaN and
        `check_labels` reports why.
        """
        if not labels.numel():
            raise ValueError(f"labels are {list(labels.shape)}: give at least one row and label")
        # to one beyond either end: still recognised as out of range, and fits int32
        clamped = labels.clamp(-2, self.num_classes)
        rows, all_labels, all_weights = self._gather(
            embeddings.detach(), labels=clamped, weights=weights
        )
        lowest, highest = all_labels.aminmax()
        # over all micro steps since the last check: a GPU is asked when a step is not finite
        earlier_lowest, earlier_highest = (lowest, highest) if self._range is None else self._range
        self._range = torch.stack(
            [torch.minimum(lowest, earlier_lowest), torch.maximum(highest, earlier_highest)]
        )
        if not labels.is_cuda:
            self.check_labels()
        # labels of padding would be sampled like those of rows that count
        all_labels = all_labels.masked_fill(all_weights[:, None] == 0, -1)
        sampled, columns = self._sample(all_labels, draw)
        plan = _Plan(
            head=self,
            labels=all_labels,
            weights=all_weights,
            own_weights=weights,
            sampled=sampled,
            columns=columns,
        )
        objective, mean, losses = _Loss.apply(embeddings, self.centers, rows, plan)
        wrong = (lowest < -1) | (highest >= self.num_classes)
        return PartialFCLoss(
            objective=objective * torch.where(wrong, torch.nan, 1.0), reported=mean, losses=losses
        )

    def check_labels(self) -> None:
        """Raise ValueError when a label was out of range since the last check."""
        if self._range is None:
            return
        lowest, highest = self._range.tolist()
        self._range = None
        if lowest < -1 or highest >= self.num_classes:
            raise ValueError(
                f"a label is out of range: the head has {self.num_classes} classes, 0 to "
                f"{self.num_classes - 1}, and -1 for none; label the data again"
            )

    def _gather(
        self, embeddings: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings [B, D], labels [B, L] and weights [B] of all ranks, in one collective: labels
        travel as the bits of floats, so that all three are columns of one tensor."""
        missing = len(labels) - len(embeddings)
        rows = F.pad(embeddings.float(), (0, 0, 0, missing))  # the same R on every rank
        rows = rows.masked_fill(weights[:, None] == 0, 0.0)  # padding may hold NaN
        # their bits and not their values: fp32 holds whole numbers exactly up to 2**24 only
        bits = labels.to(torch.int32).view(torch.float32)
        own = torch.cat([rows, bits, weights.float()[:, None]], dim=1)
        gathered = all_gather_rows(own)
        sizes = [embeddings.shape[1], labels.shape[1], 1]
        rows, bits, all_weights = gathered.split(sizes, dim=1)
        all_labels = bits.contiguous().view(torch.int32).long()
        return rows, all_labels, all_weights.squeeze(1)

    def _sample(self, labels: torch.Tensor, draw: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(ascending local indices of the sampled classes [M], None: all; index of each label among
        them [B, L], -1: not this rank's)."""
        local = labels - self.class_start
        here = (labels >= self.class_start) & (labels < self.class_end)
        if self.config.sample_rate == 1:
            return None, local.masked_fill(~here, -1)
        classes = torch.arange(self.class_start, self.class_end, device=labels.device)
        uniform = counter_uniform(classes, self.seed, self._negatives_draw, draw)
        chosen = uniform < self.config.sample_rate
        # a row needs the centres of its own labels, whatever was drawn
        chosen[local[here]] = True
        sampled = chosen.nonzero().squeeze(1)  # ascending, which searchsorted needs
        # a label of another rank gets some index here, which the mask takes away
        columns = torch.searchsorted(sampled, local.clamp(min=0).contiguous())
        return sampled, columns.masked_fill(~here, -1)


@dataclass(frozen=True)
class _Plan:
    """Arguments of one loss beside embeddings and centres: labels [B, L], weights [B] and sampled
    classes as above, and this rank's weights [R]."""

    head: PartialFC
    labels: torch.Tensor
    weights: torch.Tensor
    own_weights: torch.Tensor
    sampled: torch.Tensor | None
    columns: torch.Tensor


class _Loss(torch.autograd.Function):
    """Objective, mean and losses [B, L] of the global batch; the same numbers on every rank.

    The gradient of embeddings is that of the global loss times the world size, so that the
    averaging of data parallelism gives the true one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: torch.Tensor,
        centers: torch.Tensor,
        gathered: torch.Tensor,
        plan: _Plan,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gathered: embeddings of all ranks [B, D], without gradient."""
        config = plan.head.config
        softmax = SampledSoftmax(
            rows=F.normalize(gathered, dim=-1),
            centers=centers.detach(),
            sampled=plan.sampled,
            columns=plan.columns,
            scale=config.scale,
            threshold=config.threshold,
        )
        maximum, total, own_cosines = softmax.forward()
        lse, cosines = _reduce(maximum, total, cosines=own_cosines, scale=config.scale)
        # gradients of the small part, [B] and [B, L], by autograd at once: backward needs no graph
        with torch.enable_grad():
            lse.requires_grad_()
            cosines.requires_grad_()
            objective, mean, losses = _objective(cosines, lse=lse, plan=plan)
            grad_lse, grad_cosines = torch.autograd.grad(objective, (lse, cosines))
        ctx.softmax = softmax
        ctx.plan = plan
        ctx.num_centers = len(centers)
        ctx.save_for_backward(embeddings, lse.detach(), grad_lse, grad_cosines)
        ctx.mark_non_differentiable(mean, losses)
        return objective.detach(), mean, losses

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        """The exchange of rows' gradients runs beside the gradient of the centres."""
        embeddings, lse, grad_lse, grad_cosines = ctx.saved_tensors
        grad_rows = ctx.softmax.backward_rows(
            lse, grad_lse=grad_lse * grad, grad_cosines=grad_cosines * grad
        )
        exchange = reduce_scatter_rows(grad_rows) if ctx.needs_input_grad[0] else None
        grad_centers = ctx.softmax.backward_centers()
        grad_embeddings = None
        if exchange is not None:
            # gradient of x / |x|: without its component along x, divided by |x|
            own = exchange()[: len(embeddings)] * dist.get_world_size()
            norms = embeddings.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # as in F.normalize
            unit = embeddings / norms
            along = (own * unit).sum(dim=-1, keepdim=True)
            grad_embeddings = (own - along * unit) / norms
            # padding may hold NaN, which a factor of 0 would not remove
            unused = ctx.plan.own_weights[: len(embeddings), None] == 0
            grad_embeddings = grad_embeddings.masked_fill(unused, 0.0)
        grad_all = _of_all(grad_centers, plan=ctx.plan, num_centers=ctx.num_centers)
        return grad_embeddings, grad_all, None, None


def _reduce(
    maximum: torch.Tensor, total: torch.Tensor, cosines: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sums [B], label cosines [B, L]) over all ranks, by one all-reduce.

    Exponentials are taken relative to `scale`, the largest possible logit, so that no maximum has
    to be exchanged first; fp64 holds them up to scales of 350.
    """
    sums = total.double() * (maximum.double() - scale).exp()
    # a label's cosine is 0 on all ranks but its own, so the sum over ranks is the cosine
    joined = torch.cat([sums[:, None], cosines.double()], dim=1)
    dist.all_reduce(joined)
    lse = joined[:, 0].log() + scale  # -inf for a row without any negative
    return lse.float(), joined[:, 1:].float()


def _objective(
    cosines: torch.Tensor, lse: torch.Tensor, plan: _Plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(objective, mean, losses [B, L]) from cosines of the labels [B, L] and log-sums [B]."""
    config = plan.head.config
    losses = margin_losses(
        positive_cosines=cosines,
        labels=plan.labels,
        negative_lse=lse,
        scale=config.scale,
        margin=config.margin,
        filter_threshold=config.threshold,
        mask_co_positives=config.mask_co_positives,
    )
    per_row = (plan.labels >= 0).float().sum(dim=1)  # labels; rows may have fewer than L
    row_weights = plan.weights * (per_row > 0)
    total = row_weights.sum().clamp(min=1e-12)  # a batch of padding alone has loss 0, not NaN
    weighted = row_weights * losses.sum(dim=1)
    mean = (weighted / per_row.clamp(min=1)).sum() / total
    summed = weighted.sum() / total
    objective = mean if config.label_reduction == "mean" else summed
    return objective, mean.detach(), losses.detach()


def _of_all(grad: torch.Tensor, plan: _Plan, num_centers: int) -> torch.Tensor:
    """Gradient of the sampled centres [M, D] as one of all this rank's centres."""
    sampled = plan.sampled
    if sampled is None:
        return grad
    shape = (num_centers, grad.shape[1])
    if plan.head.config.is_sparse:
        # ascending and without repeats, so there is nothing to coalesce or to check
        return torch.sparse_coo_tensor(
            sampled[None], grad, shape, is_coalesced=True, check_invariants=False
        )
    return torch.zeros(shape, device=grad.device).index_copy_(0, sampled, grad)
