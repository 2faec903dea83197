"""The attentive head: one learned query over the frozen tokens of a clip, then a linear classifier.

A bank of heads, one per hyper-parameter setting, trains on the same tokens in one pass.

Shape legend: S packed tokens, N clips, C encoder width, H heads of the bank.
"""

import torch
from torch import nn

from model_factory.layers import AttentionPoolingHead

HEAD_WIDTH = 64


class AttentiveClassifier(nn.Module):
    """Attention pooling (MLP 4C, RMSNorm), LayerNorm, Linear;
    the classifier starts almost at zero.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.pool = AttentionPoolingHead(
            width, 4 * width, max(1, width // HEAD_WIDTH), norm_eps=1e-6
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pool.attention.in_proj_weight, std=0.02)
        with torch.no_grad():
            self.classifier.weight.mul_(1e-3)

    def forward(
        self, tokens: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        """tokens [S, C] of a pack -> logits [N, classes]."""
        return self.classifier(self.norm(self.pool(tokens, cu_seqlens, max_seqlen)))


class HeadBank(nn.Module):
    """One classifier per learning rate, seeded alike."""

    def __init__(self, width: int, num_classes: int, count: int, seed: int):
        super().__init__()
        heads = []
        for _ in range(count):
            torch.manual_seed(seed)
            heads.append(AttentiveClassifier(width, num_classes))
        self.heads = nn.ModuleList(heads)

    def forward(self, tokens, cu_seqlens, max_seqlen) -> torch.Tensor:
        """Logits [H, N, classes]."""
        return torch.stack([head(tokens, cu_seqlens, max_seqlen) for head in self.heads])
