"""Layers of the encoder, all on packed tokens: norm, MLP, attention, block, pooling head.

Nothing here knows how a pack was made; boundaries arrive as `cu_seqlens` and travel with the RoPE
tables in one `PackContext`, made once per forward. Parameter names are those of the packing key
layout.

Shape legend: S packed tokens, N items, D width, H heads, d head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .attention import varlen_attention
from .rope import RopeTables, apply_rope


@dataclass(frozen=True)
class PackContext:
    """What every layer of one forward shares: boundaries int32 [N+1], longest item, RoPE tables,
    kernel choice.

    `longest` is an empty host tensor [0, max_seqlen]. A compiler specialises a graph on every
    integer it meets but can take a tensor's size as a symbol, so this is how the number reaches a
    compiled block without a new graph for each value.
    """

    cu_seqlens: torch.Tensor
    longest: torch.Tensor
    rope: RopeTables
    backend: str | None = None

    @property
    def max_seqlen(self) -> int:
        """Longest item, a host integer."""
        return self.longest.shape[1]


def build_norm(norm_type: str, width: int, eps: float) -> nn.Module:
    """LayerNorm or RMSNorm over the last dimension; raises ValueError for another name."""
    if norm_type == "layer_norm":
        return nn.LayerNorm(width, eps=eps)
    if norm_type == "rms_norm":
        return nn.RMSNorm(width, eps=eps)
    raise ValueError(f"layer_norm_type is {norm_type!r}; choose layer_norm or rms_norm")


class PatchEmbed(nn.Module):
    """Linear map of patch rows [S, 3*p*p] to [S, D]; the weight has the shape of a Conv2d, as in
    the public key layout."""

    def __init__(self, patch_size: int, width: int, channels: int = 3):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight
        # stride and kernel are equal, and rows are flattened as the kernel is (channel, row,
        # column): the convolution is this one product
        return F.linear(patches.to(weight.dtype), weight.flatten(1))


class MLP(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PackedAttention(nn.Module):
    """Multi-head self-attention inside each item of the pack, rotary positions on queries and
    keys."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: PackContext) -> torch.Tensor:
        joined = self.qkv(x)
        by_kind = joined.unflatten(-1, (3, self.num_heads, -1))
        q, k, v = by_kind.unbind(1)  # each [S, H, d]
        q = apply_rope(q, context.rope)
        k = apply_rope(k, context.rope)
        mixed = varlen_attention(
            q,
            k,
            v,
            cu_seqlens=context.cu_seqlens,
            max_seqlen=context.max_seqlen,
            backend=context.backend,
        )
        return self.proj(mixed.flatten(1))


class EncoderLayer(nn.Module):
    """Pre-norm transformer block: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, width: int, hidden: int, num_heads: int, norm_type: str, eps: float):
        super().__init__()
        self.layer_norm1 = build_norm(norm_type, width=width, eps=eps)
        self.self_attn = PackedAttention(width, num_heads)
        self.layer_norm2 = build_norm(norm_type, width=width, eps=eps)
        self.mlp = MLP(width, hidden)

    def forward(self, x: torch.Tensor, context: PackContext) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), context)
        return x + self.mlp(self.layer_norm2(x))


class ProbeAttention(nn.Module):
    """One learned query over the tokens of each item. Parameter names are those of torch's
    MultiheadAttention.

    The query is the same for all items, so one varlen call with query length 1 pools the whole
    pack.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self,
        probe: torch.Tensor,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        backend: str | None = None,
    ) -> torch.Tensor:
        """probe [1, 1, D], tokens [S, D] -> [N, D]."""
        width = tokens.shape[-1]
        num_items = cu_seqlens.shape[0] - 1
        # rows of in_proj are queries, keys and values in this order, as in MultiheadAttention
        weight = self.in_proj_weight
        bias = self.in_proj_bias
        query = F.linear(probe[0], weight[:width], bias[:width])
        keys_values = F.linear(tokens, weight[width:], bias[width:])
        k, v = keys_values.unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        queries = query.expand(num_items, -1)
        q = queries.unflatten(-1, (self.num_heads, -1))
        one_each = torch.arange(num_items + 1, dtype=torch.int32, device=tokens.device)
        pooled = varlen_attention(
            q,
            k,
            v,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            cu_seqlens_q=one_each,
            max_seqlen_q=1,
            backend=backend,
        )
        return self.out_proj(pooled.flatten(1))


class AttentionPoolingHead(nn.Module):
    """Pooled vector of each item: y + MLP(RMSNorm(y)) with y = attention(probe, tokens). The probe
    itself is not added."""

    def __init__(self, width: int, hidden: int, num_heads: int, norm_eps: float | None):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        self.attention = ProbeAttention(width, num_heads)
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.mlp = MLP(width, hidden)

    def forward(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        backend: str | None = None,
    ) -> torch.Tensor:
        """tokens [S, D] -> [N, D]."""
        pooled = self.attention(
            self.probe, tokens, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, backend=backend
        )
        return pooled + self.mlp(self.norm(pooled))
