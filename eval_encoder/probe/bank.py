"""Heads on frozen features, many of them in one pass.

An attentive head is one learned query over the tokens of a clip (attention pooling, MLP), a
LayerNorm and a linear classifier. Its query is the same for every clip, so keys and values need not
be computed for every token. With the head's query q, and a token x,

    score    q . (W_k x + b_k)           = (W_k^T q) . x + const        const cancels in the softmax
    pooled   sum_i a_i (W_v x_i + b_v)   = W_v (sum_i a_i x_i) + b_v    the weights a_i sum to one

which is the same function with 4 L C A instead of 4 L C C multiplications and additions (A
attention heads, 64 channels each). The queries of all heads of the bank are rows of one matrix, so
a bank reads the tokens twice, however many heads it has.

Shape legend: N clips, L longest clip's tokens, C width, B heads of the bank, A attention heads of
each.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from model_factory.layers import AttentionPoolingHead

HEAD_WIDTH = 64  # channels of an attention head, as in ViT-B and ViT-L


@dataclass(frozen=True)
class HeadSetting:
    """What the heads of a bank differ in."""

    lr: float
    weight_decay: float
    seed: int


class AttentiveClassifier(nn.Module):
    """Attention pooling (MLP 4C, RMSNorm), LayerNorm, Linear."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        num_heads = max(1, width // HEAD_WIDTH)
        if width % num_heads:
            raise ValueError(
                f"attentive heads cannot divide a width of {width} by {num_heads}: --head linear"
            )
        self.pool = AttentionPoolingHead(
            width, hidden=4 * width, num_heads=num_heads, norm_eps=1e-6
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pool.attention.in_proj_weight, std=0.02)
        # The classifier starts almost at zero, so that all classes start out equally likely.
        with torch.no_grad():
            self.classifier.weight.mul_(1e-3)

    def forward(
        self, tokens: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        """Logits [N, classes] of the tokens [S, C] of a pack. This is the definition; a bank
        computes the same function by `queries` and `classify`."""
        return self.classifier(self.norm(self.pool(tokens, cu_seqlens, max_seqlen)))

    def queries(self) -> torch.Tensor:
        """Rows [A, C] whose products with the tokens are the attention scores."""
        attention = self.pool.attention
        keys, _ = self._keys_values()
        width = attention.in_proj_weight.shape[1]
        weight = attention.in_proj_weight[:width]
        bias = attention.in_proj_bias[:width]
        query = F.linear(self.pool.probe[0, 0], weight, bias)
        query = query.view(attention.num_heads, 1, -1)  # [A, 1, d]
        rows = (query @ keys).squeeze(1)
        # the scale of attention is part of the rows, so that products are scores
        return rows / query.shape[-1] ** 0.5

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        """Logits [N, classes] of tokens that were pooled by the head's queries, [N, A, C]."""
        attention = self.pool.attention
        _, values = self._keys_values()
        mixed = torch.einsum("nac,adc->nad", pooled, values).flatten(1)
        # in_proj_bias has three parts, of queries, keys and values; that of the keys cancels
        value_bias = attention.in_proj_bias[2 * pooled.shape[-1] :]
        mixed = attention.out_proj(mixed + value_bias)
        mixed = mixed + self.pool.mlp(self.pool.norm(mixed))
        return self.classifier(self.norm(mixed))

    def _keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [A, d, C] of keys and of values."""
        attention = self.pool.attention
        width = attention.in_proj_weight.shape[1]
        per_head = (attention.num_heads, -1)
        keys, values = attention.in_proj_weight[width:].split(width)
        return keys.unflatten(0, per_head), values.unflatten(0, per_head)


class LinearClassifier(nn.Module):
    """LayerNorm without weights, so that no scale of the features is favoured, and Linear."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.classifier = nn.Linear(width, num_classes)
        # as small as the classifier of attentive heads, 0.02 * 1e-3
        nn.init.trunc_normal_(self.classifier.weight, std=2e-5)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, C] -> logits [N, classes]."""
        return self.classifier(self.norm(features))


class HeadBank(nn.Module):
    """One head per setting; heads of one seed start alike."""

    def __init__(
        self, kind: str, width: int, num_classes: int, settings: list[HeadSetting]
    ) -> None:
        """kind: attentive or linear."""
        super().__init__()
        self.settings = settings
        self.heads = nn.ModuleList()
        self._is_attentive = kind == "attentive"
        for setting in settings:
            # set anew for each head: a head does not depend on those before it
            torch.manual_seed(setting.seed)
            head = AttentiveClassifier if self._is_attentive else LinearClassifier
            self.heads.append(head(width, num_classes))

    def forward(
        self, features: list[torch.Tensor], numbers: list[int] | None = None
    ) -> torch.Tensor:
        """Features [L_i, C] of N clips -> logits [B, N, classes] of all heads, or of those with the
        given numbers in their order."""
        chosen = list(self.heads)
        if numbers is not None:
            chosen = [self.heads[number] for number in numbers]
        if not self._is_attentive:
            rows = torch.cat(features)
            return torch.stack([head(rows) for head in chosen])
        # a ModuleList knows of no class but Module
        heads = [cast(AttentiveClassifier, head) for head in chosen]
        queries = [head.queries() for head in heads]
        pooled = pool_by_queries(features, torch.cat(queries))
        parts = pooled.split([len(rows) for rows in queries], dim=1)
        pairs = zip(heads, parts, strict=True)
        return torch.stack([head.classify(part) for head, part in pairs])


def pool_by_queries(features: list[torch.Tensor], queries: torch.Tensor) -> torch.Tensor:
    """Softmax-weighted means [N, Q, C] of every clip's tokens [L_i, C], by query rows [Q, C]."""
    lengths = torch.tensor([len(tokens) for tokens in features], device=queries.device)
    tokens = nn.utils.rnn.pad_sequence(features, batch_first=True)
    scores = tokens @ queries.T  # [N, L, Q]
    if int(lengths.min()) < tokens.shape[1]:
        is_padding = torch.arange(tokens.shape[1], device=queries.device) >= lengths[:, None]
        scores = scores.masked_fill(is_padding[..., None], -torch.inf)
    weights = scores.softmax(dim=1)  # over the tokens of a clip
    return weights.transpose(1, 2) @ tokens
