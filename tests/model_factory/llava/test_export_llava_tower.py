"""The eye of a LLaVA as a folder: whole, the same numbers, ready to be read by all who read it."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import run
from forked import forked
from safetensors.torch import load_file, save_file

from model_factory.backbone import save_backbone
from model_factory.export_folder import image_processor_json, save_encoder_folder
from model_factory.export_llava_tower import main
from model_factory.files import CHECKSUMS_NAME
from model_factory.llava.tower_check import check_folder
from model_factory.llava.tower_check import main as check_main
from model_factory.llava_vision_tower import LlavaViTVisionTower, tower_or_none
from model_factory.packing import patchify
from model_factory.registry import packing_config
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

pytestmark = pytest.mark.usefixtures("quick_tower_check")
SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
TEXT = dict(SHAPE, vocab_size=50, max_position_embeddings=8, projection_size=32)
# name: what makes the model, its picture's side, patch size, tokens
NATIVE = {
    "clip": ("CLIPVision", 32, 8, 16),
    "siglip": ("SiglipVision", 32, 8, 16),
    "dinov2": ("Dinov2", 28, 14, 4),
}
KINDS = ("ours", "backbone", "clip", "whole clip", "siglip", "dinov2")
READ = {"ours": (-1, "full"), "backbone": (-1, "full"), "siglip": (-2, "full")}  # others:
CLASS_TOKEN = (-2, "default")
LEGACY = {"clip": "CLIPVisionModel", "whole clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


def native(name, folder):
    """A public model with random weights, and an image processor beside it."""
    torch.manual_seed(0)
    kind, side, patch, _ = NATIVE[name]
    config = getattr(transformers, f"{kind}Config")(**SHAPE, image_size=side, patch_size=patch)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():  # some layers start at zero and would hide an error
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(image_processor_json(side))


def make_source(kind, place):
    """The folder or file that is exported."""
    if kind in NATIVE:
        native(kind, place)
        return place
    if kind == "whole clip":
        vision = dict(SHAPE, image_size=32, patch_size=8)
        torch.manual_seed(1)
        config = transformers.CLIPConfig(vision_config=vision, text_config=TEXT)
        transformers.CLIPModel(config).save_pretrained(place)
        (place / "preprocessor_config.json").write_text(image_processor_json(32))
        return place
    torch.manual_seed(0)
    config = packing_config("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary")
    config.num_hidden_layers, config.image_size = 2, 64
    encoder = LlavaViTPackingModel(config).eval()
    if kind == "ours":
        save_encoder_folder(encoder, place)
        return place
    place.mkdir()
    save_backbone(encoder, place / "backbone.pt")
    return place / "backbone.pt"


def source_features(kind, source, pixels):
    """Hidden state that a LLaVA has to read, said by the source."""
    layer, strategy = READ.get(kind, CLASS_TOKEN)
    if kind in ("ours", "backbone"):
        folder = source if kind == "ours" else source.parent.parent / "ours"
        encoder = LlavaViTPackingModel.from_pretrained(folder).eval()
        with torch.no_grad():
            out = encoder(patchify(pixels, 16)[0], torch.tensor([[1, 4, 4]]))
        return out.last_hidden_state[None]
    name = NATIVE.get(kind, NATIVE["clip"])[0]
    model = getattr(transformers, f"{name}Model").from_pretrained(source).eval()
    with torch.no_grad():
        state = model(pixels, output_hidden_states=True).hidden_states[layer]
    return state[:, 1:] if strategy == "default" else state


@pytest.fixture(scope="module")
def place(quick_tower_check, tmp_path_factory):
    """Every kind's source, and DIR of its export: KIND and KIND.out."""
    place = tmp_path_factory.mktemp("eyes")
    for kind in KINDS:
        source = make_source(kind, place / kind)
        assert main([str(source), "--output_dir", str(place / f"{kind}.out")]) == 0
    return place


def source_of(place, kind):
    return place / kind / "backbone.pt" if kind == "backbone" else place / kind


