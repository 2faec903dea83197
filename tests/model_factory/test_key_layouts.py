"""Weights change their names, never their values; what does not fit is listed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_factory.registry import create_model
from model_factory.state_dict_adapter import LAYOUTS, check_fits, from_packing, to_packing
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

SAMPLE_NAMES = {
    "packing": "encoder.layers.2.self_attn.qkv.bias",
    "source": "transformer.layers.2.attn.in_proj.bias",
    "split": "encoder.layers.2.self_attn.v_proj.bias",
}
GRID = torch.tensor([[1, 3, 4]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return create_model("hf_llava_vit_packing_tiny_ln", patch_size=14).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_every_layout_comes_back_bit_for_bit(model, layout, wrapper):
    weights = model.state_dict()
    there = from_packing(weights, layout)
    assert SAMPLE_NAMES[layout] in there
    back = to_packing({wrapper + name: tensor for name, tensor in there.items()})
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_blocks_compiled_one_by_one_carry_their_prefix_inside(model):
    weights = from_packing(model.state_dict(), "source")
    inside = {k.replace("layers.1.", "layers.1._orig_mod."): v for k, v in weights.items()}
    assert to_packing(inside).keys() == model.state_dict().keys()


def test_names_that_fit_no_rule_are_all_listed(model):
    weights = from_packing(model.state_dict(), "source")
    with pytest.raises(ValueError, match=r"2 of \d+ names.*blocks.0.attn, decoder.weight"):
        to_packing(weights | {"blocks.0.attn": torch.zeros(1), "decoder.weight": torch.zeros(1)})
    for strangers in ({"blocks.0.attn": torch.zeros(1)}, {}):
        with pytest.raises(ValueError, match="no known key layout"):
            to_packing(strangers)


def test_an_incomplete_triple_names_its_missing_part(model):
    weights = from_packing(model.state_dict(), "split")
    del weights["encoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"encoder.layers.1.self_attn.k_proj.weight"):
        to_packing(weights)


def test_missing_unexpected_and_misshapen_tensors_are_listed(model):
    weights = dict(model.state_dict())
    del weights["layernorm_pre.bias"], weights["head.probe"]
    weights["encoder.layers.9.mlp.fc1.bias"] = torch.zeros(4)
    weights["patch_embed.proj.weight"] = torch.zeros(128, 3, 16, 16)
    with pytest.raises(ValueError) as caught:
        check_fits(weights, model.state_dict(), "the file")
    for part in (
        "missing: head.probe, layernorm_pre.bias",
        "unexpected: encoder.layers.9.mlp.fc1.bias",
        "patch_embed.proj.weight [128, 3, 16, 16] instead of [128, 3, 14, 14]",
    ):
        assert part in str(caught.value)


def published_folder(model, folder, model_type="onevision_encoder", shards=1):
    """A folder as the public encoders come: patch 14, bf16, q, k and v apart."""
    folder.mkdir()
    config = model.config
    described = {
        "architectures": ["OneVisionEncoderModel"],
        "model_type": model_type,
        "hidden_act": "gelu",
        "attention_dropout": 0.0,
        "rope_temporal_size": 64,
        "torch_dtype": "bfloat16",
        **{
            name: getattr(config, name)
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "patch_size",
                "layer_norm_eps",
                "layer_norm_type",
                "rope_theta",
                "use_head",
            )
        },
    }
    (folder / "config.json").write_text(json.dumps(described))
    weights = {k: v.bfloat16() for k, v in from_packing(model.state_dict(), "split").items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    placed = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in sorted(weights)[number::shards]}
        placed |= dict.fromkeys(part, name)
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("model_type", ["onevision_encoder", "llava_vit"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_published_folder_loads_into_the_packing_model(model, tmp_path, model_type, shards):
    folder = published_folder(model, tmp_path / "published", model_type, shards)
    loaded = LlavaViTPackingModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    assert loaded.config.rope_pairing == "legacy" and loaded.config.patch_size == 14
    weights = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name].bfloat16().float()), name
    rows = torch.randn(12, 588, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = model(rows, GRID), loaded(rows, GRID)
    assert torch.allclose(got.pooler_output, want.pooler_output, atol=0.05)  # bf16 weights


def test_a_published_folder_keeps_its_dtype_unless_told_otherwise(model, tmp_path):
    folder = published_folder(model, tmp_path / "published")
    assert LlavaViTPackingModel.from_pretrained(folder).dtype == torch.bfloat16
    assert LlavaViTPackingModel.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "missing: layernorm_post.weight"),
        ("extra", "names fit no rule.*visual.proj"),
        ("relu", "hidden_act is 'relu'"),
        ("no weights", "model.safetensors does not exist"),
        ("other width", "of another shape: .*layers.0.layer_norm1.weight"),
        ("damaged weights", "model.safetensors is damaged"),
        ("damaged config", "config.json is no readable JSON"),
    ],
)
def test_a_published_folder_that_does_not_fit_is_refused(model, tmp_path, fault, message):
    folder = published_folder(model, tmp_path / "published")
    weights = load_file(folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    if fault == "missing":
        del weights["layernorm_post.weight"]
    elif fault == "extra":
        weights["visual.proj"] = torch.zeros(2)
    elif fault == "relu":
        described["hidden_act"] = "relu"
    elif fault == "other width":
        described["hidden_size"] = 256
    text = json.dumps(described)
    (folder / "config.json").write_text(text[:50] if fault == "damaged config" else text)
    (folder / "model.safetensors").unlink()
    if fault != "no weights":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if fault == "damaged weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(ValueError, match=message):
        LlavaViTPackingModel.from_pretrained(folder)


def test_the_source_model_refuses_what_does_not_fit():
    source = create_model("llava_vit_tiny_ln")
    weights = source.state_dict()
    assert "conv1.weight" in weights
    del weights["ln_pre.bias"]
    with pytest.raises(ValueError, match="missing: ln_pre.bias"):
        source.load_state_dict(weights)
    report = source.load_state_dict(weights | {"stranger": torch.zeros(1)}, strict=False)
    assert report.missing_keys == ["trunk.layernorm_pre.bias"]
    assert report.unexpected_keys == ["stranger"]


def test_the_source_model_speaks_its_layout_inside_any_parent():
    torch.manual_seed(0)
    first, second = (torch.nn.Sequential(create_model("llava_vit_tiny_ln")) for _ in range(2))
    weights = first.state_dict()
    assert "0.conv1.weight" in weights and not any("trunk" in name for name in weights)
    second.load_state_dict(weights)
    again = second.state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert "_orig_mod.conv1.weight" in torch.compile(first[0]).state_dict()


def test_two_tensors_of_one_name_are_refused(model):
    weights = from_packing(model.state_dict(), "source")
    twice = weights | {"module.conv1.weight": torch.zeros_like(weights["conv1.weight"])}
    with pytest.raises(ValueError, match="two tensors are called conv1.weight"):
        to_packing(twice)


def test_unequal_queries_keys_and_values_are_refused(model):
    weights = from_packing(model.state_dict(), "split")
    q, k = (f"encoder.layers.0.self_attn.{part}_proj.bias" for part in "qk")
    weights[q], weights[k] = torch.zeros(64), torch.zeros(192)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.qkv_proj.bias: q, k and v have"):
        to_packing(weights)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(model, dtype):
    weights = dict(model.state_dict())
    weights["head.probe"] = weights["head.probe"].to(dtype)
    with pytest.raises(ValueError, match="not floating point: head.probe"):
        check_fits(weights, model.state_dict(), "the file")
