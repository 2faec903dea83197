"""The converter writes a folder of the same function as the checkpoint, or fails loudly."""

import re

import pytest
import torch
from conftest import run
from forked import forked
from safetensors.torch import load_file, save_file

from model_factory import conversion
from model_factory.backbone import load_backbone, read_weights, save_backbone
from model_factory.conversion import ConversionError, convert
from model_factory.convert_llava_vit_packing_to_hf import main
from model_factory.packing import (
    compute_patch_positions_from_grid_thw,
    compute_patch_positions_with_interpolated_temporal,
    interpolate_frame_indices,
)
from model_factory.registry import create_model
from model_factory.state_dict_adapter import from_packing
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

CONVERTER = "model_factory/convert_llava_vit_packing_to_hf.py"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary").eval()


@pytest.fixture(scope="module")
def legacy():
    """A model as the public source files hold it: source norm eps, legacy rotary rule."""
    torch.manual_seed(4)
    return create_model("llava_vit_tiny_ln").eval()


@pytest.mark.e2e
def test_converter_writes_a_folder_that_a_fresh_process_reads_to_the_same_outputs(model, tmp_path):
    save_backbone(model, tmp_path / "backbone.pt")
    done = forked(
        CONVERTER, "llava_vit_tiny_ln", tmp_path / "backbone.pt", "--output_dir", tmp_path / "hf"
    )
    assert done.stdout.count("agree") == 12 and "bit for bit" in done.stdout
    rows = torch.randn(16, 768, generator=torch.Generator().manual_seed(5))
    torch.save(rows, tmp_path / "rows.pt")
    code = (
        "import sys, torch; from model_factory.vit_preview_v0_packing_hf import "
        "LlavaViTPackingModel as M\n"
        "folder = sys.argv[1]; rows = torch.load(folder + '/rows.pt', weights_only=True)\n"
        "model = M.from_pretrained(folder + '/hf', torch_dtype=torch.float32).eval()\n"
        "with torch.no_grad(): out = model(rows, torch.tensor([[1, 4, 4]]))\n"
        "torch.save([out.last_hidden_state, out.pooler_output], folder + '/out.pt')\n"
    )
    forked("-c", code, tmp_path)
    tokens, pooled = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        want = model(rows, torch.tensor([[1, 4, 4]]))
    assert torch.equal(tokens, want.last_hidden_state)
    assert torch.equal(pooled, want.pooler_output)


