"""Cosine margin loss for several labels per row:
a pure function of positive cosines and the negatives' log-sum.

For row i and label l with cosine c_l, scale s, margin m and filter f:

    loss_il = -log( e^{s (c_l - m)} / ( e^{s (c_l - m)} + sum_{other labels k} e^{s f(c_k)} +
    e^{lse_i} ) )

Every label has its own softmax; the other labels of the row stand in its denominator as the public
training does, or are left out with `mask_co_positives`. A class that stands twice in a row counts
once in denominators. CosFace (Wang et al. 2018); Partial FC (An et al. 2021).

Shape legend: B rows, L labels.
"""

import torch

from .sharded_softmax import filtered


def margin_losses(
    positive_cosines: torch.Tensor,
    labels: torch.Tensor,
    negative_lse: torch.Tensor,
    scale: float,
    margin: float,
    filter_threshold: float,
    mask_co_positives: bool = False,
) -> torch.Tensor:
    """Loss of every (row, label), fp32 [B, L]; 0 where the label is -1.

    positive_cosines [B, L]; labels int64 [B, L]; negative_lse [B] over all classes that are no
    label of the row.
    """
    valid = labels >= 0
    target = scale * (positive_cosines - margin)
    logits = scale * filtered(positive_cosines, filter_threshold)
    same = labels[:, :, None] == labels[:, None, :]  # [B, l, k]
    earlier = same.tril(diagonal=-1).any(dim=-1)  # this class stood in the row before
    counts = ~same & (valid & ~earlier)[:, None, :]
    if mask_co_positives:
        counts = torch.zeros_like(counts)
    others = logits[:, None, :].expand_as(counts).masked_fill(~counts, -torch.inf)
    parts = torch.cat(
        [others, negative_lse[:, None, None].expand(-1, labels.shape[1], 1), target[..., None]],
        dim=-1,
    )
    losses = parts.logsumexp(dim=-1) - target
    return torch.where(valid, losses, torch.zeros_like(losses))
