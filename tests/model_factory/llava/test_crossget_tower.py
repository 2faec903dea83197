"""CrossGET's tower on tiny CLIP models: the published hidden states, safe start, gradients."""

import pytest
import torch
import transformers
from safetensors import safe_open

from model_factory.llava import crossget as crossget_tower
from model_factory.llava.crossget import CrossGetTower, alignment_loss, layer_repeats
from model_factory.llava.token_reduction import ReductionConfig, choose_merge, tokens_left
from model_factory.llava.towers import VisualInputs, tower_of
from model_factory.llava_vision_tower import LlavaViTVisionConfig, LlavaViTVisionModel
from model_factory.rope import rope_tables

R = {"free": 1, "main": 2, "double": 3, "saturated": 13, "none": 0}


def clip():
    torch.manual_seed(0)
    fields = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, image_size=32)
    fields |= dict(patch_size=8, num_attention_heads=4, hidden_act="quick_gelu")
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**fields)).eval()


def tower(r, weights="guided", **options):
    return CrossGetTower(tower_of(clip()), ReductionConfig(r, weights=weights), **options)


def stored(shared, run):
    with safe_open(shared / "vectors" / "llava_crossget_tower.safetensors", "pt") as file:
        values = {key: file.get_tensor(key) for key in file.keys()}
    prefix = "weights.vision_model."
    weights = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    cross = weights.pop("encoder.cross_image")
    own = {k.removeprefix(f"{run}."): v for k, v in values.items() if k.startswith(f"{run}.")}
    return weights, cross, own


@pytest.mark.parametrize("run", R)
def test_hidden_states_and_gradients_are_the_published_ones(shared, run):
    weights, cross, v = stored(shared, run)
    model = tower(R[run])
    inner = getattr(model.model, "vision_model", model.model)
    missing, unexpected = inner.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    with torch.no_grad():
        model.cross_tokens.weight.copy_(cross)
    model = model.to(v["hidden_states.0"].dtype)
    pixels = v["pixels"].to(v["hidden_states.0"].dtype)
    tolerance = 1e-10 if run == "double" else 5e-5
    states = model.hidden_states(pixels)
    for number, state in enumerate(states):
        torch.testing.assert_close(state, v[f"hidden_states.{number}"], rtol=0, atol=tolerance)
        assert state.shape[1] == tokens_left(18, model.config, number)
    features = states[-2][:, 1:]  # what a projector receives
    torch.testing.assert_close(features, v["features"], rtol=0, atol=tolerance)
    if "cotangent" not in v:
        return
    (features * v["cotangent"]).sum().backward()
    wanted = v["grad_cross_tokens"]
    near = (1e-10 if run == "double" else 1e-4) * wanted.abs().max().item()
    torch.testing.assert_close(
        model.cross_tokens.weight.grad, wanted, rtol=0, atol=max(near, 1e-10)
    )
    assert all(p.grad is None for p in model.model.parameters())


def test_without_reduction_a_masked_cross_token_changes_nothing():
    pixels = torch.randn(2, 3, 32, 32)
    plain = clip()
    with torch.no_grad():
        wanted = plain(pixel_values=pixels, output_hidden_states=True).hidden_states
        masked = tower(0, mask_cross_token=True).hidden_states(pixels)
        seen = tower(0).hidden_states(pixels)
    for number in range(5):
        torch.testing.assert_close(masked[number][:, :-1], wanted[number], rtol=1e-4, atol=1e-5)
        # with C = 0 the cross token stays the class token, which then counts twice as a key
        torch.testing.assert_close(seen[number][:, -1], seen[number][:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[4][:, :-1], wanted[4], atol=1e-3)


def test_gradients_reach_every_layer_through_features_and_alignment():
    model = tower(2, "guided_normalised")
    states = model(VisualInputs(torch.randn(2, 3, 32, 32)), [3])
    assert states.lengths == [model.tokens_of(None, 16, 3)] * 2
    alignment_loss(states.cross, torch.randn(6, 2, 32)).backward()
    grads = model.cross_tokens.weight.grad.abs().sum(-1)[0]
    assert (grads > 0).all()


def test_the_alignment_loss_follows_its_formula_in_both_directions():
    torch.manual_seed(0)
    image, text = (torch.randn(3, 2, 5, dtype=torch.float64) for _ in range(2))
    p, q = image.softmax(-1), text.softmax(-1)
    m = (p + q) / 2

    def kl(a, b):
        return (a * (a / b).log()).sum(-1).mean()

    published = (kl(m, p) + kl(m, q)) / 2
    textbook = (kl(p, m) + kl(q, m)) / 2
    torch.testing.assert_close(alignment_loss(image, text), published)
    torch.testing.assert_close(alignment_loss(image, text, "jensen_shannon"), textbook)
    torch.testing.assert_close(alignment_loss(text, image), alignment_loss(image, text))
    assert alignment_loss(image, image).abs() < 1e-12
    with pytest.raises(ValueError, match="jensen_shannon"):
        alignment_loss(image, text, "kl")


def test_vision_layers_are_repeated_to_the_depth_of_the_language_model():
    assert layer_repeats(24, 32).tolist() == [1, 1, 2] * 8
    assert layer_repeats(4, 6).tolist() == [1, 2, 1, 2]


def encoder(layers=4):
    torch.manual_seed(0)
    fields = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=layers)
    fields |= dict(num_attention_heads=2, image_size=32, patch_size=8)
    return LlavaViTVisionModel(LlavaViTVisionConfig(**fields)).eval()


