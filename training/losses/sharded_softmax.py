"""Softmax over this rank's sampled classes, streamed: the expensive part of Partial FC.

    cos_ij = row_i . center_j / |center_j|
    lse_i  = log sum over classes j that are no label of row i of exp(scale * f(cos_ij)),
    f(c)   = c if c <= threshold else 0        (the inter-class filter)

Forward goes over the classes in chunks and keeps a maximum and a sum per row, and the cosines of
the labels. Backward, analytic, makes one matrix per chunk of what reaches each cosine,

    G_ij = d lse_i / d cos_ij = scale * exp(scale * f(cos_ij) - lse_i) where the filter lets j
    pass, and the label's own gradient where j is a label of row i,

and from it the gradients of rows (G @ unit centers) and of raw centres,
(G^T @ rows - (sum_i G_ij cos_ij) * unit_j) / |center_j|.

Cost: one matrix product forward, two backward, and one more for chunks whose cosines were not kept
(at most KEPT numbers are). Centres are never normalised as a whole, gradients exist for sampled
classes only.

Shape legend: B rows of the global batch, M sampled classes of this rank, m of a chunk, L labels, D
width.
"""

from dataclasses import dataclass

import torch

CHUNK = 8192  # classes at a time, which bounds temporaries to [B, CHUNK]; a choice, not tuned
KEPT = 1 << 25  # cosines that are kept for backward: 128 MB in fp32, a choice


