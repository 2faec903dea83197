"""Fewer tokens between two halves of a transformer block: redundant ones merge into their likes.

    rule complete_graph   CrossGET: any free token may merge into any other; tokens are ordered by
                          their best match, and a token may only choose among those behind it, so no
                          two choose each other
    rule bipartite        ToMe: every second token may merge into one of the others

    weights size          ToMe: means weighted with sizes
    weights guided        CrossGET as published: the more important of a pair counts more; where
                          sizes differ, a constant input does not stay constant
    weights guided_normalised    the same, divided by the sum of its weights

Nothing here knows of a tower: tokens, keys and importances come in, fewer tokens and their sizes go
out. No gradient flows through the choice. Cost: one product of all keys, [B, T, T].

Shape legend: B batch, T tokens, T' kept, R merged, C width, H heads, d head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

RULES = ("complete_graph", "bipartite")
WEIGHTS = ("size", "guided", "guided_normalised")


@dataclass(frozen=True)
class ReductionConfig:
    """`r`: tokens to take away at every layer, one number or one per layer."""

    r: int | tuple[int, ...] = 13
    rule: str = "complete_graph"
    weights: str = "guided_normalised"

    def __post_init__(self):
        for name, known in (("rule", RULES), ("weights", WEIGHTS)):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")

    def at(self, layer: int) -> int:
        """r of a layer; layers beyond the list take nothing away."""
        if isinstance(self.r, int):
            return self.r
        return self.r[layer] if layer < len(self.r) else 0


@dataclass(frozen=True)
class Merge:
    """Which tokens merge: `source` [B, R] ascending and `destination` [B, R] where each goes;
    `kept` [B, T'] ascending, all int64 places in the input; `share` [B, R, 2] of source and
    destination in their pair, summing to one."""

    source: torch.Tensor
    destination: torch.Tensor
    kept: torch.Tensor
    share: torch.Tensor


def log_sizes(sizes: torch.Tensor) -> torch.Tensor:
    """What attention logits gain per key so that a merged token counts as often as it stands for:
    sizes [B, T, 1] -> [B, 1, 1, T]."""
    return sizes.log().squeeze(-1)[:, None, None]


def attention_importance(attention: torch.Tensor) -> torch.Tensor:
    """Importance [B, T] from probabilities [B, H, T, T]: the mean attention that a token is given
    by all tokens but the last, plus what the last one, the cross token, gives it."""
    mean = attention.mean(dim=1)
    return mean[:, :-1].mean(dim=1) + mean[:, -1]


def query_importance(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Importance [B, T] as the cosine of full-width keys [B, T, C] and one query [B, C]."""
    return (F.normalize(keys, dim=-1) @ F.normalize(query, dim=-1)[..., None]).squeeze(-1)


@torch.no_grad()
def choose_merge(
    keys: torch.Tensor,
    importance: torch.Tensor,
    r: int,
    protected: torch.Tensor,
    config: ReductionConfig,
) -> Merge | None:
    """What to merge, or None where nothing can be.

    keys       [B, T, d]    what similarity is the cosine of
    importance [B, T]
    protected  bool [B, T]  tokens that are neither merged nor merged into, as many in each row

    At most half of the free tokens merge. Equal scores: the lower place comes first.
    """
    free = keys.shape[1] - int(protected[0].sum())
    count = min(r, free // 2)
    if count <= 0:
        return None
    unit = F.normalize(keys, dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    similarity = (similarity + similarity.transpose(1, 2)) / 2  # bitwise symmetric: ties are ties
    blocked = protected[:, :, None] | protected[:, None, :]
    blocked = blocked | torch.eye(keys.shape[1], dtype=torch.bool, device=keys.device)
    similarity = similarity.masked_fill(blocked, -torch.inf)
    choose = {"complete_graph": _complete_graph, "bipartite": _bipartite}[config.rule]
    source, candidates = choose(similarity, importance, count)
    source = source.sort(dim=1).values
    rows = similarity.gather(1, source[..., None].expand(-1, -1, similarity.shape[-1]))
    destination = rows.masked_fill(~candidates[:, None], -torch.inf).argmax(dim=-1)
    stays = torch.ones_like(protected).scatter(1, source, False)
    kept = stays.nonzero()[:, 1].view(len(stays), -1)
    pair = torch.stack([importance.gather(1, source), importance.gather(1, destination)], dim=-1)
    share = torch.full_like(pair, 0.5) if config.weights == "size" else pair.softmax(dim=-1)
    return Merge(source, destination, kept, share)


def apply_merge(
    tokens: torch.Tensor, sizes: torch.Tensor, merge: Merge | None, weights: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [B, T', C], sizes [B, T', 1]) after a merge of tokens [B, T, C]; sums of sizes stay.

    A destination becomes [s_d x_d + sum of (2 w s_a x_a + (2 v - 1) s_d x_d)] / (s_d + sum of s_a)
    over its sources a with shares w, v; normalised weights divide by the sum of the weights.
    """
    if merge is None:
        return tokens, sizes
    width = tokens.shape[-1]
    source, destination = merge.source[..., None], merge.destination[..., None]
    merged = sizes.gather(1, source)
    receiving = sizes.gather(1, destination)
    source_weight = 2 * merge.share[..., :1] * merged
    own_weight = (2 * merge.share[..., 1:] - 1) * receiving
    added = source_weight * tokens.gather(1, source.expand(-1, -1, width))
    added = added + own_weight * tokens.gather(1, destination.expand(-1, -1, width))
    total = (sizes * tokens).scatter_add(1, destination.expand(-1, -1, width), added)
    new_sizes = sizes.scatter_add(1, destination, merged)
    divisor = new_sizes
    if weights == "guided_normalised":
        divisor = sizes.scatter_add(1, destination, source_weight + own_weight)
    kept = merge.kept[..., None]
    mixed = (total / divisor).gather(1, kept.expand(-1, -1, width))
    return mixed, new_sizes.gather(1, kept)


def tokens_left(tokens: int, config: ReductionConfig, layers: int, protected: int = 2) -> int:
    """Tokens after so many layers."""
    for layer in range(layers):
        tokens -= max(0, min(config.at(layer), (tokens - protected) // 2))
    return tokens


def _complete_graph(similarity, importance, count: int):
    """(sources [B, R], who may receive bool [B, T]): the least important tokens that have a like
    among those that are less redundant than they are."""
    best = similarity.max(dim=-1).values
    order = best.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order).contiguous()
    )
    behind = rank[:, None, :] > rank[:, :, None]
    match = similarity.masked_fill(~behind, -torch.inf).max(dim=-1).values
    source = (importance - match).argsort(dim=1, stable=True)[:, :count]
    return source, torch.ones_like(rank, dtype=torch.bool).scatter_(1, source, False)


def _bipartite(similarity, importance, count: int):
    """The tokens at even places that are most like one at an odd place."""
    odd = (torch.arange(similarity.shape[1], device=similarity.device) % 2 == 1).expand(
        len(similarity), -1
    )
    best = similarity.masked_fill(~odd[:, None], -torch.inf).max(dim=-1).values
    best = best.masked_fill(odd, -torch.inf)
    source = best.argsort(dim=1, descending=True, stable=True)[:, :count]
    return source, odd
