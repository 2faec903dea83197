"""Frozen baselines: one call over tiny random models of every family, saved by the test itself."""

import json

import pytest
import torch
import transformers
from conftest import run

from model_factory.hf_image_encoders import (
    FAMILIES,
    HALF_NORM,
    IMAGENET_NORM,
    load_image_encoder,
    naflex_grid,
)
from model_factory.packing import CLIP_MEAN, CLIP_STD

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(SHAPE, vocab_size=50, max_position_embeddings=8, projection_size=32)
CLIP_NORM = (CLIP_MEAN, CLIP_STD)

# name: family, vision class, its fields, tokens to strip, normalisation
CASES = {
    "clip": ("clip", "CLIPVision", dict(image_size=32, patch_size=8), 1, CLIP_NORM),
    "metaclip": ("metaclip", "CLIPVision", dict(image_size=32, patch_size=8), 1, CLIP_NORM),
    "metaclip 2": ("metaclip", "MetaClip2Vision", dict(image_size=32, patch_size=8), 1, CLIP_NORM),
    "siglip": ("siglip", "SiglipVision", dict(image_size=32, patch_size=8), 0, HALF_NORM),
    "siglip2": ("siglip2", "SiglipVision", dict(image_size=32, patch_size=8), 0, HALF_NORM),
    "dinov2": ("dinov2", "Dinov2", dict(image_size=28, patch_size=14), 1, IMAGENET_NORM),
    "dinov2 registers": (
        "dinov2",
        "Dinov2WithRegisters",
        dict(image_size=28, patch_size=14, num_register_tokens=4),
        5,
        IMAGENET_NORM,
    ),
    "dinov3": (
        "dinov3",
        "DINOv3ViT",
        dict(image_size=32, patch_size=8, num_register_tokens=4),
        5,
        IMAGENET_NORM,
    ),
    "aimv2": ("aimv2", "Aimv2Vision", dict(image_size=32, patch_size=8), 0, CLIP_NORM),
}


