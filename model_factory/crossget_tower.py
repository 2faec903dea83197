"""A CLIP vision tower whose layers merge redundant tokens, with learned cross tokens.

    pre-norm, then a copy of the class token behind all others: the cross token
    every layer: cross token <- stop_gradient(cross token) + C[layer]
                 attention with log sizes, residual
                 reduction (token_reduction.py); class and cross token are protected
                 MLP, residual

C starts at zero. The cross token is a key for the other tokens too, so even without reduction the
class token counts twice, as published; with `mask_cross_token` nobody but itself sees it, and C = 0
with r = 0 is exactly the plain tower. Attention probabilities are needed, so attention is computed
in full: [B, H, T, T] per layer.

Shape legend: B pictures, T tokens, D width, H heads.
"""

import math

import torch
from torch import nn

from .token_reduction import (
    ReductionConfig,
    apply_merge,
    attention_importance,
    choose_merge,
    log_sizes,
)


class CrossGetTower(nn.Module):
    """Wraps a transformers CLIPVisionModel; its weights are frozen, `cross_tokens` [1, L, D] are
    not. Counts of tokens at every layer: token_reduction.tokens_left."""

    def __init__(self, model: nn.Module, config: ReductionConfig, mask_cross_token: bool = False):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.config, self.mask_cross_token = config, mask_cross_token
        inner = self._inner()
        layers, width = len(inner.encoder.layers), inner.config.hidden_size
        self.cross_tokens = nn.Parameter(torch.zeros(1, layers, width))

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states [B, T_i, D] of pictures [B, 3, H, W]: what enters the first layer, then
        every layer's output; class token first, cross token last."""
        inner = self._inner()
        x = inner.pre_layrnorm(inner.embeddings(pixel_values))
        x = torch.cat([x, x[:, :1]], dim=1)
        sizes = x.new_ones(*x.shape[:2], 1)
        states = [x]
        for number, layer in enumerate(inner.encoder.layers):
            cross = x[:, -1:].detach() + self.cross_tokens[:, number : number + 1]
            x = torch.cat([x[:, :-1], cross], dim=1)
            x, sizes = self._layer(layer, x, sizes, self.config.at(number))
            states.append(x)
        return states

    def features(self, pixel_values: torch.Tensor, select_layer: int = -2) -> torch.Tensor:
        """What a projector receives [B, T - 1, D]: a hidden state without its class token."""
        return self(pixel_values)[select_layer][:, 1:]

    def _layer(self, layer, x: torch.Tensor, sizes: torch.Tensor, r: int):
        attention = layer.self_attn
        heads = attention.num_heads
        normed = layer.layer_norm1(x)
        q, k, v = (
            part(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + log_sizes(sizes)
        if self.mask_cross_token:
            hidden = torch.zeros_like(logits[:1, :1], dtype=torch.bool)
            hidden[..., :-1, -1] = True
            logits = logits.masked_fill(hidden, -torch.inf)
        probabilities = logits.softmax(dim=-1)
        mixed = (probabilities @ v).transpose(1, 2).flatten(2)
        x = x + attention.out_proj(mixed)
        protected = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        protected[:, [0, -1]] = True
        importance = attention_importance(probabilities.detach())
        merge = choose_merge(k.detach().mean(dim=1), importance, r, protected, self.config)
        x, sizes = apply_merge(x, sizes, merge, self.config.weights)
        return x + layer.mlp(layer.layer_norm2(x)), sizes

    def _inner(self) -> nn.Module:
        """The transformer itself: transformers 4 wraps it once more than 5 does."""
        return getattr(self.model, "vision_model", self.model)


def alignment_loss(
    image_tokens: torch.Tensor, text_tokens: torch.Tensor, direction: str = "published"
) -> torch.Tensor:
    """How far the softmax over the width of cross tokens [L_v, B, H] of the tower, repeated to the
    language model's depth, is from that of its own [L_t, B, H]; mean over layers and batch.

    With M the mean of both distributions: `published` averages KL(M || P) and KL(M || Q),
    `jensen_shannon` KL(P || M) and KL(Q || M).
    """
    repeats = layer_repeats(len(image_tokens), len(text_tokens))
    image = image_tokens.repeat_interleave(repeats.to(image_tokens.device), dim=0)
    log_p, log_q = (tokens.log_softmax(dim=-1) for tokens in (image, text_tokens))
    log_m = torch.stack([log_p, log_q]).logsumexp(dim=0) - math.log(2)
    if direction == "published":
        divergence = log_m.exp() * (2 * log_m - log_p - log_q)
    elif direction == "jensen_shannon":
        divergence = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    else:
        raise ValueError(f"direction is {direction!r}; choose published or jensen_shannon")
    return divergence.sum(dim=-1).mean() / 2


def layer_repeats(vision_layers: int, text_layers: int) -> torch.Tensor:
    """How often each vision layer stands for a text layer, int64 [L_v], sum L_t."""
    edges = torch.arange(vision_layers + 1) * text_layers // vision_layers
    return edges.diff()
