"""The tower inside LLaVA: the original contract, and transformers' own Llava in a fresh process."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import run

from model_factory.export_folder import save_encoder_folder
from model_factory.llava_vision_tower import (
    LlavaViTVisionConfig,
    LlavaViTVisionModel,
    LlavaViTVisionTower,
    tower_or_none,
)
from model_factory.packing import patchify
from model_factory.registry import packing_config
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported encoder of two layers, 64 px, patch 16."""
    place = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = packing_config("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary")
    config.num_hidden_layers, config.image_size = 2, 64
    save_encoder_folder(LlavaViTPackingModel(config).eval(), place)
    return place


def args(**fields):
    return SimpleNamespace(**{"mm_vision_select_layer": -1, **fields})


def test_a_delayed_tower_knows_its_shape_and_loads_once(folder):
    tower = LlavaViTVisionTower(str(folder), args(), delay_load=True)
    assert not tower.is_loaded and tower.vision_tower is None
    assert (tower.hidden_size, tower.num_patches_per_side, tower.num_patches) == (128, 4, 16)
    tower.load_model()
    first = tower.vision_tower
    tower.load_model()
    assert tower.vision_tower is first and tower.is_loaded
    stored = LlavaViTPackingModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(t, stored[n]) for n, t in first.packing.state_dict().items())
    assert not any(p.requires_grad for p in tower.parameters())
    assert tower.dummy_feature.shape == (1, 128)
    processor = tower.image_processor
    assert processor.crop_size["height"] == 64 and len(processor.image_mean) == 3


@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
def test_features_are_the_hidden_states_of_the_encoder(folder, layer):
    tower = LlavaViTVisionTower(str(folder), args(mm_vision_select_layer=layer))
    images = torch.randn(2, 3, 64, 64)
    encoder = LlavaViTPackingModel.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = patchify(images, 16)
        wanted = []
        for row in rows:
            out = encoder(row, torch.tensor([[1, 4, 4]]), output_hidden_states=True)
            normed = layer == -1  # what the pooling head was trained on
            wanted.append(out.last_hidden_state if normed else out.hidden_states[layer])
    found = tower(images)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    listed = tower([images[0], images[1]])
    assert [tuple(one.shape) for one in listed] == [(1, 16, 128)] * 2
    torch.testing.assert_close(torch.cat(listed), found, rtol=1e-4, atol=1e-5)
    same = LlavaViTVisionTower(
        str(folder), args(mm_vision_select_layer=layer, mm_vision_select_feature="cls_patch")
    )
    assert torch.equal(same(images), found) and found.dtype == images.dtype
    assert tower(images.half()).dtype == torch.float16
    assert tower(torch.randn(1, 3, 32, 96)).shape == (1, 12, 128)


def test_what_is_not_ours_or_not_known_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="patch or cls_patch"):
        LlavaViTVisionTower(str(folder), args(mm_vision_select_feature="cls"))
    with pytest.raises(ValueError, match="60x64 is no multiple of the patch size 16"):
        LlavaViTVisionTower(str(folder), args())(torch.randn(1, 3, 60, 64))
    assert tower_or_none("openai/clip-vit-large-patch14-336", args()) is None
    assert tower_or_none(str(tmp_path), args()) is None
    assert isinstance(tower_or_none(str(folder), args(), delay_load=True), LlavaViTVisionTower)


def test_clips_of_frames_or_codec_patches_are_packed(folder):
    tower = LlavaViTVisionTower(str(folder), args())
    lengths = (20, 7)
    rows = torch.randn(27, 768)
    positions = torch.stack([torch.arange(27) * 2, torch.arange(27) % 4, torch.arange(27) % 3], 1)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    together = tower.video(rows, positions, bounds)
    assert [len(features) for features in together] == list(lengths)
    alone = tower.video(rows[20:], positions[20:], torch.tensor([0, 7], dtype=torch.int32))
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)


def llava(encoder, post_norm=True):
    """transformers' own Llava with a tiny language model and our tower."""
    vision = LlavaViTVisionConfig.of(encoder.config, post_norm)
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=63, vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_seq_length=16,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tower = model.model.vision_tower
    assert isinstance(tower, LlavaViTVisionModel)
    tower.packing.load_state_dict(encoder.state_dict())
    return model


@pytest.mark.parametrize("post_norm", [True, False])
def test_llava_reads_the_state_that_was_asked_for(folder, post_norm):
    encoder = LlavaViTPackingModel.from_pretrained(folder).eval()
    model = llava(encoder, post_norm)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=images)
        out = encoder(patchify(images, 16)[0], torch.tensor([[1, 4, 4]]), output_hidden_states=True)
        state = out.last_hidden_state if post_norm else out.hidden_states[-1]
        wanted = model.model.multi_modal_projector(state)
    features = getattr(features, "pooler_output", features)
    torch.testing.assert_close(features[0].view(16, 32), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.e2e
def test_a_saved_llava_is_whole_in_a_fresh_process(folder, tmp_path):
    model = llava(LlavaViTPackingModel.from_pretrained(folder).eval())
    model.save_pretrained(tmp_path / "llava")
    ids = torch.tensor([[1, *[63] * 16, 5, 6]])
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=images).logits
    torch.save({"ids": ids, "images": images, "logits": logits}, tmp_path / "wanted.pt")
    script = tmp_path / "fresh.py"
    script.write_text(
        "import sys, torch, transformers\n"
        "import model_factory.llava_vision_tower\n"
        "loaded, info = transformers.LlavaForConditionalGeneration.from_pretrained(\n"
        "    sys.argv[1] + '/llava', local_files_only=True, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "wanted = torch.load(sys.argv[1] + '/wanted.pt', weights_only=True)\n"
        "with torch.no_grad():\n"
        "    out = loaded.eval()(input_ids=wanted['ids'], pixel_values=wanted['images']).logits\n"
        "print('difference', (out - wanted['logits']).abs().max().item())\n"
        "assert torch.allclose(out, wanted['logits'], atol=1e-5)\n"
    )
    assert "difference" in run(script, tmp_path).stdout
