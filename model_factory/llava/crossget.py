"""CrossGET: a vision tower whose layers merge redundant tokens, with learned cross tokens.

    the input of the first layer, then a cross token behind all others
    every layer: cross token <- stop_gradient(cross token) + C[layer]
                 attention with log sizes, residual
                 reduction (token_reduction.py); class and cross token are protected
                 MLP, residual

The published tower is CLIP's, where the cross token starts as a copy of the class token. Our packed
encoder has no class token: there it starts as the mean of an item's tokens, at position (0, 0, 0),
and items of one length are reduced together; a merged token keeps its destination's position.

C starts at zero. The cross token is a key for the other tokens too, so even without reduction it
changes them, as published; with `mask_cross_token` no other token attends to it, and C = 0 with
r = 0 is exactly the plain tower. Importance needs attention probabilities, so attention is computed
in full: [B, H, T, T] per layer.

Shape legend: B images or items of one length, T tokens, D width, H heads, L layers.
"""

import math
from collections.abc import Iterable
from typing import Any

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
    """Learned tokens that start at zero. They are a module, as DeepSpeed gathers partitioned
    parameters when a module is called."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self) -> torch.Tensor:
        """A copy of the tokens [*shape]."""
        return self.weight.clone()


class CrossGetTower(VisionTower):
    """Wraps a PackedTower, or a PictureTower of CLIP's; its weights are frozen, `cross_tokens`
    [1, L, D] are not."""

    def __init__(self, tower: VisionTower, config: ReductionConfig, mask_cross_token: bool = False):
        """Raises ValueError for another kind of tower."""
        super().__init__(tower.model.requires_grad_(False), tower.width)
        is_clip = isinstance(tower, PictureTower) and tower.model.config.model_type in CLIP_TYPES
        if not is_clip and not isinstance(tower, PackedTower):
            raise ValueError(
                f"tokens of a {type(tower.model).__name__} cannot be reduced: take a CLIP tower or "
                "an encoder of ours"
            )
        self._tower = [tower]  # in a list, so that its weights are not registered twice
        self.config = config
        self.mask_cross_token = mask_cross_token
        self.num_class_tokens = int(is_clip)
        self.cross_tokens = CrossTokens(1, self.num_layers, self.width)

    @property
    def blocks(self) -> nn.ModuleList:
        """Blocks of the tower."""
        return self._tower[0].blocks

    def grid_of(self, height: int, width: int) -> Grid:
        """Grid of an image in the tower."""
        return self._tower[0].grid_of(height, width)

    def tokens_of(self, grid: Grid | None, patches: int, layer: int = -1) -> int:
        """Tokens of an item at a hidden state, the cross token included."""
        extra = 1 + self.num_class_tokens
        left = tokens_left(
            patches + extra,
            config=self.config,
            layers=self.absolute(layer),
            protected=extra,
        )
        return left - self.num_class_tokens

    def forward(self, visuals: VisualInputs, layers: Iterable[int]) -> TowerStates:
        """States of the requested layers, and all cross tokens; with a graph, as cross tokens are
        trained."""
        if self.num_class_tokens:
            return self._images(visuals, list(layers))
        return self._pack(visuals, list(layers))

    def hidden_states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states [B, T_i, D] of images [B, 3, H, W], for CLIP: the input of the first layer,
        then every layer's output; class token first, cross token last."""
        inner = getattr(self.model, "vision_model", self.model)  # transformers 4 wraps it once more
        x = inner.pre_layrnorm(inner.embeddings(pixel_values))
        class_token = x[:, :1]  # the cross token starts as a copy of it
        return self._run(torch.cat([x, class_token], dim=1))[0]

    def _images(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        pixels = visuals.pixel_values
        if pixels is None:
            raise ValueError("a CLIP tower takes pictures, not packs: give clips as frames")
        states = self.hidden_states(pixels.to(self.model.dtype))
        return TowerStates(
            states={index: states[index] for index in layers},
            # tokens at the last layer that was asked for, cross token included: others have more
            lengths=[states[layers[-1]].shape[1] - 1] * len(pixels),
            grids=[None] * len(pixels),  # merged tokens fill no grid
            extra=1,
            cross=torch.stack([state[:, -1] for state in states[1:]]),
        )

    def _pack(self, visuals: VisualInputs, layers: list[int]) -> TowerStates:
        tower = self._tower[0]
        assert isinstance(tower, PackedTower)
        pack = tower.packed(visuals)
        assert pack.rows is not None and pack.positions is not None and pack.lengths is not None
        encoder = self.model.packing
        embedded = encoder.patch_embed(pack.rows.to(self.model.dtype))
        x = encoder.layernorm_pre(embedded)
        lengths = pack.lengths.tolist()
        tokens_of = x.split(lengths)
        positions_of = pack.positions.split(lengths)
        groups: dict[int, list[int]] = {}  # items by their length
        for item, length in enumerate(lengths):
            groups.setdefault(length, []).append(item)
        states_of: dict[int, list[torch.Tensor]] = {}
        cross_of: dict[int, torch.Tensor] = {}
        for items in groups.values():
            tokens = torch.stack([tokens_of[item] for item in items])
            mean = tokens.mean(dim=1, keepdim=True)
            tokens = torch.cat([tokens, mean], dim=1)
            positions = torch.stack([positions_of[item] for item in items])
            origin = positions.new_zeros(len(items), 1, 3)
            positions = torch.cat([positions, origin], dim=1)
            states, cross = self._run(tokens, positions)
            if self.model.config.post_norm and encoder.layernorm_post is not None:
                states[-1] = encoder.layernorm_post(states[-1])
            for row, item in enumerate(items):
                states_of[item] = [state[row] for state in states]
                cross_of[item] = cross[:, row]
        # groups are of one length each; the pack's own order is restored here
        in_order = [states_of[item] for item in range(len(lengths))]
        return TowerStates(
            states={index: torch.cat([s[index] for s in in_order]) for index in layers},
            lengths=[len(states[layers[-1]]) for states in in_order],
            grids=[None] * len(lengths),  # merged tokens fill no grid
            cross=torch.stack([cross_of[item] for item in range(len(lengths))], dim=1),
        )

    def _run(
        self, x: torch.Tensor, positions: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(hidden states, cross tokens [L, B, D]) of tokens [B, T, D], cross token last."""
        sizes = x.new_ones(len(x), x.shape[1], 1)
        states = [x]
        learned = self.cross_tokens()
        for number, layer in enumerate(self.blocks):
            previous = x[:, -1:].detach()
            cross = previous + learned[:, number : number + 1]
            others = x[:, :-1]
            x = torch.cat([others, cross], dim=1)
            x, sizes, positions = self._layer(
                layer, x, sizes=sizes, positions=positions, r=self.config.at(number)
            )
            states.append(x)
        after_layers = states[1:]  # the first state is the input of the first layer
        return states, torch.stack([state[:, -1] for state in after_layers])

    def _layer(
        self,
        layer: Any,  # a block of CLIP's or of ours
        x: torch.Tensor,
        sizes: torch.Tensor,
        positions: torch.Tensor | None,
        r: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens, sizes and positions after a block that merges r tokens between its halves."""
        q, k, v = self._queries_keys_values(
            layer.self_attn,
            normed=layer.layer_norm1(x),
            positions=positions,
        )
        scale = q.shape[-1] ** -0.5
        scores = q @ k.transpose(-1, -2) * scale
        logits = scores + log_sizes(sizes)
        if self.mask_cross_token:
            # the last key, for all queries but the last, in every item and head
            hidden = torch.zeros_like(logits[:1, :1], dtype=torch.bool)
            hidden[..., :-1, -1] = True
            logits = logits.masked_fill(hidden, -torch.inf)
        probabilities = logits.softmax(dim=-1)
        by_head = probabilities @ v
        mixed = by_head.transpose(1, 2).flatten(2)
        attention = layer.self_attn
        output = attention.out_proj if positions is None else attention.proj
        x = x + output(mixed)
        # the class token (of CLIP) comes first, the cross token last
        protected = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        protected[:, -1] = True
        protected[:, : self.num_class_tokens] = True
        merge = choose_merge(
            k.detach().mean(dim=1),
            importance=attention_importance(probabilities.detach()),
            r=r,
            protected=protected,
            config=self.config,
        )
        x, sizes = apply_merge(x, sizes=sizes, merge=merge, weights=self.config.weights)
        if positions is not None and merge is not None:
            index = merge.kept[..., None].expand(-1, -1, 3)
            positions = positions.gather(1, index)
        return x + layer.mlp(layer.layer_norm2(x)), sizes, positions

    def _queries_keys_values(
        self, attention: Any, normed: torch.Tensor, positions: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Queries, keys and values, each [B, H, T, d]; rotated where tokens have positions."""
        heads = attention.num_heads
        if positions is None:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            by_head = [project(normed).unflatten(-1, (heads, -1)) for project in projections]
            return [rows.transpose(1, 2) for rows in by_head]
        config = self.model.config
        # in rows as of a pack, which is the shape that apply_rope takes
        joined = attention.qkv(normed.flatten(0, 1))
        by_kind = joined.unflatten(-1, (3, heads, -1))
        q, k, v = by_kind.unbind(1)
        tables = rope_tables(
            positions.flatten(0, 1),
            head_dim=q.shape[-1],
            pairing=config.rope_pairing,
            theta=config.rope_theta,
            position_scale=config.rope_position_scale,
        )
        rotated = (apply_rope(q, tables), apply_rope(k, tables), v)
        batched = [rows.unflatten(0, (len(normed), -1)) for rows in rotated]
        return [rows.transpose(1, 2) for rows in batched]


def alignment_loss(
    image_tokens: torch.Tensor, text_tokens: torch.Tensor, direction: str = "published"
) -> torch.Tensor:
    """Divergence between two softmaxes over the width: of the tower's cross tokens [L_v, B, H],
    repeated to the language model's depth, and of the language model's own [L_t, B, H]; mean over
    layers and batch.

    P is the softmax of the tower's cross tokens, Q that of the language model's, M their mean:
    `published` averages KL(M || P) and KL(M || Q),
    `jensen_shannon` KL(P || M) and KL(Q || M).
    """
    repeats = layer_repeats(len(image_tokens), len(text_tokens))
    image = image_tokens.repeat_interleave(repeats.to(image_tokens.device), dim=0)
    log_p = image.log_softmax(dim=-1)
    log_q = text_tokens.log_softmax(dim=-1)
    # log((P + Q) / 2) without leaving log space, where small probabilities do not underflow
    both = torch.stack([log_p, log_q])
    log_m = both.logsumexp(dim=0) - math.log(2)
    if direction == "published":
        # the two divergences share their weights M
        divergence = log_m.exp() * (2 * log_m - log_p - log_q)
    elif direction == "jensen_shannon":
        from_p = log_p.exp() * (log_p - log_m)
        from_q = log_q.exp() * (log_q - log_m)
        divergence = from_p + from_q
    else:
        raise ValueError(f"direction is {direction!r}; choose published or jensen_shannon")
    return divergence.sum(dim=-1).mean() / 2


def layer_repeats(vision_layers: int, text_layers: int) -> torch.Tensor:
    """Number of text layers that each vision layer is aligned with, int64 [L_v] of sum L_t."""
    # rounded edges spread a remainder evenly: 24 layers on 32 repeat 1, 1, 2 times in turn
    edges = torch.arange(vision_layers + 1) * text_layers // vision_layers
    return edges.diff()
