"""A vision tower whose layers merge redundant tokens, with learned cross tokens.

    what enters the first layer, then a cross token behind all others
    every layer: cross token <- stop_gradient(cross token) + C[layer]
                 attention with log sizes, residual
                 reduction (token_reduction.py); class and cross token are protected
                 MLP, residual

The published tower is CLIP's, where the cross token starts as a copy of the class token. Our packed
encoder has no class token: there it starts as the mean of an item's tokens, at position (0, 0, 0),
and items of one length are reduced together; a merged token keeps its destination's position.

C starts at zero. The cross token is a key for the other tokens too, so even without reduction it
changes them, as published; with `mask_cross_token` nobody but itself sees it, and C = 0 with r = 0
is exactly the plain tower. Attention probabilities are needed, so attention is computed in full:
[B, H, T, T] per layer.

Shape legend: B pictures or items of one length, T tokens, D width, H heads, L layers.
"""

import math
from collections import defaultdict

import torch
from torch import nn

from ..rope import apply_rope, rope_tables
from .token_reduction import (
    ReductionConfig,
    apply_merge,
    attention_importance,
    choose_merge,
    log_sizes,
    tokens_left,
)
from .towers import Grid, PackedTower, PictureTower, TowerStates, VisionTower, VisualInputs

CLIP_TYPES = ("clip_vision_model", "clip")