def build(name, **fields):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **fields})
    model = getattr(transformers, f"{name}Model")(config).eval()
    for parameter in model.parameters():  # some layers start at zero and would hide an error
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def frames(height, width, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def normalised(pixels, norm):
    mean, std = (torch.tensor(values)[:, None, None] for values in norm)
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_the_models_own_patch_tokens(case, tmp_path):
    family, name, fields, extra, norm = CASES[case]
    model = build(name, **fields)
    model.save_pretrained(tmp_path)
    side = fields["image_size"]
    encoder = load_image_encoder(family, tmp_path)
    tokens = encoder.encode(frames(side, side))
    with torch.no_grad():
        want = model(pixel_values=normalised(frames(side, side), norm)).last_hidden_state[:, extra:]
    assert tokens.shape == (2, (side // fields["patch_size"]) ** 2, 32)
    assert torch.allclose(tokens, want, atol=1e-5)
    assert torch.allclose(tokens, encoder(frames(side, side) / 255), atol=1e-5)  # floats in 0..1
    assert encoder.encode(frames(2 * side, 3 * side)).shape == tokens.shape
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_every_family_is_covered():
    assert {case[0] for case in CASES.values()} == set(FAMILIES)


def test_naflex_rows_are_channel_last_patches_of_the_whole_aspect(tmp_path):
    model = build("Siglip2Vision", patch_size=8, num_patches=16)
    model.save_pretrained(tmp_path)
    encoder = load_image_encoder("siglip2", tmp_path)
    rows, columns = naflex_grid(64, 128, 256)
    assert (rows, columns) == (11, 22)
    pixels = frames(rows * 8, columns * 8, count=1)
    picture = normalised(pixels, HALF_NORM)[0]
    patches = [
        picture[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].permute(1, 2, 0).flatten()
        for i in range(rows)
        for j in range(columns)
    ]
    with torch.no_grad():
        want = model(
            pixel_values=torch.stack(patches)[None],
            pixel_attention_mask=torch.ones(1, rows * columns, dtype=torch.int32),
            spatial_shapes=torch.tensor([[rows, columns]]),
        ).last_hidden_state
    assert torch.allclose(encoder.encode(pixels), want, atol=1e-5)
    assert encoder.encode(frames(64, 128)).shape == (2, 242, 32)


@pytest.mark.parametrize(
    ("height", "width"), [(224, 224), (100, 900), (1, 1), (7, 4000), (480, 640)]
)
def test_naflex_grids_stay_in_budget_and_near_the_aspect(height, width):
    rows, columns = naflex_grid(height, width, 256)
    assert 1 <= rows * columns <= 256
    if max(height, width) / min(height, width) < 10:
        assert rows * columns > 200
        assert abs(columns / rows - width / height) < 0.2 * width / height


def test_naflex_takes_the_folders_number_of_patches(tmp_path):
    build("Siglip2Vision", patch_size=8, num_patches=16).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"max_num_patches": 64}')
    assert load_image_encoder("siglip2", tmp_path).encode(frames(64, 64)).shape == (2, 64, 32)


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Siglip2", "Aimv2"])
def test_a_folder_of_the_whole_two_tower_model_gives_its_vision_tower(name, tmp_path):
    vision = dict(SHAPE, patch_size=8)
    vision |= dict(num_patches=16) if name == "Siglip2" else dict(image_size=32)
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=TEXT)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.save_pretrained(tmp_path)
    encoder = load_image_encoder(name.lower(), tmp_path)
    ours = encoder.model.state_dict()
    theirs = {
        k.removeprefix("vision_model."): v for k, v in model.vision_model.state_dict().items()
    }
    ours = {k.removeprefix("vision_model."): v for k, v in ours.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_folders_own_preprocessing_wins(tmp_path):
    model = build("Dinov2", image_size=56, patch_size=14)
    model.save_pretrained(tmp_path)
    described = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        "size": {"shortest_edge": 60},
        "crop_size": {"height": 28, "width": 28},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    encoder = load_image_encoder("dinov2", tmp_path)
    assert (encoder.preprocessing.resize, encoder.preprocessing.crop) == (60, 28)
    with torch.no_grad():
        norm = (described["image_mean"], described["image_std"])
        middle = frames(60, 60)[..., 16:44, 16:44]
        want = model(pixel_values=normalised(middle, norm)).last_hidden_state[:, 1:]
    assert torch.allclose(encoder.encode(frames(60, 60)), want, atol=1e-5)


def test_a_frozen_encoder_stays_in_evaluation_mode(tmp_path):
    build("CLIPVision", image_size=32, patch_size=8, attention_dropout=0.5).save_pretrained(
        tmp_path
    )
    encoder = torch.nn.ModuleList([load_image_encoder("clip", tmp_path)]).train()[0]
    first, second = encoder(frames(32, 32)), encoder(frames(32, 32))
    assert torch.equal(first, second) and not first.requires_grad


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("clip", "is a dinov2 model; a clip folder has the model type clip"),
        ("resnet", "unknown family 'resnet'; known: clip"),
    ],
)
def test_another_model_or_family_is_an_error(tmp_path, family, message):
    build("Dinov2", image_size=28, patch_size=14).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_image_encoder(family, tmp_path)


def test_a_missing_folder_and_missing_weights_are_errors(tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match="config.json does not exist"):
        load_image_encoder("clip", tmp_path / "facebook" / "clip")
    build("Dinov2", image_size=28, patch_size=14).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights .*mlp.fc1.weight"):
        load_image_encoder("dinov2", tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"\[B, 3, H, W\], got \[3, 32, 32\]"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"got \[2, 32, 32, 3\]"),
        (torch.full((2, 3, 32, 32), 255.0), "from 255 to 255"),
        (torch.full((2, 3, 32, 32), float("nan")), "from nan to nan"),
    ],
)
def test_wrong_frames_are_named(tmp_path, wrong, message):
    build("CLIPVision", image_size=32, patch_size=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_image_encoder("clip", tmp_path).encode(wrong)


def test_importing_the_module_does_not_import_transformers():
    run(
        "-c",
        "import sys; sys.modules['transformers'] = None; import model_factory.hf_image_encoders",
    )
