"""The Hugging Face folder: the same numbers before and after, here and in a fresh process."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, run

from model_factory.export_folder import save_encoder_folder
from model_factory.files import CHECKSUMS_NAME
from model_factory.packing import CLIP_MEAN, CLIP_STD
from model_factory.registry import create_model
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingConfig, LlavaViTPackingModel

GRIDS = torch.tensor([[1, 4, 4], [2, 2, 3]])

# runs with none of our packages importable: everything must come out of the folder
FRESH = """
import sys, torch
for name in ("model_factory", "data_pipeline", "training", "eval_encoder"):
    sys.modules[name] = None
from transformers import AutoConfig, AutoModel
folder, attention = sys.argv[1:3]
rows = torch.load(folder + "/rows.pt", weights_only=True)
allowed = {"trust_remote_code": True}  # code that this test itself has just written
model, info = AutoModel.from_pretrained(
    folder, attn_implementation=attention, output_loading_info=True, dtype=torch.float32, **allowed
)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert AutoConfig.from_pretrained(folder, **allowed).rope_pairing == model.config.rope_pairing
with torch.no_grad():
    out = model.eval()(rows, torch.tensor([[1, 4, 4], [2, 2, 3]]), output_hidden_states=True)
torch.save([out.last_hidden_state, out.pooler_output, *out.hidden_states], folder + "/out.pt")
torch.save(model.state_dict(), folder + "/weights.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(1)
    model = create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary").eval()
    folder = tmp_path_factory.mktemp("hf")
    save_encoder_folder(model, folder, {"steps": 7, "command": "train | with a bar"})
    torch.save(torch.randn(28, 768, generator=torch.Generator().manual_seed(5)), folder / "rows.pt")
    return folder, model


def outputs(model, rows):
    with torch.no_grad():
        out = model(rows, GRIDS, output_hidden_states=True)
    return [out.last_hidden_state, out.pooler_output, *out.hidden_states]


@pytest.mark.e2e
@pytest.mark.parametrize(("attention", "name"), [("sdpa", "plain"), ("eager", "mod\u00e8le 1.2-b")])
def test_a_fresh_process_without_our_packages_gets_the_same_numbers(
    folder, attention, name, tmp_path
):
    """Equal to the last digits but one: a library of matrix products may choose other kernels for
    weights that lie elsewhere in memory, mapped from a file here and made by torch there."""
    path, model = shutil.copytree(folder[0], tmp_path / name), folder[1]
    run("-c", FRESH, path, attention, HF_MODULES_CACHE=str(tmp_path))
    model.set_attn_implementation(attention)
    rows = torch.load(path / "rows.pt", weights_only=True)
    theirs = torch.load(path / "out.pt", weights_only=True)
    weights = torch.load(path / "weights.pt", weights_only=True)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    try:
        torch.testing.assert_close(outputs(model, rows), theirs, rtol=1e-5, atol=1e-5)
    finally:
        model.set_attn_implementation("sdpa")


def test_the_modelling_file_names_every_sibling_that_it_needs(folder):
    """transformers 4 copies only what the modelling file names itself."""
    names = r"^\s*from\s+\.(\w+)\s+import"
    files = {path.stem: path.read_text() for path in folder[0].glob("*.py")}
    direct = set(re.findall(names, files["vit_preview_v0_packing_hf"], re.M))
    everything = {found for text in files.values() for found in re.findall(names, text, re.M)}
    assert everything == direct
    assert everything | {"vit_preview_v0_packing_hf"} == set(files)


@pytest.mark.parametrize("keyword", ["torch_dtype", "dtype"])
def test_from_pretrained_returns_the_same_weights_under_both_spellings(folder, keyword):
    path, model = folder
    again = LlavaViTPackingModel.from_pretrained(path, **{keyword: torch.float32}).eval()
    saved = model.state_dict()
    loaded = again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    rows = torch.load(path / "rows.pt", weights_only=True)
    torch.testing.assert_close(outputs(model, rows), outputs(again, rows), rtol=1e-5, atol=1e-5)
    half = LlavaViTPackingModel.from_pretrained(path, **{keyword: torch.bfloat16})
    assert half.dtype == torch.bfloat16


def test_flash_attention_is_asked_for_by_name_or_refused_by_name(folder):
    """Where flash-attn is missing or the device is a CPU, nothing else silently takes its place."""
    with pytest.raises((ImportError, ValueError), match="(?i)flash"):
        model = LlavaViTPackingModel.from_pretrained(
            folder[0], attn_implementation="flash_attention_2", dtype=torch.float32
        )
        model(torch.zeros(16, 768), GRIDS[:1])


@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_weights_that_do_not_fit_are_never_left_random(folder, tmp_path, fault):
    from safetensors.torch import load_file, save_file

    save_encoder_folder(folder[1], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = "encoder.layers.1.mlp.fc1.bias"
    if fault == "missing":
        del weights[key]
    elif fault == "unexpected":
        weights[key := "encoder.layers.7.mlp.fc1.bias"] = torch.zeros(512)
    else:
        weights[key] = torch.zeros(511)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / CHECKSUMS_NAME).unlink()
    with pytest.raises(ValueError, match=f"{fault}: {key}"):
        LlavaViTPackingModel.from_pretrained(tmp_path)


def test_the_head_can_be_left_out(folder):
    model = LlavaViTPackingModel.from_pretrained(folder[0], use_head=False)
    assert model(torch.zeros(16, 768), GRIDS[:1]).pooler_output is None


def test_every_config_field_survives_the_round_trip(tmp_path):
    config = LlavaViTPackingConfig(
        hidden_size=96,
        num_attention_heads=3,
        head_norm_eps=None,
        rope_pairing="rotary",
        rope_position_scale=0.5,
        layer_norm_type="rms_norm",
    )
    config.save_pretrained(tmp_path)
    again = LlavaViTPackingConfig.from_pretrained(tmp_path)
    for name in LlavaViTPackingConfig.own_fields():
        assert getattr(again, name) == getattr(config, name), name


def test_a_config_without_a_rotary_rule_means_the_public_one(folder, tmp_path):
    described = json.loads((folder[0] / "config.json").read_text())
    del described["rope_pairing"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert LlavaViTPackingConfig.from_pretrained(tmp_path).rope_pairing == "legacy"


def test_the_image_processor_is_saved_beside_and_loads(folder):
    from transformers import AutoImageProcessor

    described = json.loads((folder[0] / "preprocessor_config.json").read_text())
    assert described["image_mean"] == list(CLIP_MEAN) and described["image_std"] == list(CLIP_STD)
    assert described["crop_size"] == {"height": 448, "width": 448}
    try:
        processor = AutoImageProcessor.from_pretrained(folder[0], use_fast=False)
    except ImportError:
        pytest.skip("this transformers cannot build an image processor without torchvision")
    assert tuple(processor.image_mean) == CLIP_MEAN


def test_the_model_card_tells_shapes_preprocessing_and_run_and_its_example_runs(folder):
    card = (folder[0] / "README.md").read_text()
    for part in (
        "| hidden_size | 128 |",
        "| rope_pairing | rotary |",
        "| steps | 7 |",
        r"| command | train \| with a bar |",
        str(CLIP_MEAN),
    ):
        assert part in card
    example = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("PATH", str(folder[0]))
    exec(compile(example, "model card", "exec"), {})


def test_our_own_tools_never_ask_to_trust_remote_code():
    for package in ("model_factory", "data_pipeline", "training", "eval_encoder", "shells"):
        for path in (ROOT / package).rglob("*.*"):
            if path.suffix in (".py", ".sh"):
                assert "trust_remote_code=" not in path.read_text(), path
