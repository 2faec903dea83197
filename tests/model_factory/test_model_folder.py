"""What we read of a model's folder is as it was written, and nothing of it is executed."""

import random
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
import transformers
from hostile_folders import add_code, change_json, flip, write_pickle
from safetensors.torch import load_file, save_file

from model_factory.backbone import load_backbone, save_backbone
from model_factory.export_folder import image_processor_json, save_encoder_folder
from model_factory.export_llava_tower import main as export_tower
from model_factory.files import CHECKSUMS_NAME
from model_factory.hf_image_encoders import load_image_encoder
from model_factory.llava.tower_folder import read_language
from model_factory.llava_vision_tower import tower_or_none
from model_factory.model_folder import check_model_folder, seal_folder
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingConfig, LlavaViTPackingModel

pytestmark = pytest.mark.usefixtures("quick_tower_check")
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
SHAPE |= dict(image_size=32, patch_size=8)
FLAGS = SimpleNamespace(mm_vision_select_layer=-1)  # of an original LLaVA


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder with hf/, and backbone.pt with what lies beside it; the model."""
    torch.manual_seed(0)
    model = LlavaViTPackingModel(LlavaViTPackingConfig(**SHAPE)).eval()
    folder = tmp_path_factory.mktemp("exported")
    save_encoder_folder(model, folder / "hf")
    save_backbone(model, folder / "backbone.pt")
    return folder, model


@pytest.fixture
def ours(exported, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(exported[0], tmp_path / "ours")


@pytest.fixture
def clip(tmp_path):
    """A public folder, without checksums."""
    folder = tmp_path / "clip"
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SHAPE)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(image_processor_json(32))
    return folder


def load(folder):
    return LlavaViTPackingModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def is_same(model, other):
    weights = other.state_dict()
    equal = all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    return equal and model.config.to_diff_dict() == other.config.to_diff_dict()


def test_none_of_40_flips_over_an_exported_folder_is_loaded(ours):
    whole, draw = load(ours / "hf"), random.Random(0)
    read = ("config.json", "preprocessor_config.json", "model.safetensors")
    for name in [*read * 3, *["model.safetensors"] * 16]:
        written = flip(ours / "hf" / name, draw.randrange(1 << 30))
        with pytest.raises(ValueError, match=f"{name} changed since it was written"):
            load(ours / "hf")
        (ours / "hf" / name).write_bytes(written)
    said = 0
    for _ in range(15):  # of the list itself: an error, or a line that is not about what is read
        written = flip(ours / "hf" / CHECKSUMS_NAME, draw.randrange(1 << 30))
        try:
            assert is_same(load(ours / "hf"), whole)
        except ValueError as error:
            said += 1
            assert CHECKSUMS_NAME in str(error)
        (ours / "hf" / CHECKSUMS_NAME).write_bytes(written)
    assert said


def test_none_of_40_flips_over_a_backbone_is_loaded(ours):
    path, draw = ours / "backbone.pt", random.Random(0)
    assert is_same(load_backbone(path, None), load_backbone(path, None))
    names = ["backbone.pt"] * 24 + ["backbone.json", "backbone.pt.sha256"] * 8
    for name in names:
        written = flip(ours / name, draw.randrange(1 << 30))
        with pytest.raises(ValueError, match=r"backbone\.(pt|json)"):
            load_backbone(path, None)
        (ours / name).write_bytes(written)


def test_sha256sum_checks_an_export_too(exported):
    for folder, listing in ((exported[0] / "hf", CHECKSUMS_NAME), (exported[0], "*.sha256")):
        (path,) = folder.glob(listing)
        command = ["sha256sum", "--check", "--strict", "--quiet", path.name]
        assert subprocess.run(command, cwd=folder).returncode == 0


def test_a_file_that_is_lost_or_foreign_is_named_and_what_nobody_reads_may_change(ours):
    folder = ours / "hf"
    (folder / "README.md").write_text("mine")
    (folder / "notes.json").write_text("{")
    (folder / "layers.py").write_text("raise ImportError")
    load(folder)
    (folder / "preprocessor_config.json").rename(ours / "kept.json")
    with pytest.raises(ValueError, match="preprocessor_config.json is listed there and absent"):
        load(folder)
    (ours / "kept.json").rename(folder / "preprocessor_config.json")
    # transformers would read each of these in place of, or beside, what was written
    for name in ("shard-00001-model-00001-of-00001.safetensors", "generation_config.json"):
        (folder / name).write_text("{}")
        with pytest.raises(ValueError, match=f"{name} is not listed"):
            load(folder)
        (folder / name).unlink()
    (ours / "backbone.json").unlink()
    with pytest.raises(ValueError, match="backbone.json is listed there and absent"):
        load_backbone(ours / "backbone.pt", "llava_vit_tiny_ln")


def test_the_advice_to_remove_the_list_lets_a_change_of_ones_own_be_read(ours):
    change_json(ours / "hf" / "config.json", image_size=64)
    with pytest.raises(ValueError, match="if the change is yours, remove SHA256SUMS"):
        load(ours / "hf")
    (ours / "hf" / CHECKSUMS_NAME).unlink()
    assert load(ours / "hf").config.image_size == 64


def test_weights_of_a_folder_that_are_named_as_a_file_are_checked_as_well(ours):
    path = ours / "hf" / "model.safetensors"
    (ours / "hf" / "model.json").write_text((ours / "backbone.json").read_text())
    with pytest.raises(ValueError, match="model.json is not listed"):
        load_backbone(path, None)
    seal_folder(ours / "hf", also=["model.json"])
    load_backbone(path, None)
    flip(path, 1 << 15)
    with pytest.raises(ValueError, match="model.safetensors changed"):
        load_backbone(path, None)


def test_a_converted_folder_and_both_towers_are_bound(exported, clip, tmp_path):
    for source, output in ((exported[0] / "hf", "a"), (clip, "b")):
        assert export_tower([str(source), "--output_dir", str(tmp_path / output)]) == 0
    for folder in (tmp_path / "a", tmp_path / "a/tower", tmp_path / "b/tower_legacy"):
        check_model_folder(folder, own_classes=True)
        flip(folder / "config.json", 100)
        with pytest.raises(ValueError, match="config.json changed"):
            check_model_folder(folder, own_classes=True)
    with pytest.raises(ValueError, match="config.json changed"):
        tower_or_none(str(tmp_path / "a/tower"), FLAGS)


def test_code_in_a_folder_of_ours_is_never_executed(ours, tmp_path):
    mark = tmp_path / "mark"
    for path in (ours / "hf").glob("*.py"):
        path.write_text(f"open({str(mark)!r}, 'w')\n" + path.read_text())
    load(ours / "hf")
    assert tower_or_none(str(ours / "hf"), FLAGS).is_loaded
    assert export_tower([str(ours / "hf"), "--output_dir", str(tmp_path / "tower")]) == 0
    assert not mark.exists()


@pytest.mark.parametrize("described", ["config.json", "preprocessor_config.json"])
def test_a_folder_whose_model_is_code_is_refused_and_named(clip, tmp_path, described, capsys):
    add_code(clip, described, tmp_path / "mark")
    with pytest.raises(ValueError, match=rf"{described} names code of its own.*without auto_map"):
        load_image_encoder("clip", clip)
    assert export_tower([str(clip), "--output_dir", str(tmp_path / "tower")]) == 1
    assert f"{described} names code of its own" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists() and not (tmp_path / "tower").exists()


def test_code_of_a_part_and_of_a_preprocessor_of_ours_is_refused_too(clip, ours, tmp_path):
    change_json(clip / "config.json", text_config={"auto_map": {"AutoModel": "hostile.Model"}})
    with pytest.raises(ValueError, match="config.json names code"):
        load_image_encoder("clip", clip)
    (ours / "hf" / CHECKSUMS_NAME).unlink()
    add_code(ours / "hf", "preprocessor_config.json", tmp_path / "mark")
    with pytest.raises(ValueError, match="preprocessor_config.json names code"):
        load(ours / "hf")


@pytest.mark.parametrize("described", ["config.json", "tokenizer_config.json"])
def test_a_language_model_with_code_is_refused(tmp_path, described):
    transformers.LlamaConfig(vocab_size=8).save_pretrained(tmp_path)
    add_code(tmp_path, described, tmp_path / "mark")
    with pytest.raises(ValueError, match=f"{described} names code"):
        read_language(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_adapters_and_kernels_of_other_hosts_are_refused(clip):
    change_json(clip / "config.json", attn_implementation="someone/kernel")
    with pytest.raises(ValueError, match=r"config.json asks for code.*someone/kernel"):
        load_image_encoder("clip", clip)
    change_json(clip / "config.json", attn_implementation="sdpa")
    load_image_encoder("clip", clip)
    change_json(clip / "adapter_config.json", base_model_name_or_path="../other")
    with pytest.raises(ValueError, match="adapter_config.json: adapters are not read"):
        load_image_encoder("clip", clip)


def test_pickles_are_no_weights_of_a_folder(clip, ours, tmp_path):
    for folder in (clip, ours / "hf"):
        weights = load_file(folder / "model.safetensors")
        write_pickle(folder / "pytorch_model.bin", tmp_path / "mark", weights)
        (folder / CHECKSUMS_NAME).unlink(missing_ok=True)
    load_image_encoder("clip", clip)
    load(ours / "hf")  # with safetensors beside it a pickle is not looked at
    for folder in (clip, ours / "hf"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle.*safetensors"):
        load_image_encoder("clip", clip)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle.*safetensors"):
        load(ours / "hf")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["ours", "published", "clip"])
@pytest.mark.parametrize("shard", ["../outside.safetensors", "/outside.safetensors", "code.bin", 3])
def test_shards_outside_of_a_folder_are_refused(ours, clip, tmp_path, kind, shard):
    folder = clip if kind == "clip" else ours / "hf"
    (folder / CHECKSUMS_NAME).unlink(missing_ok=True)
    if kind == "published":
        change_json(folder / "config.json", model_type="llava_vit")
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder.parent / "outside.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    change_json(index, metadata={}, weight_map=dict.fromkeys(weights, shard))
    with pytest.raises(ValueError, match=r"index\.json names .* as a shard: only"):
        load_image_encoder("clip", folder) if kind == "clip" else load(folder)


def test_shards_inside_of_a_folder_are_read_and_bound(ours, exported):
    folder = ours / "hf"
    (folder / "model.safetensors").unlink()
    exported[1].save_pretrained(folder, max_shard_size="100KB")
    seal_folder(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and is_same(load(folder), exported[1])
    flip(shards[-1], 12345)
    with pytest.raises(ValueError, match=f"{shards[-1].name} changed"):
        load(folder)