def pictures(folder):
    """One normalised picture of the side that the folder's processor makes."""
    side = json.loads((folder / "tower" / "preprocessor_config.json").read_text())["crop_size"]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 3, side["height"], side["width"], generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_holds_its_files_and_no_other(place, kind):
    folder = place / f"{kind}.out"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    parts = ("config.json", "model.safetensors", "preprocessor_config.json", CHECKSUMS_NAME)
    towers = ("tower", "tower_legacy") if kind in LEGACY else ("tower",)
    wanted = {f"{tower}/{name}" for tower in towers for name in parts}
    assert found == wanted | {"config.json", "processor_config.json", "README.md", CHECKSUMS_NAME}
    processor = json.loads((folder / "tower" / "preprocessor_config.json").read_text())
    assert {"crop_size", "size", "image_mean", "image_std"} <= processor.keys()
    assert "shortest_edge" in processor["size"]
    assert str(place.parent) not in "".join(p.read_text() for p in folder.rglob("*.json"))
    assert not list(place.glob(".*")), "a folder that was not proven is left"


@pytest.mark.parametrize("kind", KINDS)
def test_a_llava_of_the_written_configuration_reads_the_sources_features(place, kind):
    """LlavaForConditionalGeneration of config.json, its language model made small."""
    folder = place / f"{kind}.out"
    config = transformers.LlavaConfig.from_pretrained(folder)
    layer, strategy = READ.get(kind, CLASS_TOKEN)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (layer, strategy)
    assert config.image_token_index == 32000 and config.text_config.vocab_size == 32064
    tiny = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=64)
    config.text_config, config.image_token_index = tiny, 63
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tower, info = transformers.AutoModel.from_pretrained(
        folder / "tower", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[f"{name}_keys"] for name in ("missing", "unexpected", "mismatched")), info
    model.model.vision_tower.load_state_dict(tower.state_dict())  # strict
    pixels = pictures(folder)
    features = source_features(kind, source_of(place, kind), pixels)
    with torch.no_grad():
        states = tower.eval()(pixels, output_hidden_states=True).hidden_states[layer]
        read = states[:, 1:] if strategy == "default" else states
        projected = model.get_image_features(pixel_values=pixels)
        wanted = model.model.multi_modal_projector(features)[0]
    torch.testing.assert_close(read, features, rtol=0, atol=1e-5)
    projected = getattr(projected, "pooler_output", projected)[0]
    torch.testing.assert_close(projected.view(wanted.shape), wanted, rtol=0, atol=1e-5)
    tokens = NATIVE.get(kind, (None,) * 3 + (16,))[3]
    assert config.image_seq_length == len(wanted) == tokens
    ids = torch.tensor([[1, *[63] * tokens, 5]])
    with torch.no_grad():
        assert model(input_ids=ids, pixel_values=pixels).logits.isfinite().all()
    fields = json.loads((folder / "processor_config.json").read_text())
    side = pixels.shape[-1] // fields["patch_size"]
    count = side**2 + fields["num_additional_image_tokens"]
    assert fields["vision_feature_select_strategy"] == strategy
    assert count - (strategy == "default") == tokens