@pytest.mark.parametrize("layout", ["source", "split", "packing"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("wrapping", ["", "module._orig_mod."])
def test_public_files_of_every_layout_convert_to_the_same_weights(
    legacy, tmp_path, layout, suffix, wrapping
):
    weights = from_packing(legacy.trunk.state_dict(), layout)
    weights = {wrapping + name: tensor for name, tensor in weights.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    lines = convert("llava_vit_tiny_ln", path, tmp_path / "hf")
    loaded = LlavaViTPackingModel.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for name, tensor in legacy.trunk.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.layer_norm_eps == 1e-5 and loaded.config.head_norm_eps is None
    names = " ".join(lines)
    for case in ("image 224x224", "image 160x320", "moving video 96x144", "mixed pack"):
        assert f"before saving: {case}" in names and f"after reloading: {case}" in names


def break_file(weights, fault):
    """A checkpoint that is not the named model's, one way or another."""
    if fault == "missing key":
        del weights["ln_post.weight"]
    elif fault == "extra key":
        weights["transformer.layers.9.ln_1.weight"] = torch.zeros(128)
    elif fault == "foreign prefix":  # nothing of it would load where strictness is off
        weights = {f"student.backbone.{name}": tensor for name, tensor in weights.items()}
    elif fault == "nothing":
        weights = {}
    elif fault == "not tensors":
        weights["conv1.weight"] = "a text"
    elif fault == "list":
        weights = [weights["conv1.weight"]]
    elif fault == "two of one name":
        weights["module.conv1.weight"] = torch.zeros(128, 3, 16, 16)
    elif fault == "other shape":
        weights["conv1.weight"] = torch.zeros(128, 3, 14, 14)
    elif fault == "nan":
        weights["head.mlp.fc2.bias"] = torch.full_like(weights["head.mlp.fc2.bias"], float("nan"))
    return weights


FAULTS = {
    "missing key": "missing: layernorm_post.weight",
    "extra key": "unexpected: encoder.layers.9.layer_norm1.weight",
    "foreign prefix": "no known key layout",
    "nothing": "no known key layout",
    "not tensors": "are no tensors: conv1.weight",
    "list": "holds a list",
    "other shape": "patch_embed.proj.weight",
    "nan": "differ by nan",
    "no file": "does not exist",
    "no tensors file": "no readable file",
    "other size": "of another shape: encoder.layers.0.layer_norm1.bias",
    "folder": "is a folder",
    "output is a file": "hf is a file",
    "two of one name": "two tensors are called conv1.weight",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_converter_ends_non_zero_on_what_does_not_fit(legacy, tmp_path, capsys, fault):
    path = tmp_path / "backbone.pt"
    if fault == "no tensors file":
        path.write_bytes(b"not a checkpoint")
    elif fault == "folder":
        path.mkdir()
    elif fault != "no file":
        torch.save(break_file(dict(legacy.state_dict()), fault), path)
    if fault == "output is a file":
        (tmp_path / "hf").write_text("mine")
    name = "llava_vit_small_ln" if fault == "other size" else "llava_vit_tiny_ln"
    assert main([name, str(path), "--output_dir", str(tmp_path / "hf")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and re.search(FAULTS[fault], said), said
    assert not (tmp_path / "hf").is_dir()


def test_a_model_without_a_head_converts_too(tmp_path):
    model = create_model("hf_llava_vit_packing_tiny_ln", use_head=False)
    save_backbone(model, tmp_path / "backbone.pt")
    convert("llava_vit_tiny_ln", tmp_path / "backbone.pt", tmp_path / "hf")
    assert LlavaViTPackingModel.from_pretrained(tmp_path / "hf").head is None


def test_a_damaged_description_is_named(model, tmp_path):
    save_backbone(model, tmp_path / "backbone.pt")
    (tmp_path / "backbone.json").write_text("[]")
    with pytest.raises(ValueError, match="backbone.json changed since it was written"):
        load_backbone(tmp_path / "backbone.pt", "llava_vit_tiny_ln")
    (tmp_path / "backbone.pt.sha256").unlink()
    with pytest.raises(ValueError, match="backbone.json holds a list"):
        load_backbone(tmp_path / "backbone.pt", "llava_vit_tiny_ln")


def test_the_exit_code_of_the_process_is_that_of_the_check(tmp_path):
    done = forked(CONVERTER, "llava_vit_tiny_ln", tmp_path / "none.pt", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """A file that would create another file when unpickled."""

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save({"model": Trap()}, tmp_path / "backbone.pt")
    with pytest.raises(ValueError, match="no readable file of tensors"):
        read_weights(tmp_path / "backbone.pt")
    assert not (tmp_path / "trapped").exists()


def test_random_weights_never_pass(legacy, tmp_path, monkeypatch):
    """A source or a target that kept its random start is found, wherever loading went wrong."""
    torch.save(legacy.state_dict(), tmp_path / "backbone.pt")
    monkeypatch.setattr(conversion.LlavaViTEncoder, "load_state_dict", lambda *_: None)
    with pytest.raises(ConversionError, match="image 224x224: source and packing model differ"):
        convert("llava_vit_tiny_ln", tmp_path / "backbone.pt", tmp_path / "hf")
    monkeypatch.undo()
    random = create_model("hf_llava_vit_packing_tiny_ln").eval()
    monkeypatch.setattr(conversion, "load_backbone", lambda *_, **__: random)
    monkeypatch.setattr(
        conversion.LlavaViTEncoder,
        "load_state_dict",
        lambda self, _: self.trunk.load_state_dict(random.state_dict()),
    )  # both sides share the same random start: all outputs agree, the tensors do not
    with pytest.raises(ConversionError, match="tensors changed on the way: patch_embed"):
        convert("llava_vit_tiny_ln", tmp_path / "backbone.pt", tmp_path / "hf2")
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.pt"]  # nothing unproven left


@pytest.mark.parametrize("mistake", ["frame order", "time base"])
def test_a_wrong_time_is_noticed(model, tmp_path, monkeypatch, mistake):
    save_backbone(model, tmp_path / "backbone.pt")
    wrong = torch.arange(8).flip(0)[None] * 9 if mistake == "frame order" else torch.arange(8)[None]
    monkeypatch.setattr(
        conversion,
        "compute_patch_positions_with_interpolated_temporal",
        lambda _, height, width: compute_patch_positions_with_interpolated_temporal(
            wrong, height, width
        ),
    )
    with pytest.raises(ConversionError, match="moving video"):
        convert("llava_vit_tiny_ln", tmp_path / "backbone.pt", tmp_path / "hf")


def test_a_described_backbone_must_be_the_named_model(model, tmp_path):
    save_backbone(model, tmp_path / "backbone.pt")
    with pytest.raises(
        ValueError, match="is no llava_vit_small_ln: its hidden_size is 128, not 384"
    ):
        load_backbone(tmp_path / "backbone.pt", "llava_vit_small_ln")
    other = create_model("hf_llava_vit_packing_tiny_ln", layer_norm_type="rms_norm")
    save_backbone(other, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="its layer_norm_type is rms_norm, not layer_norm"):
        load_backbone(tmp_path / "other.pt", "llava_vit_tiny_ln")


@pytest.mark.parametrize("name", ["llava_vit_large_rms", "ov_encoder_large"])
def test_the_target_name_follows_from_the_model_name(name, tmp_path, capsys):
    assert main([name, str(tmp_path / "x.pt"), "--target_model_name", "hf_other"]) == 1
    assert f"{name} converts to" in capsys.readouterr().err


def test_interpolation_rounds_half_to_even_and_clamps():
    sixteen = interpolate_frame_indices(torch.arange(16)[None], torch.tensor([16]))[0].tolist()
    assert sixteen == [0, 4, 8, 13, 17, 21, 25, 29, 34, 38, 42, 46, 50, 55, 59, 63]
    eight = interpolate_frame_indices(torch.arange(8)[None], torch.tensor([[8]]))
    assert eight.dtype == torch.int64 and eight.tolist() == [[0, 9, 18, 27, 36, 45, 54, 63]]
    assert interpolate_frame_indices(torch.tensor([[0, 1, 5]]), torch.tensor([1])).tolist() == [
        [0, 63, 63]
    ]
    assert interpolate_frame_indices(torch.tensor([[9, 9, 7]]), torch.tensor([8])).tolist() == [
        [63, 63, 63]
    ]  # past the end clamps, duplicates stay
    halves = interpolate_frame_indices(torch.tensor([[1, 3, 5]]), torch.tensor([7]), 4)
    assert halves.tolist() == [[0, 2, 2]]  # 0.5, 1.5 and 2.5, half to even
    two = interpolate_frame_indices(torch.tensor([[0, 99]] * 2), torch.tensor([[100], [199]]))
    assert two.tolist() == [[0, 63], [0, 32]]  # 31.5, half to even
    with pytest.raises(ValueError, match=r"\[1, 2\] and 3"):
        interpolate_frame_indices(torch.tensor([[0, 1]]), torch.tensor([8, 8, 8]))


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
    image = compute_patch_positions_from_grid_thw(torch.tensor([[1, 14, 14]]))
    assert image.dtype == torch.int64 and len(image) == 196
    assert image[[0, 1, -1]].tolist() == [[0, 0, 0], [0, 0, 1], [0, 13, 13]]
    times = torch.tensor([[0, 9], [5, 63]])
    want = [[t, h, w] for t in (0, 9, 5, 63) for h in range(2) for w in range(3)]
    assert compute_patch_positions_with_interpolated_temporal(times, 2, 3).tolist() == want
    with pytest.raises(ValueError, match="must be positive"):
        compute_patch_positions_from_grid_thw(torch.tensor([[1, 0, 3]]))


@pytest.mark.e2e
def test_the_position_helpers_import_without_transformers_and_flash_attention():
    code = (
        "import sys\n"
        "for name in ('transformers', 'flash_attn', 'PIL', 'requests', 'torchvision'):\n"
        "    sys.modules[name] = None\n"
        "from model_factory.convert_llava_vit_packing_to_hf import (\n"
        "    compute_patch_positions_from_grid_thw, interpolate_frame_indices,\n"
        "    compute_patch_positions_with_interpolated_temporal)\n"
    )
    run("-c", code)


def test_half_precision_files_keep_every_bit(model, tmp_path):
    weights = {k: v.bfloat16() for k, v in from_packing(model.state_dict(), "source").items()}
    save_file(weights, tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors")["conv1.weight"].dtype == torch.bfloat16
    lines = convert("llava_vit_tiny_ln", tmp_path / "w.safetensors", tmp_path / "hf", "rotary")
    assert any("bit for bit" in line for line in lines)
