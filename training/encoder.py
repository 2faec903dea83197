"""The encoder of a run: built and initialised from its config, and exported for others.

OUTPUT/backbone.pt, backbone.json   plain tensors in the source key layout, and their configuration
OUTPUT/hf/                          Hugging Face folder: config, safetensors, image processor,
                                    modelling code
"""

from pathlib import Path

import torch

from model_factory.backbone import check_is_model, load_backbone, save_backbone
from model_factory.command_line.reading import reading
from model_factory.configuration import LlavaViTPackingConfig
from model_factory.export_folder import save_encoder_folder
from model_factory.registry import packing_config, packing_name
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

from .config.schema import ModelConfig


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
        with reading(config.init_from):
            encoder = LlavaViTPackingModel.from_pretrained(
                config.init_from, dtype=torch.float32, local_files_only=True
            )
    else:
        encoder = load_backbone(Path(config.init_from), config.name, config.rope_pairing)
    _check(encoder.config, config)
    return encoder.requires_grad_(not config.frozen)


def _check(built: LlavaViTPackingConfig, config: ModelConfig) -> None:
    """What was loaded must be what was named."""
    check_is_model(built, config.name, config.init_from or "")
    if built.rope_pairing != config.rope_pairing:
        raise ValueError(
            f"{config.init_from} has the {built.rope_pairing} rotary rule, the run is set to "
            f"{config.rope_pairing}: --set model.rope_pairing={built.rope_pairing}"
        )
    if config.embedding_dim not in (None, built.hidden_size):
        raise ValueError(
            f"--embedding_size {config.embedding_dim}: {config.name} has width {built.hidden_size}"
        )


def export_encoder(encoder: LlavaViTPackingModel, output: Path, run: dict[str, object]) -> None:
    """Write both exports (layout above); `run` are the facts for the model card."""
    save_backbone(encoder, output / "backbone.pt")
    save_encoder_folder(encoder, output / "hf", run)
