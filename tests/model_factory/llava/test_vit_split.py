"""ViT-Split on tiny CLIP towers: the published function, its parameter counts, what learns."""

import functools

import pytest
import torch
import transformers
from safetensors import safe_open

from model_factory.llava.towers import TowerStates
from model_factory.llava.vit_split import ViTSplit, ViTSplitConfig

CASES = {
    "f1_k1": ((-2,), 1),
    "f2_k1": ((-3, -2), 1),
    "f1_k2": ((-2,), 2),
    "f0_k1": ((), 1),
    "f1_k0": ((-2,), 0),
}


def tower(layers=5, width=16, side=32, patch=8, intermediate=32):
    torch.manual_seed(0)
    fields = dict(hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers)
    fields |= dict(num_attention_heads=4, image_size=side, patch_size=patch)
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**fields)).eval()


def blocks_of(model):
    return getattr(model, "vision_model", model).encoder.layers


def states_of(model, batch=2, side=32):
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    return dict(enumerate(found))


def dense(states):
    return TowerStates(states, [16, 16], [(1, 4, 4)] * 2, extra=1)


def split_of(case, model, **options):
    frozen, tuned = CASES[case]
    return ViTSplit(ViTSplitConfig(16, 24, frozen, tuned, **options), blocks_of(model))


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_the_published_one(shared, case):
    with safe_open(shared / "vectors" / "llava_vit_split.safetensors", "pt") as file:
        names = [key for key in file.keys() if key.startswith(f"{case}.")]
        v = {key.removeprefix(f"{case}."): file.get_tensor(key) for key in names}
    model = split_of(case, tower(), keep_extra_tokens=False, published_border=True)
    weights = {k.removeprefix("weights."): t for k, t in v.items() if k.startswith("weights.")}
    model.load_state_dict(weights)
    given = sorted(int(k.split(".")[1]) for k in v if k.startswith("hidden_states."))
    states = {5 + 1 - len(given) + i: v[f"hidden_states.{i}"] for i in given}
    torch.testing.assert_close(model(states), v["output"], rtol=0, atol=5e-5)
    if case == "f1_k0":  # the border of the repaired version is its own
        repaired = split_of(case, tower(), keep_extra_tokens=False)
        repaired.load_state_dict(weights)
        ours, theirs = (out.view(2, 4, 4, -1) for out in (repaired(states), v["output"]))
        torch.testing.assert_close(ours[:, 1:3, 1:3], theirs[:, 1:3, 1:3], rtol=0, atol=5e-5)
        border = ours[:, 0].flatten(0, 1)
        assert not torch.allclose(border[0], border[1], atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_a_token_in_is_a_token_out_and_all_that_may_learn_does(case):
    clip = tower()
    model, states = split_of(case, clip), states_of(clip)
    out = model(states, num_extra_tokens=1)
    assert out.shape == (2, 16, 24)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters()
               if not n.endswith("k_proj.bias"))  # fmt: skip
    assert all(p.grad is None for p in clip.parameters())
    needed = {i: states[i] for i in model.config.needed(5)}
    assert torch.equal(model(needed, num_extra_tokens=1), out), "no other state has a say"


@pytest.mark.parametrize(
    ("frozen", "tuned", "total"),
    [
        ((-2,), 1, 182_475_776),
        ((-3, -2), 1, 218_129_408),
        ((-2,), 2, 195_072_000),
        ((-2,), 0, 13_636_608),
        ((), 1, 16_794_624),
    ],
)
def test_parameter_counts_at_the_published_size(frozen, tuned, total):
    with torch.device("meta"):
        clip = tower(layers=24, width=1024, side=336, patch=14, intermediate=4096)
        model = ViTSplit(ViTSplitConfig(1024, 4096, frozen, tuned), blocks_of(clip))
    assert sum(p.numel() for p in model.parameters()) == total


def test_a_copied_block_starts_at_the_pretrained_function_and_is_a_copy():
    clip = tower()
    model, states = split_of("f0_k1", clip), states_of(clip)
    kept = model._task(dense(states))
    torch.testing.assert_close(kept, states[4][:, 1:].flatten(0, 1))
    published = split_of("f0_k1", clip, keep_extra_tokens=False)
    assert not torch.allclose(
        published._task(dense(states)), states[4][:, 1:].flatten(0, 1), atol=1e-4
    )
    before = blocks_of(clip)[3].mlp.fc1.weight.clone()
    with torch.no_grad():
        model.tuned_head[0].mlp.fc1.weight.add_(1)
    assert torch.equal(blocks_of(clip)[3].mlp.fc1.weight, before)


def test_blocks_that_return_tuples_are_copied_as_well():
    clip = tower()
    model, states = split_of("f1_k1", clip), states_of(clip)
    wanted = model(states, num_extra_tokens=1)
    block = model.tuned_head[0]
    plain = block.forward

    @functools.wraps(plain)
    def with_attention(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out if isinstance(out, tuple) else (out, "attention")

    block.forward = with_attention
    assert torch.equal(model(states, num_extra_tokens=1), wanted)


def test_grids_layers_and_empty_settings_are_checked():
    clip = tower()
    model, states = split_of("f1_k1", clip), states_of(clip)
    wide = {i: torch.randn(2, 1 + 8, 16) for i in states}
    with pytest.raises(ValueError, match="8 patches are no square"):
        model(wide, num_extra_tokens=1)
    assert model(wide, num_extra_tokens=1, grid=(2, 4)).shape == (2, 8, 24)
    with pytest.raises(ValueError, match="has not 8 patches"):
        model(wide, num_extra_tokens=1, grid=(3, 3))
    with pytest.raises(ValueError, match="hidden state 4"):
        model({3: states[3]}, num_extra_tokens=1)
    with pytest.raises(ValueError, match="needs frozen layers or tuned layers"):
        ViTSplitConfig(16, 24, (), 0)
    with pytest.raises(ValueError, match="no hidden state -9"):
        ViTSplit(ViTSplitConfig(16, 24, (-9,), 1), blocks_of(clip))


def test_two_samples_can_be_learned_by_heart():
    clip = tower()
    model, states = split_of("f1_k1", clip), states_of(clip)
    wanted = torch.rand(2, 16, 24)
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(30):
        loss = (model(states, num_extra_tokens=1) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all() and losses[-1] < 0.6 * losses[0]