def pack_of(lengths, side=8):
    """Sparse items: patches at random places of 64 frames."""
    draw = torch.Generator().manual_seed(1)
    count = sum(lengths)
    positions = torch.stack(
        [torch.randint(0, n, (count,), generator=draw) for n in (64, side, side)]
    )
    rows = torch.randn(count, 192, generator=draw)
    grids = torch.zeros(len(lengths), 3, dtype=torch.int64)
    return VisualInputs(None, rows, positions.T.contiguous(), torch.tensor(lengths), grids)


def test_our_encoder_without_reduction_and_with_a_masked_cross_token_is_the_plain_one():
    plain = tower_of(encoder())
    reduced = CrossGetTower(tower_of(encoder()), ReductionConfig(0), mask_cross_token=True)
    pack = pack_of([12, 20, 12])
    with torch.no_grad():
        wanted, found = plain(pack, range(5)), reduced(pack, range(5))
    assert found.lengths == [13, 21, 13]
    for index in range(5):
        for a, b in zip(
            wanted.states[index].split([12, 20, 12]),
            found.states[index].split([13, 21, 13]),
            strict=True,
        ):
            torch.testing.assert_close(b[:-1], a, rtol=1e-4, atol=1e-5)


def test_items_of_a_pack_are_reduced_each_by_itself_to_the_promised_count():
    reduced = CrossGetTower(tower_of(encoder()), ReductionConfig(3))
    lengths = [12, 20, 12, 2]
    pack = pack_of(lengths)
    with torch.no_grad():
        together = reduced(pack, [4])
    assert together.lengths == [reduced.tokens_of(None, n) for n in lengths]
    # at most half of the free tokens merge in a layer
    assert together.lengths == [tokens_left(n + 1, reduced.config, 4, protected=1) for n in lengths]
    start = 0
    for number, length in enumerate(lengths):
        part = slice(start, start + length)
        alone = VisualInputs(None, pack.rows[part], pack.positions[part],
                             pack.lengths[number : number + 1], pack.grids[:1])  # fmt: skip
        with torch.no_grad():
            item = reduced(alone, [4]).states[4]
        whole = together.states[4].split(together.lengths)[number]
        torch.testing.assert_close(item, whole, rtol=1e-4, atol=1e-5)
        start += length


def test_tokens_that_are_left_keep_their_positions(monkeypatch):
    """What a layer's queries are turned by is what its tokens stood at before the merge."""
    places, merges = [], []

    def seen(positions, **options):
        places.append(positions)
        return rope_tables(positions, **options)

    def chosen(keys, **options):
        merges.append(choose_merge(keys, **options))
        return merges[-1]

    monkeypatch.setattr(crossget_tower, "rope_tables", seen)
    monkeypatch.setattr(crossget_tower, "choose_merge", chosen)
    with torch.no_grad():
        CrossGetTower(tower_of(encoder()), ReductionConfig(3))(pack_of([20]), [4])
    assert [len(positions) for positions in places] == [21, 18, 15, 12]
    for before, merge, after in zip(places, merges, places[1:], strict=False):
        assert torch.equal(after, before[merge.kept[0]])


def test_gradients_reach_the_cross_tokens_of_our_encoder_and_none_of_its_weights():
    reduced = CrossGetTower(tower_of(encoder()), ReductionConfig(2))
    states = reduced(pack_of([16, 16]), [3])
    assert states.cross.shape == (4, 2, 64)
    alignment_loss(states.cross, torch.randn(6, 2, 64)).backward()
    assert (reduced.cross_tokens.weight.grad[0].abs().sum(-1) > 0).all()
    assert all(p.grad is None for p in reduced.model.parameters())


def test_the_published_setting_leaves_278_tokens_and_0_715_of_the_towers_operations():
    config = ReductionConfig(13)
    assert tokens_left(578, config, 23) - 1 == 278
    width, layers, full = 1024, 24, 577

    def flops(before, after):
        """Multiply-adds doubled: four projections and two products of attention, then the MLP."""
        return 8 * before * width**2 + 4 * before**2 * width + 16 * after * width**2

    plain = layers * flops(full, full)
    counts = [tokens_left(578, config, layer) for layer in range(layers + 1)]
    reduced = sum(flops(a, b) for a, b in zip(counts, counts[1:], strict=False))
    assert plain / 1e9 == pytest.approx(381, abs=2)
    assert reduced / plain == pytest.approx(0.715, abs=2e-3)


def test_towers_that_cannot_be_reduced_are_refused():
    fields = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, image_size=32)
    fields |= dict(patch_size=8, num_attention_heads=4)
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**fields))
    with pytest.raises(ValueError, match="SiglipVisionModel cannot be reduced"):
        CrossGetTower(tower_of(siglip), ReductionConfig(1))
