"""The encoder equals an independent implementation on golden numbers, through both front ends."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from model_factory.state_dict_adapter import to_packing
from model_factory.vit_preview_v0 import LlavaViTEncoder
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingConfig, LlavaViTPackingModel

TOLERANCE = 1e-4


@pytest.fixture(params=["encoder_patch16_ln", "encoder_patch14_ln"])
def golden(shared, request):
    path = shared / "vectors" / f"{request.param}.safetensors"
    with safe_open(path, "pt") as file:
        fields = {k: v if k == "layer_norm_type" else int(v) for k, v in file.metadata().items()}
    tensors = load_file(path)
    weights = {
        k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")
    }
    return fields, weights, tensors


def close(got, want):
    return float((got - want).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("case", ["image", "video", "sparse", "positions"])
def test_source_encoder_matches(golden, case):
    fields, weights, tensors = golden
    model = LlavaViTEncoder(
        LlavaViTPackingConfig(**fields, layer_norm_eps=1e-5, head_norm_eps=None)
    )
    model.load_state_dict(weights)
    pixels = tensors["image.pixels" if case == "image" else "video.pixels"]
    options = {
        "sparse": {"visible_indices": tensors["sparse.visible_indices"]},
        "positions": {"patch_positions": tensors["positions.patch_positions"]},
    }.get(case, {})
    with torch.no_grad():
        out = model(pixels, **options)
    assert close(out["visible_embeddings"], tensors[f"{case}.tokens"])
    assert close(out["head_output"], tensors[f"{case}.pooled"])


@pytest.mark.parametrize("case", ["packed", "packed_pos"])
def test_packing_model_matches(golden, case):
    fields, weights, tensors = golden
    model = LlavaViTPackingModel(LlavaViTPackingConfig(**fields))
    model.load_state_dict(to_packing(weights))
    with torch.no_grad():
        out = model(
            hidden_states=tensors["packed.hidden_states"],
            grid_thw=tensors["packed.grid_thw"],
            patch_positions=tensors.get(f"{case}.patch_positions"),
        )
    assert close(out.last_hidden_state, tensors[f"{case}.tokens"])
    assert close(out.pooler_output, tensors[f"{case}.pooled"])
