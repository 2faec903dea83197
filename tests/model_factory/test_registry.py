"""Names and shapes of the models: what exists, how many parameters, what an unknown name says."""

import pytest
import torch

from model_factory.registry import SIZES, create_model, list_models, packing_config, packing_name
from model_factory.vit_preview_v0 import LlavaViTEncoder
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

PUBLISHED_MILLIONS = {"small": 13, "base": 93, "large": 316, "huge": 650, "giant": 1160}
REQUIRED = [
    *(f"llava_vit_{size}_ln" for size in ("tiny", *PUBLISHED_MILLIONS)),
    *(f"llava_vit_{size}_rms" for size in ("base", "large")),
    *(f"hf_llava_vit_packing_{size}_ln" for size in ("tiny", *PUBLISHED_MILLIONS)),
    *(f"ov_encoder_{size}" for size in ("base", "large", "huge")),
]


def formula(config):
    """Parameters counted by hand from the shapes."""
    width, hidden = config.hidden_size, config.intermediate_size
    norm = width if config.layer_norm_type == "rms_norm" else 2 * width
    attention = 3 * width * width + 3 * width + width * width + width
    mlp = 2 * width * hidden + hidden + width
    head = width + attention + width + mlp  # probe, attention, RMSNorm, MLP
    blocks = config.num_hidden_layers * (2 * norm + attention + mlp)
    return 3 * config.patch_size**2 * width + blocks + 2 * norm + head


@pytest.mark.parametrize("name", list_models())
def test_parameter_counts_on_the_meta_device(name):
    with torch.device("meta"):
        model = create_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == formula(model.config)
    for size, millions in PUBLISHED_MILLIONS.items():
        if f"_{size}_" in name and "rms" not in name:
            assert abs(count / 1e6 - millions) < 0.05 * millions


def test_every_required_name_exists_and_wildcards_select():
    assert set(REQUIRED) <= set(list_models())
    assert list_models("ov_*") == ["ov_encoder_base", "ov_encoder_huge", "ov_encoder_large"]
    assert len(list_models("hf_*")) == len(SIZES)
    assert list_models("nothing*") == []


@pytest.mark.parametrize("typo", ["llava_vit_larg_ln", "large", "ov_encoder_giant", ""])
def test_unknown_model_names_the_nearest_that_exist(typo):
    with pytest.raises(ValueError, match="unknown model") as caught:
        create_model(typo)
    assert any(name in str(caught.value) for name in list_models())


def test_front_ends_and_their_norms():
    assert isinstance(create_model("llava_vit_tiny_ln"), LlavaViTEncoder)
    assert isinstance(create_model("hf_llava_vit_packing_tiny_ln"), LlavaViTPackingModel)
    source, packed = packing_config("llava_vit_base_rms"), packing_config("ov_encoder_base")
    assert (source.layer_norm_eps, source.head_norm_eps) == (1e-5, None)
    assert source.layer_norm_type == "rms_norm" and source.patch_size == 16
    assert (packed.layer_norm_eps, packed.head_norm_eps) == (1e-6, 1e-6)
    assert (packed.patch_size, packed.image_size) == (14, 224)
    assert packing_name("llava_vit_base_rms") == "hf_llava_vit_packing_base_rms"
    assert packing_name("ov_encoder_base") == "ov_encoder_base"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_paring": "rotary"}, "unknown config field 'rope_paring'.*rope_pairing"),
        ({"num_layers": 9}, "unknown config field 'num_layers'.*num_hidden_layers"),
        ({"rope_pairing": "half"}, "rope_pairing is 'half'; choose one of legacy, rotary"),
        ({"layer_norm_type": "batch"}, "layer_norm_type is 'batch'; choose one of layer_norm"),
        ({"hidden_size": 144}, "hidden_size 144 over num_attention_heads 4 .*multiple of 32"),
        *(({name: 0}, f"{name} is 0, must be greater") for name in ("patch_size", "rope_theta")),
        *(({name: -1}, f"{name} is -1") for name in ("num_attention_heads", "layer_norm_eps")),
        ({"rope_position_scale": 0.0}, "rope_position_scale is 0.0"),
    ],
)
def test_wrong_config_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        create_model("llava_vit_tiny_ln", **fields)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_both_norms_run(norm):
    torch.manual_seed(0)
    model = create_model("hf_llava_vit_packing_tiny_ln", layer_norm_type=norm)
    out = model(torch.randn(6, 768), torch.tensor([[1, 2, 3]]))
    assert out.last_hidden_state.isfinite().all()