class CrossTokens(nn.Module):
    """Learned tokens that start at zero; a module of their own, so that DeepSpeed knows when their
    values are needed."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self) -> torch.Tensor:
        """The tokens [*shape]."""
        return self.weight.clone()


class CrossGetTower(VisionTower):
    """Wraps a PackedTower, or a PictureTower of CLIP's; its weights are frozen, `cross_tokens`
    [1, L, D] are not."""

    def __init__(self, tower: VisionTower, config: ReductionConfig, mask_cross_token: bool = False):
        """Raises ValueError for another kind of tower."""
        super().__init__(tower.model.requires_grad_(False), tower.width)
        clip = isinstance(tower, PictureTower) and tower.model.config.model_type in CLIP_TYPES
        if not clip and not isinstance(tower, PackedTower):
            raise ValueError(
                f"tokens of a {type(tower.model).__name__} cannot be reduced: take a CLIP tower or "
                "an encoder of ours"
            )
        self._tower = [tower]  # in a list: its weights are `model`'s
        self.config, self.mask_cross_token = config, mask_cross_token
        self.num_class_tokens = int(clip)
        self.cross_tokens = CrossTokens(1, self.num_layers, self.width)

    @property
    def blocks(self) -> nn.ModuleList:
        """Of the tower."""
        return self._tower[0].blocks

    def patches_of(self, height: int, width: int) -> Grid:
        """Of the tower."""
        return self._tower[0].patches_of(height, width)

    def tokens_of(self, grid: Grid | None, patches: int, layer: int = -1) -> int:
        """Tokens of an item at a hidden state, the cross token among them."""
        extra = 1 + self.num_class_tokens
        left = tokens_left(patches + extra, self.config, self.absolute(layer), extra)
        return left - self.num_class_tokens

    def forward(self, visuals: VisualInputs, layers) -> TowerStates:
        """States of the asked layers, and all cross tokens; with a graph, as cross tokens learn."""
        states = self._pictures if self.num_class_tokens else self._pack
        return states(visuals, list(layers))

    def hidden_states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states [B, T_i, D] of pictures [B, 3, H, W], for CLIP: what enters the first
        layer, then every layer's output; class token first, cross token last."""
        inner = getattr(self.model, "vision_model", self.model)  # transformers 4 wraps it once more
        x = inner.pre_layrnorm(inner.embeddings(pixel_values))
        return self._run(torch.cat([x, x[:, :1]], dim=1))[0]

    def _pictures(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        pixels = visuals.pixel_values
        if pixels is None:
            raise ValueError("a CLIP tower takes pictures, not packs: give clips as frames")
        states = self.hidden_states(pixels.to(self.model.dtype))
        cross = torch.stack([state[:, -1] for state in states[1:]])
        kept = {index: states[index] for index in layers}
        count = states[layers[-1]].shape[1] - 1
        return TowerStates(kept, [count] * len(pixels), [None] * len(pixels), 1, None, cross)

    def _pack(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        pack = self._tower[0].packed(visuals)
        encoder = self.model.packing
        x = encoder.layernorm_pre(encoder.patch_embed(pack.rows.to(self.model.dtype)))
        lengths = pack.lengths.tolist()
        items, places = x.split(lengths), pack.positions.split(lengths)
        groups = defaultdict(list)
        for number, length in enumerate(lengths):
            groups[length].append(number)
        found: dict[int, tuple] = {}
        for members in groups.values():
            tokens = torch.stack([items[i] for i in members])
            tokens = torch.cat([tokens, tokens.mean(dim=1, keepdim=True)], dim=1)
            where = torch.stack([places[i] for i in members])
            where = torch.cat([where, where.new_zeros(len(members), 1, 3)], dim=1)
            states, crosses = self._run(tokens, where)
            if self.model.config.post_norm and encoder.layernorm_post is not None:
                states[-1] = encoder.layernorm_post(states[-1])
            for row, number in enumerate(members):
                found[number] = ([state[row] for state in states], crosses[:, row])
        ordered = [found[number] for number in range(len(lengths))]
        kept = {index: torch.cat([states[index] for states, _ in ordered]) for index in layers}
        counts = [len(states[layers[-1]]) for states, _ in ordered]
        cross = torch.stack([cross for _, cross in ordered], dim=1)
        return TowerStates(kept, counts, [None] * len(counts), 0, None, cross)

    def _run(self, x: torch.Tensor, positions: torch.Tensor | None = None):
        """(states, cross tokens [L, B, D]) of tokens [B, T, D], cross token last."""
        sizes, states, crosses = x.new_ones(*x.shape[:2], 1), [x], []
        learned = self.cross_tokens()
        for number, layer in enumerate(self.blocks):
            cross = x[:, -1:].detach() + learned[:, number : number + 1]
            x = torch.cat([x[:, :-1], cross], dim=1)
            x, sizes, positions = self._layer(layer, x, sizes, positions, self.config.at(number))
            states.append(x)
            crosses.append(x[:, -1])
        return states, torch.stack(crosses)

    def _layer(self, layer, x: torch.Tensor, sizes: torch.Tensor, positions, r: int):
        q, k, v = self._queries_keys_values(layer, layer.layer_norm1(x), positions)
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + log_sizes(sizes)
        if self.mask_cross_token:
            hidden = torch.zeros_like(logits[:1, :1], dtype=torch.bool)
            hidden[..., :-1, -1] = True
            logits = logits.masked_fill(hidden, -torch.inf)
        probabilities = logits.softmax(dim=-1)
        mixed = (probabilities @ v).transpose(1, 2).flatten(2)
        attention = layer.self_attn
        x = x + (attention.out_proj if positions is None else attention.proj)(mixed)
        protected = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        protected[:, -1] = True
        protected[:, : self.num_class_tokens] = True
        importance = attention_importance(probabilities.detach())
        merge = choose_merge(k.detach().mean(dim=1), importance, r, protected, self.config)
        x, sizes = apply_merge(x, sizes, merge, self.config.weights)
        if positions is not None and merge is not None:
            positions = positions.gather(1, merge.kept[..., None].expand(-1, -1, 3))
        return x + layer.mlp(layer.layer_norm2(x)), sizes, positions

    def _queries_keys_values(self, layer, normed: torch.Tensor, positions):
        """Each [B, H, T, d]; rotated where tokens have positions."""
        attention = layer.self_attn
        heads = attention.num_heads
        if positions is None:
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            return (part(normed).unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        batch, config = len(normed), self.model.config
        q, k, v = attention.qkv(normed.flatten(0, 1)).unflatten(-1, (3, heads, -1)).unbind(1)
        tables = rope_tables(
            positions.flatten(0, 1),
            q.shape[-1],
            config.rope_pairing,
            config.rope_theta,
            config.rope_position_scale,
        )
        q, k = apply_rope(q, tables), apply_rope(k, tables)
        return (part.unflatten(0, (batch, -1)).transpose(1, 2) for part in (q, k, v))


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
