"""Cosine margin loss for several labels per row: a pure function of positive cosines and the
negatives' log-sum.

For row i and label l with cosine c_l, scale s, margin m and filter f:

    loss_il = -log( e^{s (c_l - m)} / ( e^{s (c_l - m)} + sum_{other labels k} e^{s f(c_k)} +
    e^{lse_i} ) )

Every label has a softmax of its own. The other labels of the row are in its denominator, as in the
public training, or are left out with `mask_co_positives`. A class that is a label of the row twice
counts once in denominators. CosFace (Wang et al. 2018); Partial FC (An et al. 2021).

Shape legend: B rows, L labels.
"""

import torch
import torch.nn.functional as F

from .sharded_softmax import filtered

NOTHING = -1e30  # logarithm of an empty sum: finite, so that its gradient is zero and not NaN


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
    # a row's labels are non-targets in each other's softmax, so the filter applies to them
    logits = scale * filtered(positive_cosines, filter_threshold)
    same = labels[:, :, None] == labels[:, None, :]  # [B, l, k]
    earlier = same.tril(diagonal=-1).any(dim=-1)  # the same class is an earlier label of the row
    counts = ~same & (valid & ~earlier)[:, None, :]
    if mask_co_positives:
        counts = torch.zeros_like(counts)
    others = logits[:, None, :].expand_as(counts)
    others = others.masked_fill(~counts, NOTHING)
    # all negatives together are one more rival of each label, the same for all of a row
    negatives = negative_lse.clamp(min=NOTHING)  # -inf where there are none
    num_labels = labels.shape[1]
    negatives = negatives[:, None, None].expand(-1, num_labels, 1)
    logits_of_rivals = torch.cat([others, negatives], dim=-1)
    rivals = logits_of_rivals.logsumexp(dim=-1)
    # = logsumexp(rivals, target) - target, which would cancel the digits of a small loss
    losses = F.softplus(rivals - target)
    return torch.where(valid, losses, torch.zeros_like(losses))