@dataclass
class SampledSoftmax:
    """One step of one rank.

    rows: unit vectors fp32 [B, D]; centers: this rank's raw centres [N, D]; sampled: int64 [M]
    ascending indices of them, None for all; columns: int64 [B, L], the index of each label among
    the sampled, -1 where its class is another rank's.
    """

    rows: torch.Tensor
    centers: torch.Tensor
    sampled: torch.Tensor | None
    columns: torch.Tensor
    scale: float
    threshold: float

    def __post_init__(self) -> None:
        self._count = len(self.centers) if self.sampled is None else len(self.sampled)
        # per chunk, what the next pass needs: cosines after forward, their gradient after the first
        # half of backward; empty where they are computed again
        self._kept: list[torch.Tensor] = []
        self._row_index = torch.arange(len(self.rows), device=self.rows.device)
        self._row_index = self._row_index[:, None].expand_as(self.columns)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(maximum, sum, cosines of labels).

        maximum and sum exp(logit - maximum), fp32 [B], over this rank's sampled classes that are no
        label of the row; -inf and 0 where there is none. Cosines [B, L] of the labels that are this
        rank's, 0 for others.
        """
        rows = self.rows
        maximum = torch.full((len(rows),), -torch.inf, device=rows.device)
        total = torch.zeros(len(rows), device=rows.device)
        label_cosines = torch.zeros(self.columns.shape, device=rows.device)
        # beyond KEPT, backward computes them again: another product instead of the memory
        keep = self._count * len(rows) <= KEPT
        for start in range(0, self._count, CHUNK):
            chunk, inverse = self._chunk(start)
            cosines = self._cosines(chunk, inverse)
            if keep:
                self._kept.append(cosines)
            here, positives = self._labels_in(start, cosines)
            label_cosines[here] = cosines[positives]
            logits = self._logits(cosines)
            # a row's own labels are no negatives
            logits[positives] = -torch.inf
            # the sum so far is scaled to the new maximum, as in every streamed softmax
            peak = torch.maximum(maximum, logits.amax(dim=1))
            safe = peak.masked_fill(peak == -torch.inf, 0.0)  # -inf - -inf would be NaN
            sums = logits.sub_(safe[:, None]).exp_().sum(dim=1)
            total = total * (maximum - safe).exp() + sums
            maximum = peak
        return maximum, total, label_cosines

    def backward_rows(
        self, lse: torch.Tensor, grad_lse: torch.Tensor, grad_cosines: torch.Tensor
    ) -> torch.Tensor:
        """Gradient of rows [B, D] through this rank's classes: the first half of backward.

        lse [B] over all ranks, its gradient [B], and that of the label cosines [B, L].
        """
        rows = self.rows
        grad_rows = torch.zeros_like(rows)
        self._grad_centers = torch.empty(self._count, rows.shape[1], device=rows.device)
        shift = lse.masked_fill(lse == -torch.inf, torch.inf)  # no negatives: exp gives zeros
        weight = (self.scale * grad_lse)[:, None]
        for number, start in enumerate(range(0, self._count, CHUNK)):
            chunk, inverse = self._chunk(start)
            cosines = self._kept[number] if self._kept else self._cosines(chunk, inverse)
            here, positives = self._labels_in(start, cosines)
            shifted = self._logits(cosines).sub_(shift[:, None])
            grad = shifted.exp_().mul_(weight)
            # a filtered cosine counts as the constant 0, which has no gradient
            if self.threshold < 1:
                grad.mul_(cosines <= self.threshold)
            # labels are no negatives: what reaches them is their own gradient alone
            grad[positives] = 0.0
            # accumulated, since a class may be a label of the row twice
            grad.index_put_(positives, grad_cosines[here], accumulate=True)
            # the part along the centre, which its norm takes out again
            along = (grad * cosines).sum(dim=0)
            # from here on for products with raw centres: unit_j = center_j * inverse_j
            grad.mul_(inverse)
            grad_rows += _product(grad, chunk)
            piece = self._grad_centers[start : start + CHUNK]
            radial = (along * inverse.square())[:, None].neg_()
            torch.mul(chunk, radial, out=piece)
            if self._kept:
                # the cosines are done with; `backward_centers` makes the product of this one
                self._kept[number] = grad
            else:
                piece += _product(grad.T, rows)
        return grad_rows

    def backward_centers(self) -> torch.Tensor:
        """Gradient of the raw sampled centres [M, D]: the second half of backward. No other rank
        needs it, so the ranks can exchange gradients of rows meanwhile.
        """
        for number, grad in enumerate(self._kept):
            start = number * CHUNK
            piece = self._grad_centers[start : start + CHUNK]
            piece += _product(grad.T, self.rows)
        self._kept.clear()
        return self._grad_centers

    def _chunk(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw centres [m, D] of a chunk and the inverse of their norms [m]."""
        if self.sampled is None:
            chunk = self.centers[start : start + CHUNK]
        else:
            classes = self.sampled[start : start + CHUNK]
            chunk = self.centers.index_select(0, classes)
        norms = torch.linalg.vector_norm(chunk, dim=1)
        return chunk, norms.clamp_(min=1e-12).reciprocal_()  # as in F.normalize

    def _cosines(self, chunk: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        cosines = _product(self.rows, chunk.T).mul_(inverse)
        # rounding may lead beyond 1, and no logit may exceed the scale: partial_fc relies on it
        return cosines.clamp_(-1.0, 1.0)

    def _logits(self, cosines: torch.Tensor) -> torch.Tensor:
        logits = cosines * self.scale
        # from 1 on the filter lets everything pass
        if self.threshold < 1:
            logits.masked_fill_(cosines > self.threshold, 0.0)
        return logits

    def _labels_in(
        self, start: int, cosines: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """(mask [B, L] of the labels in a chunk, index (rows, columns) of these in its cosines)."""
        columns = self.columns - start
        here = (columns >= 0) & (columns < cosines.shape[1])
        return here, (self._row_index[here], columns[here])


def filtered(cosines: torch.Tensor, threshold: float) -> torch.Tensor:
    """The inter-class filter: non-target cosines above the threshold become 0, without gradient,
    since a class that close is more likely a duplicate of the row's own than a negative."""
    return torch.where(cosines <= threshold, cosines, torch.zeros_like(cosines))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Matrix product fp32; on a GPU of bf16 factors, summed in fp32."""
    if left.is_cuda:
        return torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32)
    return left @ right
