"""The encoder of a run: built and initialised from its config, and exported for others.

OUTPUT/backbone.pt, backbone.json   plain tensors in the source key layout, and their configuration
OUTPUT/hf/                          Hugging Face folder: config, safetensors, image processor,
                                    modelling code
"""

from pathlib import Path

import torch

from model_factory.backbone import load_backbone, save_backbone
from model_factory.registry import packing_config, packing_name
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel, save_encoder_folder

from .config import ModelConfig


def build_encoder(config: ModelConfig, seed: int) -> LlavaViTPackingModel:
    """Packing model in fp32 with seeded random weights, or with those of `init_from`.

    Raises ValueError when `init_from` is neither a Hugging Face folder nor a weights file, or does
    not fit.
    """
    if config.init_from is None:
        torch.manual_seed(seed)
        encoder = LlavaViTPackingModel(
            packing_config(packing_name(config.name), rope_pairing=config.rope_pairing)
        )
    elif Path(config.init_from).is_dir():
        encoder = LlavaViTPackingModel.from_pretrained(config.init_from, dtype=torch.float32)
    else:
        encoder = load_backbone(Path(config.init_from), config.name)
    return encoder.requires_grad_(not config.frozen)


def export_encoder(encoder: LlavaViTPackingModel, output: Path) -> None:
    """Write both exports (layout above)."""
    save_backbone(encoder, output / "backbone.pt")
    save_encoder_folder(encoder, output / "hf")
