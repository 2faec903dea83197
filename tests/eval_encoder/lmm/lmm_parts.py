"""Tiny random parts of multimodal models, shared by the tests of lmm_*.py."""

import json

import numpy as np
import torch
import transformers
from PIL import Image

from data_pipeline.embedded.clips import write_clip
from data_pipeline.embedded.motion_shapes import render_clip
from eval_encoder.lmm.demo.tiny import train_tokenizer, write_language_model
from eval_encoder.lmm.model.lmm import LmmConfig, LmmForConditionalGeneration, Visuals
from eval_encoder.lmm.model.open import Lmm
from model_factory.configuration import LlavaViTPackingConfig
from model_factory.export_folder import image_processor_json, save_encoder_folder
from model_factory.llava.convnext import ConvNextVisionModel, grow_stage
from model_factory.llava.towers import VisualInputs
from model_factory.llava_vision_tower import LlavaViTVisionConfig, LlavaViTVisionModel
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
TEXTS = [
    "a red picture", "a green picture", "a blue picture", "What colour is it?", "red", "green",
    "blue", "What is one and one?", "two", "Where does it move?", "left", "right", "Describe.",
]  # fmt: skip
SIDE, PATCH = 32, 8
VIT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
VIT |= dict(image_size=SIDE, patch_size=PATCH)


def tokenizer():
    return train_tokenizer(TEXTS * 3, 400)


def language_model(layers=6, width=32, vocabulary=384):
    torch.manual_seed(1)
    fields = dict(hidden_size=width, intermediate_size=64, num_hidden_layers=layers)
    fields |= dict(num_attention_heads=4, num_key_value_heads=4, vocab_size=vocabulary)
    fields |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()


def ours(layers=4):
    torch.manual_seed(0)
    fields = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=layers)
    fields |= dict(num_attention_heads=2, image_size=SIDE, patch_size=PATCH)
    return LlavaViTVisionModel(LlavaViTVisionConfig(**fields)).eval()


def native(kind):
    """A transformers vision model of pictures."""
    torch.manual_seed(0)
    names = {
        "clip": ("CLIPVisionConfig", "CLIPVisionModel"),
        "siglip": ("SiglipVisionConfig", "SiglipVisionModel"),
        "dinov2": ("Dinov2Config", "Dinov2Model"),
        "dinov2_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
        "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel"),
        "aimv2": ("Aimv2VisionConfig", "Aimv2VisionModel"),
    }
    config, model = (getattr(transformers, name) for name in names[kind])
    return model(config(**VIT)).eval()


def convnext(stages=5):
    torch.manual_seed(0)
    widths, depths = (8, 16, 32, 64, 128)[:stages], (1, 1, 1, 1, 1)[:stages]
    config = transformers.ConvNextConfig(
        hidden_sizes=list(widths), depths=list(depths), num_stages=stages, image_size=64
    )
    return transformers.ConvNextModel(config).eval()


def grown_convnext():
    return ConvNextVisionModel.from_network(grow_stage(convnext(4), width=128, depth=1))


TOWERS = {
    "ours": ours,
    **{k: (lambda k=k: native(k)) for k in ("clip", "siglip", "dinov2", "dinov2_registers")},
    "dinov3": lambda: native("dinov3"),
    "aimv2": lambda: native("aimv2"),
    "convnext": lambda: ConvNextVisionModel.from_network(convnext()),
}


def model_of(tower, layers=6, **fields):
    """A multimodal model; fields of LmmConfig."""
    words, speaker = tokenizer(), language_model(layers)
    fields = {"vision_feature_layer": -1, **fields}
    config = LmmConfig(
        vision_config=tower.config,
        text_config=speaker.config,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        **fields,
    )
    torch.manual_seed(2)
    return LmmForConditionalGeneration.from_parts(config, tower, speaker).eval()


def lmm_of(tower, **fields):
    side = tower.config.image_size
    processor = json.loads(image_processor_json(side))
    processor = transformers.CLIPImageProcessor.from_dict(processor)
    return Lmm(model_of(tower, **fields), tokenizer(), processor)


def pictures(count, side=SIDE, seed=0):
    """Normalised pictures [count, 3, side, side], one per sample."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, side, side, generator=draw)
    return Visuals(VisualInputs(pixel_values=pixels), torch.arange(count))


def token_ids(model, counts, text=5, seed=0):
    """int64 [B, T] of samples with so many placeholders each, padded on the right; the mask."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for count in counts:
        words = torch.randint(10, 300, (text,), generator=draw)
        image = torch.full((count,), model.config.image_token_id)
        rows.append(torch.cat([torch.tensor([1]), words[:2], image, words[2:]]))
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], True, 0)
    return torch.nn.utils.rnn.pad_sequence(rows, True, 0), mask


def write_parts(folder):
    """language_model/, tower/ (ours), clip/, convnext/, media/, align.json, tune.json."""
    write_language_model(TEXTS * 3, folder / "language_model", layers=2, width=96, vocabulary=400)
    torch.manual_seed(0)
    fields = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    fields |= dict(num_attention_heads=2, image_size=SIDE, patch_size=PATCH)
    save_encoder_folder(LlavaViTPackingModel(LlavaViTPackingConfig(**fields)), folder / "tower")
    native("clip").save_pretrained(folder / "clip")
    convnext(4).save_pretrained(folder / "convnext")
    for name, side in (("clip", SIDE), ("convnext", 64)):
        (folder / name / "preprocessor_config.json").write_text(image_processor_json(side))
    write_media(folder)


def write_media(folder, count=24):
    (folder / "media").mkdir()
    align, tune = [], []
    for number in range(count):
        colour = list(COLOURS)[number % 3]
        noise = np.random.default_rng(number).integers(0, 30, (24, 40, 3))
        picture = (np.array(COLOURS[colour]) + noise).astype(np.uint8)
        Image.fromarray(picture).save(folder / "media" / f"{number}.png")
        image = {"image": f"{number}.png"}
        align.append({"id": f"a{number}", **image, **said("<image>", f"a {colour} picture")})
        if number % 6 == 5:
            tune.append({"id": f"t{number}", **said("What is one and one?", "two")})
        else:
            question = "<image>\nWhat colour is it?"
            tune.append({"id": f"t{number}", **image, **said(question, colour)})
    write_clip(folder / "media" / "clip.mp4", render_clip(0, 0, 0, "easy", 64))
    clip = {"id": "clip", "video": "clip.mp4", **said("<video>\nWhere does it move?", "left")}
    both = said("<image>\n<image>\nWhat colour is it?", "red")
    tune += [clip, {"id": "both", "image": ["0.png", "3.png"], **both}]
    (folder / "align.json").write_text(json.dumps(align))
    (folder / "tune.json").write_text(json.dumps(tune))


def said(question, answer):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns}