@pytest.mark.parametrize("kind", LEGACY)
def test_the_legacy_file_has_the_prefix_and_loads_whole(place, kind):
    folder = place / f"{kind}.out"
    weights = load_file(folder / "tower_legacy" / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in weights)
    assert not any(name.count("vision_model.") > 1 for name in weights)
    read = getattr(transformers, LEGACY[kind]).from_pretrained
    model, info = read(folder / "tower_legacy", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    pixels = pictures(folder)
    with torch.no_grad():
        state = model.eval()(pixels, output_hidden_states=True).hidden_states[-2]
    features = source_features(kind, place / kind, pixels)
    torch.testing.assert_close(state[:, "clip" in kind :], features, rtol=0, atol=1e-5)


def test_the_original_contract_reads_an_exported_tower_of_ours(place):
    args = SimpleNamespace(mm_vision_select_layer=-1)
    exported = tower_or_none(str(place / "ours.out" / "tower"), args, delay_load=True)
    assert isinstance(exported, LlavaViTVisionTower) and not exported.is_loaded
    assert (exported.hidden_size, exported.num_patches) == (128, 16)
    exported.load_model()
    pixels = pictures(place / "ours.out")
    assert torch.equal(exported(pixels), tower_or_none(str(place / "ours"), args)(pixels))


def test_without_post_norm_the_features_are_the_last_blocks_output(place, tmp_path, capfd):
    output = tmp_path / "eye"
    assert main([str(place / "ours"), "--output_dir", str(output), "--no-post_norm"]) == 0
    assert re.search(r"tower: all 39 tensors, 16 tokens, difference \S+\n", capfd.readouterr().out)
    assert transformers.LlavaConfig.from_pretrained(output).vision_config.post_norm is False
    pixels = pictures(output)
    encoder = LlavaViTPackingModel.from_pretrained(place / "ours").eval()
    args = SimpleNamespace(mm_vision_select_layer=-1)
    with torch.no_grad():
        rows, grid = patchify(pixels, 16)[0], torch.tensor([[1, 4, 4]])
        wanted = encoder(rows, grid, output_hidden_states=True).hidden_states[-1]
        state = tower_or_none(str(output / "tower"), args)(pixels)[0]
    torch.testing.assert_close(state, wanted, rtol=0, atol=1e-5)


def without(name, folder, copy):
    """A copy of a folder that lacks the tensor whose name ends so; its whole name."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    missing = next(key for key in weights if key.endswith(name))
    del weights[missing]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return missing.removeprefix("vision_model.")


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [("ours", "layers.1.mlp.fc1.bias"), ("clip", "layers.1.mlp.fc1.bias"),
     ("siglip", "post_layernorm.weight"), ("dinov2", "embeddings.cls_token")],
)  # fmt: skip
def test_a_source_without_a_tensor_is_refused_by_its_name(place, tmp_path, kind, tensor, capfd):
    folder = place / kind
    if kind == "ours":
        names = load_file(folder / "model.safetensors")
        tensor = next(name for name in names if "layers.1." in name and name.endswith(".bias"))
    missing = without(tensor, folder, tmp_path / "damaged")
    (tmp_path / "damaged" / CHECKSUMS_NAME).unlink(missing_ok=True)
    assert main([str(tmp_path / "damaged"), "--output_dir", str(tmp_path / "eye")]) == 1
    said = capfd.readouterr().err
    assert "error: " in said and missing in said and str(tmp_path / "damaged") in said
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_damaged_file_or_another_shape_is_refused_without_a_trace(place, tmp_path, capfd):
    for kind in ("ours", "clip"):
        copy = tmp_path / kind
        shutil.copytree(place / kind, copy)
        weights = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        assert main([str(copy), "--output_dir", str(tmp_path / "eye")]) == 1
        assert str(copy) in capfd.readouterr().err
    (tmp_path / "clip" / "model.safetensors").write_bytes(weights)
    config = json.loads((place / "clip" / "config.json").read_text())
    (tmp_path / "clip" / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert main([str(tmp_path / "clip"), "--output_dir", str(tmp_path / "eye")]) == 1
    assert f"{tmp_path / 'clip'} cannot be read" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "ours"]


def reference_of(folder, place):
    """Pictures and features of an exported tower, as the exporter stores them for the check."""
    pixels = pictures(folder)
    model = transformers.AutoModel.from_pretrained(folder / "tower").eval()
    with torch.no_grad():
        features = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    tensors = {"pixel_values": pixels, "features": features.contiguous()}
    save_file(tensors, place / "reference.safetensors")
    return place / "reference.safetensors"


def test_the_check_finds_what_a_folder_lacks_or_changes(place, tmp_path, capsys):
    folder = tmp_path / "eye"
    shutil.copytree(place / "clip.out", folder)
    reference = reference_of(folder, tmp_path)
    assert len(check_folder(folder, reference)) == 2
    for listing in folder.rglob(CHECKSUMS_NAME):
        listing.unlink()
    legacy = folder / "tower_legacy" / "model.safetensors"
    weights = load_file(legacy)
    name = next(key for key in weights if key.endswith("layers.0.mlp.fc2.weight"))
    changed = {**weights, name: weights[name] + 1e-3}
    for tensors, message in (
        (changed, "differs from its source by"),
        ({key: value for key, value in weights.items() if key != name}, "layers.0.mlp.fc2.weight"),
        ({**weights, "vision_model.surplus": torch.zeros(1)}, "surplus"),
    ):
        save_file(tensors, legacy, metadata={"format": "pt"})
        assert check_main([str(folder), str(reference)]) == 1
        assert message in capsys.readouterr().err
    save_file(weights, legacy, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_seq_length": 15}))
    with pytest.raises(ValueError, match="16 tokens for the 32x32 pixels .* says 15"):
        check_folder(folder, reference)


def test_what_exists_is_not_touched(place, tmp_path, capsys):
    (tmp_path / "eye").mkdir()
    (tmp_path / "eye" / "note").write_text("mine")
    assert main([str(place / "ours"), "--output_dir", str(tmp_path / "eye")]) == 1
    assert f"error: {tmp_path / 'eye'} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["eye", "note"]


def test_what_cannot_be_an_eye_is_refused(place, tmp_path, capfd):
    def error_of(source, *options):
        assert main([str(source), "--output_dir", str(tmp_path / "eye"), *map(str, options)]) == 1
        assert not (tmp_path / "eye").exists()
        return capfd.readouterr().err

    vit = transformers.ViTConfig(**SHAPE, image_size=32, patch_size=8)
    transformers.ViTModel(vit).save_pretrained(tmp_path / "vit")
    assert "is a vit model; a tower can be one of clip, siglip" in error_of(tmp_path / "vit")
    shape = dict(SHAPE, image_size=28, patch_size=14, num_register_tokens=4)
    config = transformers.Dinov2WithRegistersConfig(**shape)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "registers")
    assert "has 4 register tokens" in error_of(tmp_path / "registers")
    assert "--no-post_norm is for encoders of ours" in error_of(place / "clip", "--no-post_norm")
    assert "config.json does not exist: give RUN/hf" in error_of(tmp_path / "absent")
    shutil.copyfile(place / "backbone" / "backbone.pt", tmp_path / "alone.pt")
    assert "alone.json does not exist" in error_of(tmp_path / "alone.pt")
    shutil.copytree(place / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    assert "put the model's image processor there" in error_of(tmp_path / "clip")
    (tmp_path / "config.json").write_text('{"model_type": "new", "auto_map": {}}')
    for folder, said in ((tmp_path, "(new)"), (tmp_path / "absent", "(None)")):
        assert said in error_of(place / "ours", "--language_model", folder)
    assert "vit model without vocab_size" in error_of(
        place / "ours", "--language_model", tmp_path / "vit"
    )


def test_a_processor_that_does_not_crop_to_a_square_is_refused(place, tmp_path, capfd):
    shutil.copytree(place / "dinov2", tmp_path / "dinov2")
    path = tmp_path / "dinov2" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_center_crop": False}))
    assert main([str(tmp_path / "dinov2"), "--output_dir", str(tmp_path / "eye")]) == 1
    assert "must crop to a square" in capfd.readouterr().err
    assert not (tmp_path / "eye").exists()


def test_the_processors_picture_size_counts_not_the_models(place, tmp_path):
    """DINOv2 is stored for 518 pixels and read at 224."""
    shutil.copytree(place / "dinov2", tmp_path / "dinov2")
    described = image_processor_json(56)
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text(described)
    assert main([str(tmp_path / "dinov2"), "--output_dir", str(tmp_path / "eye")]) == 0
    assert transformers.LlavaConfig.from_pretrained(tmp_path / "eye").image_seq_length == 16


@pytest.mark.e2e
def test_the_command_runs_by_path(place, tmp_path):
    command = "model_factory/export_llava_tower.py"
    done = forked(command, place / "siglip", "--output_dir", tmp_path / "eye")
    assert f"written: {tmp_path / 'eye'}" in done.stdout and "64 tensors" in done.stdout
    again = forked(command, place / "siglip", "--output_dir", tmp_path / "eye", check=False)
    assert again.returncode == 1 and "exists" in again.stderr


def test_help_imports_nothing_heavy():
    done = run("-X", "importtime", "model_factory/export_llava_tower.py", "--help")
    assert "--language_model" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers", "safetensors"}
