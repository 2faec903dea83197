"""ConvLLaVA's tower: published features, token counts, growth from four stages, what learns."""

import math

import pytest
import torch
import transformers
from safetensors import safe_open

from model_factory.llava.convnext import ConvNextVisionModel, grow_stage


def convnext(widths=(8, 16, 32, 64, 128), depths=(1, 1, 2, 1, 1), **fields):
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(
        hidden_sizes=list(widths), depths=list(depths), num_stages=len(widths), **fields
    )
    config.layer_norm_eps = 1e-6
    return transformers.ConvNextModel(config).eval()


def test_features_are_the_published_ones(shared):
    with safe_open(shared / "vectors" / "llava_convnext.safetensors", "pt") as file:
        v = {key: file.get_tensor(key) for key in file.keys()}
    model = convnext()
    weights = {k.removeprefix("weights."): t for k, t in v.items() if k.startswith("weights.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("layernorm.") for name in missing)
    tower = ConvNextVisionModel.from_network(model)
    for case in ("square", "tall", "wide"):
        pixels = v[f"{case}.pixels"]
        with torch.no_grad():
            features = tower(pixels).last_hidden_state
            maps = tower.stages(pixels)
        torch.testing.assert_close(features, v[f"{case}.features"], rtol=0, atol=5e-5)
        for name, found in zip(["stem", *(f"stage{i}" for i in range(1, 6))], maps, strict=True):
            if f"{case}.{name}" in v:
                torch.testing.assert_close(found, v[f"{case}.{name}"], rtol=0, atol=5e-5)
        assert features.shape[1] == math.prod(tower.grid(*pixels.shape[-2:]))


def test_token_counts_of_the_released_sizes():
    with torch.device("meta"):
        tower = ConvNextVisionModel.from_network(
            convnext((192, 384, 768, 1536, 3072), (3, 3, 27, 3, 6), image_size=768)
        )
    assert tower.stride == 64 and tower.config.hidden_size == 3072
    for side, count in ((768, 144), (1024, 256), (1536, 576)):
        assert math.prod(tower.grid(side, side)) == count
    assert math.prod(tower.grid(384, 640)) == 60
    with pytest.raises(ValueError, match="352x352 is no multiple of 64"):
        tower.grid(352, 352)
    counts = [sum(p.numel() for p in tower.network.embeddings.parameters())]
    counts += [sum(p.numel() for p in s.parameters()) for s in tower.network.encoder.stages]
    assert counts == [9_792, 918_144, 3_901_440, 129_785_856, 61_612_032, 472_934_400]


def test_a_grown_stage_starts_as_its_downsampling_and_leaves_the_others_alone(tmp_path):
    four = convnext((8, 16, 32, 64), (1, 1, 2, 1))
    grown = grow_stage(four, width=128, depth=2)
    grown.save_pretrained(tmp_path)
    five = ConvNextVisionModel.from_network(grown)
    pixels = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        old = ConvNextVisionModel.from_network(four).stages(pixels)
        new = five.stages(pixels)
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=False))
        down = new[4]
        for part in five.network.encoder.stages[4].downsampling_layer:
            down = part(down)
    assert (new[5] - down).abs().max() / down.abs().max() < 1e-5
    again, info = transformers.ConvNextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    backbone = transformers.AutoBackbone.from_config(again.config)
    backbone.load_state_dict(again.state_dict(), strict=False)
    loaded = ConvNextVisionModel.from_network(again.eval())
    torch.testing.assert_close(loaded(pixels), five(pixels))
    with torch.no_grad():
        (last,) = backbone.eval()(pixels).feature_maps
    assert last.shape == new[5].shape and backbone.config.out_features == ["stage5"]


@pytest.mark.parametrize(("first", "learning"), [(None, []), (5, [5]), (3, [3, 4, 5])])
def test_only_the_stages_that_may_learn_do(first, learning):
    tower = ConvNextVisionModel.from_network(convnext())
    tower.train_from(first)
    before = {name: p.clone() for name, p in tower.named_parameters()}
    out = tower(torch.randn(1, 3, 64, 64)).last_hidden_state
    if first is None:
        assert not out.requires_grad
        return
    out.square().sum().backward()
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], 0.1)
    optimizer.step()
    changed = {n.split(".")[3] for n, p in tower.named_parameters() if not p.equal(before[n])}
    assert changed == {str(stage - 1) for stage in learning}
