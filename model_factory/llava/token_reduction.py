"""Token merging between the two halves of a transformer block: redundant tokens merge into similar
ones.

    rule complete_graph   CrossGET: any free token may merge into any other. A token's score is its
                          best match among the less redundant tokens; the r least important tokens
                          of a high score are the sources, and each merges into its most similar
                          token that is no source
    rule bipartite        ToMe: every second token may merge into one of the others

    weights size          ToMe: means weighted with sizes
    weights guided        CrossGET as published: the more important of a pair counts more; where
                          sizes differ, a constant input does not stay constant
    weights guided_normalised    the same, divided by the sum of its weights

Nothing here depends on a tower: tokens, keys and importances come in, fewer tokens and their sizes
go out. No gradient flows through the choice. Cost: one product of all keys, [B, T, T].

Shape legend: B batch, T tokens, T' remaining, R merged, C width, H heads, d head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

RULES = ("complete_graph", "bipartite")
WEIGHTS = ("size", "guided", "guided_normalised")


@dataclass(frozen=True)
class ReductionConfig:
    """Which tokens merge. `r`: tokens that each layer removes, one number or one per layer."""

    r: int | tuple[int, ...] = 13  # of the crossget recipe, docs/llava.md
    rule: str = "complete_graph"
    weights: str = "guided_normalised"

    def __post_init__(self) -> None:
        for name, choices in (("rule", RULES), ("weights", WEIGHTS)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")

    def at(self, layer: int) -> int:
        """r of a layer; 0 for layers beyond the list."""
        if isinstance(self.r, int):
            return self.r
        return self.r[layer] if layer < len(self.r) else 0


@dataclass(frozen=True)
class Merge:
    """Which tokens merge, as int64 indices into the input tokens.

    source       [B, R] ascending
    destination  [B, R] into which each source merges
    kept         [B, T'] ascending, the tokens that remain
    share        [B, R, 2] weights of source and destination in their pair; they sum to one
    """

    source: torch.Tensor
    destination: torch.Tensor
    kept: torch.Tensor
    share: torch.Tensor


def log_sizes(sizes: torch.Tensor) -> torch.Tensor:
    """Addition [B, 1, 1, T] to attention logits by which a merged token of sizes [B, T, 1] counts
    as many times as it has tokens."""
    return sizes.log().squeeze(-1)[:, None, None]


def attention_importance(attention: torch.Tensor) -> torch.Tensor:
    """Importance [B, T] of tokens by attention probabilities [B, H, T, T]: the mean attention that
    a token receives from all tokens but the last, plus that from the last one, the cross token."""
    mean = attention.mean(dim=1)  # [B, T, T]: a row is what one token attends to
    return mean[:, :-1].mean(dim=1) + mean[:, -1]


def query_importance(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Importance [B, T] as the cosine of full-width keys [B, T, C] and one query [B, C]."""
    unit_keys = F.normalize(keys, dim=-1)
    unit_query = F.normalize(query, dim=-1)
    return (unit_keys @ unit_query[..., None]).squeeze(-1)


@torch.no_grad()
def choose_merge(
    keys: torch.Tensor,
    importance: torch.Tensor,
    r: int,
    protected: torch.Tensor,
    config: ReductionConfig,
) -> Merge | None:
    """The merge of `r` tokens of each row, or None where nothing can merge.

    keys       [B, T, d]    whose cosine is the similarity of tokens
    importance [B, T]
    protected  bool [B, T]  tokens that are neither merged nor merged into, as many in each row

    At most half of the free tokens merge. Of equal scores the lower index comes first.
    """
    num_protected = int(protected[0].sum())
    free = keys.shape[1] - num_protected
    count = min(r, free // 2)
    if count <= 0:
        return None
    unit = F.normalize(keys, dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    similarity = (similarity + similarity.transpose(1, 2)) / 2  # bitwise symmetric: ties are ties
    is_self = torch.eye(keys.shape[1], dtype=torch.bool, device=keys.device)
    # -inf is no token's maximum, so that protected tokens neither merge nor are merged into
    touches_protected = protected[:, :, None] | protected[:, None, :]
    blocked = touches_protected | is_self
    similarity = similarity.masked_fill(blocked, -torch.inf)
    if config.rule == "bipartite":
        source, candidates = _bipartite(similarity, count)
    else:
        source, candidates = _complete_graph(similarity, importance=importance, count=count)
    source = source.sort(dim=1).values
    num_tokens = similarity.shape[-1]
    every_column = source[..., None].expand(-1, -1, num_tokens)
    rows = similarity.gather(1, every_column)
    allowed = rows.masked_fill(~candidates[:, None], -torch.inf)
    destination = allowed.argmax(dim=-1)
    remains = torch.ones_like(protected).scatter(1, source, False)
    columns = remains.nonzero()[:, 1]
    kept = columns.view(len(remains), -1)  # as many in each row
    of_source = importance.gather(1, source)
    of_destination = importance.gather(1, destination)
    pair = torch.stack([of_source, of_destination], dim=-1)
    if config.weights == "size":
        # a half makes the weights of apply_merge the sizes alone
        share = torch.full_like(pair, 0.5)
    else:
        share = pair.softmax(dim=-1)
    return Merge(source=source, destination=destination, kept=kept, share=share)


def apply_merge(
    tokens: torch.Tensor, sizes: torch.Tensor, merge: Merge | None, weights: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens [B, T', C], sizes [B, T', 1]) after a merge of tokens [B, T, C]. The sum of the sizes
    stays.

    A destination becomes [s_d x_d + sum of (2 w s_a x_a + (2 v - 1) s_d x_d)] / (s_d + sum of s_a)
    over its sources a with shares w, v; normalised weights divide by the sum of the weights.
    """
    if merge is None:
        return tokens, sizes
    width = tokens.shape[-1]
    source = merge.source[..., None]
    destination = merge.destination[..., None]
    merged = sizes.gather(1, source)
    receiving = sizes.gather(1, destination)
    source_weight = 2 * merge.share[..., :1] * merged
    # `total` starts with the destination at its size, so each source adds the rest of its weight
    own_weight = (2 * merge.share[..., 1:] - 1) * receiving
    source_index = source.expand(-1, -1, width)
    destination_index = destination.expand(-1, -1, width)
    added = source_weight * tokens.gather(1, source_index)
    added = added + own_weight * tokens.gather(1, destination_index)
    total = (sizes * tokens).scatter_add(1, destination_index, added)
    new_sizes = sizes.scatter_add(1, destination, merged)
    divisor = new_sizes
    if weights == "guided_normalised":
        divisor = sizes.scatter_add(1, destination, source_weight + own_weight)
    kept = merge.kept[..., None]
    mean = total / divisor
    mixed = mean.gather(1, kept.expand(-1, -1, width))
    return mixed, new_sizes.gather(1, kept)


def tokens_left(tokens: int, config: ReductionConfig, layers: int, protected: int = 2) -> int:
    """Tokens that remain of `tokens` after a number of layers."""
    for layer in range(layers):
        half_of_free = (tokens - protected) // 2
        tokens -= max(0, min(config.at(layer), half_of_free))
    return tokens


def _complete_graph(
    similarity: torch.Tensor, importance: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sources [B, R], possible destinations bool [B, T]). Sources are the tokens with the smallest
    importance - match, where match is the similarity to the most similar less redundant token."""
    best = similarity.max(dim=-1).values
    # stable sorts, as ties would otherwise depend on the device
    order = best.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # 0 is the most redundant token
    behind = rank[:, None, :] > rank[:, :, None]
    less_redundant = similarity.masked_fill(~behind, -torch.inf)
    # the token of the last rank has no match (-inf), and is the last that can become a source
    match = less_redundant.max(dim=-1).values
    by_score = (importance - match).argsort(dim=1, stable=True)
    source = by_score[:, :count]
    candidates = torch.ones_like(rank, dtype=torch.bool).scatter_(1, source, False)
    return source, candidates


def _bipartite(similarity: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sources [B, R], possible destinations bool [B, T]). Sources are the tokens of even index
    that are most similar to one of odd index."""
    index = torch.arange(similarity.shape[1], device=similarity.device)
    odd = (index % 2 == 1).expand(len(similarity), -1)
    to_odd = similarity.masked_fill(~odd[:, None], -torch.inf)
    best = to_odd.max(dim=-1).values
    best = best.masked_fill(odd, -torch.inf)
    by_similarity = best.argsort(dim=1, descending=True, stable=True)
    return by_similarity[:, :count], odd
