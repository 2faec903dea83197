"""Weights travel between layouts and folders without change, or the conversion fails loudly."""

import pytest
import torch
from conftest import run

from model_factory.backbone import load_backbone, save_backbone
from model_factory.packing import (
    compute_patch_positions_from_grid_thw,
    compute_patch_positions_with_interpolated_temporal,
    interpolate_frame_indices,
)
from model_factory.registry import SIZES, create_model, list_models, packing_config
from model_factory.state_dict_adapter import packing_to_source, source_to_packing, strip_wrappers
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

CONVERTER = "model_factory/convert_llava_vit_packing_to_hf.py"
PARAMETERS_M = {"small_ln": 13, "base_ln": 93, "large_ln": 316, "huge_ln": 650, "giant_ln": 1160}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary").eval()


def test_key_maps_are_inverse_and_strip_wrappers(model):
    weights = model.state_dict()
    source = packing_to_source(weights)
    assert "conv1.weight" in source and "transformer.layers.2.attn.in_proj.bias" in source
    assert source_to_packing(source).keys() == weights.keys()
    wrapped = {f"module._orig_mod.{key}": value for key, value in source.items()}
    assert strip_wrappers(wrapped).keys() == source.keys()


def test_foreign_keys_are_listed():
    with pytest.raises(ValueError, match="blocks.0.attn"):
        source_to_packing({"blocks.0.attn": torch.zeros(1)})


@pytest.mark.parametrize("size", PARAMETERS_M)
def test_parameter_counts_on_the_meta_device(size):
    with torch.device("meta"):
        model = LlavaViTPackingModel(packing_config(f"hf_llava_vit_packing_{size}"))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(millions - PARAMETERS_M[size]) / PARAMETERS_M[size] < 0.05


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="llava_vit_large_ln"):
        create_model("llava_vit_larg_ln")
    assert len(list_models("hf_*")) == len(SIZES)


@pytest.mark.e2e
def test_converter_writes_a_folder_that_a_fresh_process_reads_to_the_same_outputs(model, tmp_path):
    save_backbone(model, tmp_path / "backbone.pt")
    done = run(
        CONVERTER, "llava_vit_tiny_ln", tmp_path / "backbone.pt", "--output_dir", tmp_path / "hf"
    )
    assert done.stdout.count("agree") == 6
    rows = torch.randn(16, 768, generator=torch.Generator().manual_seed(5))
    torch.save(rows, tmp_path / "rows.pt")
    code = (
        "import sys, torch; from model_factory.vit_preview_v0_packing_hf import "
        "LlavaViTPackingModel as M\n"
        "folder = sys.argv[1]; rows = torch.load(folder + '/rows.pt', weights_only=True)\n"
        "model, info = M.from_pretrained(folder + '/hf', torch_dtype=torch.float32, "
        "output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "with torch.no_grad(): out = model.eval()(rows, torch.tensor([[1, 4, 4]]))\n"
        "torch.save([out.last_hidden_state, out.pooler_output], folder + '/out.pt')\n"
    )
    run("-c", code, tmp_path)
    tokens, pooled = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        want = model(rows, torch.tensor([[1, 4, 4]]))
    assert torch.allclose(tokens, want.last_hidden_state, atol=1e-5)
    assert torch.allclose(pooled, want.pooler_output, atol=1e-5)


@pytest.mark.parametrize("fault", ["missing key", "extra key", "other size", "no file"])
def test_converter_refuses_what_does_not_fit(model, tmp_path, fault):
    weights = packing_to_source(model.state_dict())
    name = "llava_vit_tiny_ln"
    if fault == "missing key":
        del weights["ln_post.weight"]
    elif fault == "extra key":
        weights["transformer.layers.9.ln_1.weight"] = torch.zeros(128)
    elif fault == "other size":
        name = "llava_vit_small_ln"
    if fault != "no file":
        torch.save(weights, tmp_path / "backbone.pt")
    done = run(
        CONVERTER, name, tmp_path / "backbone.pt", "--output_dir", tmp_path / "hf", check=False
    )
    assert done.returncode == 1
    assert "error:" in done.stderr and not (tmp_path / "hf").exists()


def test_nan_weights_do_not_pass_the_converter(model, tmp_path):
    weights = packing_to_source(model.state_dict())
    weights["head.mlp.fc2.bias"] = torch.full_like(weights["head.mlp.fc2.bias"], float("nan"))
    torch.save(weights, tmp_path / "backbone.pt")
    done = run(
        CONVERTER,
        "llava_vit_tiny_ln",
        tmp_path / "backbone.pt",
        "--output_dir",
        tmp_path / "hf",
        check=False,
    )
    assert done.returncode == 1 and "differ by nan" in done.stderr


def test_a_described_backbone_must_be_the_named_model(model, tmp_path):
    save_backbone(model, tmp_path / "backbone.pt")
    with pytest.raises(
        ValueError, match="is no llava_vit_small_ln: its hidden_size is 128, not 384"
    ):
        load_backbone(tmp_path / "backbone.pt", "llava_vit_small_ln")


def test_interpolation_rounds_half_to_even_and_clamps():
    sixteen = interpolate_frame_indices(torch.arange(16)[None], torch.tensor([16]))[0].tolist()
    assert sixteen == [0, 4, 8, 13, 17, 21, 25, 29, 34, 38, 42, 46, 50, 55, 59, 63]
    assert interpolate_frame_indices(torch.tensor([[0, 1, 5]]), torch.tensor([1])).tolist() == [
        [0, 63, 63]
    ]


def test_positions_match_their_loops():
    grids = torch.tensor([[2, 3, 4], [1, 2, 2]])
    want = [
        (t, h, w)
        for T, H, W in grids.tolist()
        for t in range(T)
        for h in range(H)
        for w in range(W)
    ]
    assert compute_patch_positions_from_grid_thw(grids).tolist() == [list(p) for p in want]
    times = torch.tensor([[0, 9], [5, 63]])
    want = [[t, h, w] for t in (0, 9, 5, 63) for h in range(2) for w in range(3)]
    assert compute_patch_positions_with_interpolated_temporal(times, 2, 3).tolist() == want
    with pytest.raises(ValueError, match="must be positive"):
        compute_patch_positions_from_grid_thw(torch.tensor([[1, 0, 3]]))
