"""Token reduction: the published step to the last digit, and what must hold for every step."""

import pytest
import torch
from safetensors import safe_open

from model_factory.llava.token_reduction import (
    RULES,
    WEIGHTS,
    ReductionConfig,
    apply_merge,
    attention_importance,
    choose_merge,
    log_sizes,
    query_importance,
    tokens_left,
)

PUBLISHED = ReductionConfig(weights="guided")
STEPS = ("ones", "mixed", "sharp", "clustered", "clamped", "minimal", "too_short", "zero_r")
STEPS += ("double", "double_free", "retrieval_vision", "retrieval_text")


def case_of(shared, name):
    with safe_open(shared / "vectors" / "llava_crossget_step.safetensors", "pt") as file:
        names = [key for key in file.keys() if key.startswith(f"{name}.")]
        return {key.removeprefix(f"{name}."): file.get_tensor(key) for key in names}


def ends(batch, length):
    """CLS and cross token."""
    protected = torch.zeros(batch, length, dtype=torch.bool)
    protected[:, [0, -1]] = True
    return protected


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_published_one(shared, name):
    v = case_of(shared, name)
    tokens, sizes = v["tokens"].requires_grad_(), v["sizes"]
    protected = ends(*tokens.shape[:2])
    if name.startswith("retrieval"):
        keys, place = v["keys"], v.get("eot", torch.full((len(tokens),), tokens.shape[1] - 1))
        rows = torch.arange(len(tokens))
        protected[rows, place] = True
        importance = query_importance(keys, v["queries"][rows, place])
    else:
        keys, importance = v["keys"].mean(1), attention_importance(v["attention"])
    merge = choose_merge(keys, importance, int(v["r"]), protected, PUBLISHED)
    merged, new_sizes = apply_merge(tokens, sizes, merge, "guided")
    tolerance = 1e-12 if tokens.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(merged, v["merged"], rtol=0, atol=tolerance)
    torch.testing.assert_close(new_sizes, v["merged_sizes"], rtol=0, atol=0)
    if merge is None:
        assert "source" not in v
        return
    for key in ("source", "destination", "kept"):
        assert torch.equal(getattr(merge, key), v[key]), key
    torch.testing.assert_close(importance, v["importance"], rtol=0, atol=tolerance)
    torch.testing.assert_close(merge.share, v["pair_weights"], rtol=0, atol=tolerance)
    if "cotangent" in v:
        (merged * v["cotangent"]).sum().backward()
        torch.testing.assert_close(tokens.grad, v["grad_tokens"], rtol=0, atol=tolerance)


def random_step(length=23, batch=3, r=6, seed=0, rule="complete_graph", weights="guided"):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, length, 8, generator=g, dtype=torch.float64)
    keys = torch.randn(batch, length, 4, generator=g, dtype=torch.float64)
    sizes = torch.randint(1, 4, (batch, length, 1), generator=g).double()
    importance = torch.rand(batch, length, generator=g, dtype=torch.float64)
    config = ReductionConfig(rule=rule, weights=weights)
    merge = choose_merge(keys, importance, r, ends(batch, length), config)
    return tokens, sizes, keys, importance, config, merge


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_holds_for_every_step(rule, weights):
    tokens, sizes, keys, importance, config, merge = random_step(rule=rule, weights=weights)
    merged, new_sizes = apply_merge(tokens, sizes, merge, weights)
    assert torch.equal(new_sizes.sum(1), sizes.sum(1)) and new_sizes.min() >= 1
    assert merged.shape[1] == 23 - 6
    for row in range(3):
        source, destination = merge.source[row].tolist(), merge.destination[row].tolist()
        kept = merge.kept[row].tolist()
        assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == 22
        assert not set(source) & set(destination) and len(set(source)) == 6
        assert not {0, 22} & {*source, *destination}
        alone = choose_merge(keys[row : row + 1], importance[row : row + 1], 6, ends(1, 23), config)
        assert torch.equal(alone.source[0], merge.source[row])
    constant, _ = apply_merge(torch.ones_like(tokens), sizes, merge, weights)
    equal, _ = apply_merge(torch.ones_like(tokens), torch.ones_like(sizes), merge, weights)
    torch.testing.assert_close(equal, torch.ones_like(equal))
    if weights != "guided":  # as published, a constant does not survive unequal sizes
        torch.testing.assert_close(constant, torch.ones_like(constant))


def test_size_weights_are_the_mean_of_all_that_was_merged():
    tokens, sizes, *_, merge = random_step(weights="size")
    merged, new_sizes = apply_merge(tokens, sizes, merge, "size")
    torch.testing.assert_close((merged * new_sizes).sum(1), (tokens * sizes).sum(1))


@pytest.mark.parametrize("rule", RULES)
def test_the_choice_follows_the_tokens_when_they_change_places(rule):
    """Of the complete graph up to ties: two tokens that are each other's best match are told apart
    by their order alone, so these keep it. Of the bipartite rule within even and odd places."""
    _, _, keys, importance, config, merge = random_step(rule=rule, batch=1)
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(keys[0, 1:-1], dim=-1)
    best = (unit @ unit.T - 2 * torch.eye(21)).argmax(dim=1)
    mutual = [(i, int(best[i])) for i in range(21) if best[best[i]] == i and i < best[i]]
    for _ in range(1000):
        inner = torch.randperm(21, generator=generator)
        if rule == "bipartite":
            odd, even = (inner[inner % 2 == k] for k in (1, 0))
            inner = torch.arange(21)
            inner[0::2], inner[1::2] = even, odd
        place = inner.argsort()
        if rule == "bipartite" or all(place[i] < place[j] for i, j in mutual):
            break
    order = torch.cat([torch.tensor([0]), inner + 1, torch.tensor([22])])
    moved = choose_merge(keys[:, order], importance[:, order], 6, ends(1, 23), config)
    assert set(order[moved.source[0]].tolist()) == set(merge.source[0].tolist())


def test_a_logarithm_of_two_counts_as_a_second_token():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64) for _ in range(3))
    sizes = torch.ones(1, 7, 1, dtype=torch.float64)
    sizes[0, 3] = 2
    biased = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=log_sizes(sizes))
    twice = [torch.cat([part, part[:, :, 3:4]], dim=2) for part in (k, v)]
    doubled = torch.nn.functional.scaled_dot_product_attention(q, *twice)
    torch.testing.assert_close(biased, doubled)


def test_tokens_left_of_the_published_setting_and_of_a_schedule():
    assert tokens_left(578, ReductionConfig(13), 23) == 279
    assert tokens_left(578, ReductionConfig(13), 24) == 266
    assert (
        tokens_left(18, ReductionConfig(3), 4) == 6 and tokens_left(3, ReductionConfig(2), 4) == 3
    )
    assert tokens_left(18, ReductionConfig((1, 4)), 4) == 13
    vision = [tokens_left(198, ReductionConfig(16), n) for n in (1, 11, 12)]
    assert vision == [182, 22, 12]
    with pytest.raises(ValueError, match="complete_graph, bipartite"):
        ReductionConfig(rule="tome")
