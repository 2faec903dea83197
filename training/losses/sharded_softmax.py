"""The denominator of a softmax over sharded classes, streamed:
logits exist for one chunk of classes only.

    lse_i = log sum over all ranks' classes j that are no label of row i of exp(scale * f(cos_ij)),
    f(c) = c if c <= threshold else 0        (the inter-class filter)

Forward keeps a running maximum and sum per row; backward computes each chunk's cosines again:
    d lse_i / d cos_ij = scale * exp(scale * f(cos_ij) - lse_i)   where the filter lets j pass, else
    0.
Cost: two matmuls forward and backward recompute, B x chunk floats of memory, two all_reduce of [B]
numbers.

Shape legend: B rows of the global batch, M sampled classes of this rank, L labels, D width.
"""

import torch
import torch.distributed as dist

CHUNK = 16384


def filtered(cosines: torch.Tensor, threshold: float) -> torch.Tensor:
    """The inter-class filter: non-target cosines above the threshold
    become 0 (and give no gradient).
    """
    return torch.where(cosines <= threshold, cosines, torch.zeros_like(cosines))


class NegativeLogSumExp(torch.autograd.Function):
    """Log of the summed exponentials of all non-label classes, over all ranks.

    rows: unit vectors [B, D]; centers: unit vectors [M, D]; label_columns: int64 [B, L], the column
    of each label among this rank's centers, -1 where it is not here. Returns fp32 [B]; -inf for a
    row without any negative.
    """

    @staticmethod
    def forward(
        ctx, rows, centers, label_columns, scale: float, threshold: float, chunk: int = CHUNK
    ):
        maximum = torch.full((len(rows),), -torch.inf, device=rows.device)
        total = torch.zeros(len(rows), device=rows.device)
        for start in range(0, len(centers), chunk):
            logits = _chunk_logits(
                rows, centers[start : start + chunk], label_columns - start, scale, threshold
            )[0]
            peak = torch.maximum(maximum, logits.amax(dim=1))
            safe = peak.masked_fill(peak == -torch.inf, 0.0)
            total = total * (maximum - safe).exp() + (logits - safe[:, None]).exp().sum(dim=1)
            maximum = peak
        peak = maximum.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        safe = peak.masked_fill(peak == -torch.inf, 0.0)
        total = total * (maximum - safe).exp()
        dist.all_reduce(total)
        lse = safe + total.log()
        ctx.save_for_backward(rows, centers, label_columns, lse)
        ctx.settings = (scale, threshold, chunk)
        return lse

    @staticmethod
    def backward(ctx, grad):
        rows, centers, label_columns, lse = ctx.saved_tensors
        scale, threshold, chunk = ctx.settings
        grad_rows, grad_centers = torch.zeros_like(rows), torch.empty_like(centers)
        shift = lse.masked_fill(lse == -torch.inf, 0.0)
        for start in range(0, len(centers), chunk):
            piece = centers[start : start + chunk]
            logits, passed = _chunk_logits(rows, piece, label_columns - start, scale, threshold)
            grad_cosines = (logits - shift[:, None]).exp() * passed * (scale * grad)[:, None]
            grad_rows += (grad_cosines.to(rows.dtype) @ piece).to(grad_rows.dtype)
            grad_centers[start : start + chunk] = grad_cosines.to(rows.dtype).T @ rows
        return grad_rows, grad_centers, None, None, None, None


def _chunk_logits(rows, centers, label_columns, scale: float, threshold: float):
    """Scaled, filtered logits [B, m] with labels at -inf,
    and the mask of cosines that carry gradient.
    """
    cosines = (rows @ centers.T).float().clamp(-1.0, 1.0)
    passed = cosines <= threshold
    logits = scale * filtered(cosines, threshold)
    here = (label_columns >= 0) & (label_columns < len(centers))
    row_index = torch.arange(len(rows), device=rows.device)[:, None].expand_as(label_columns)
    logits[row_index[here], label_columns[here]] = -torch.inf
    return logits, passed
