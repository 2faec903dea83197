"""The encoder of a run: built and initialised from its config, and exported for others.

    OUTPUT/backbone.pt     plain tensors in the source key layout (torch.load with weights_only=True)
    OUTPUT/backbone.json   the config that belongs to it: sizes, norm eps, rotary rule
    OUTPUT/hf/             Hugging Face folder: config, safetensors, image processor, modelling code
"""

import json
from pathlib import Path

import torch

from model_factory.registry import packing_config, packing_name
from model_factory.state_dict_adapter import packing_to_source, source_to_packing, strip_wrappers
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel, save_encoder_folder

from .config import ModelConfig


def build_encoder(config: ModelConfig, seed: int) -> LlavaViTPackingModel:
    """Packing model in fp32 with seeded random weights, or with those of `init_from`.

    Raises ValueError when `init_from` is neither a Hugging Face folder nor a weights file, or does not fit.
    """
    if config.init_from and Path(config.init_from).is_dir():
        encoder = LlavaViTPackingModel.from_pretrained(config.init_from, dtype=torch.float32)
    else:
        torch.manual_seed(seed)
        encoder = LlavaViTPackingModel(packing_config(packing_name(config.name), rope_pairing=config.rope_pairing))
        if config.init_from:
            encoder.load_state_dict(source_to_packing(strip_wrappers(read_weights(Path(config.init_from)))))
    if config.frozen:
        encoder.requires_grad_(False)
    return encoder


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a backbone.pt, possibly nested under `model` or `state_dict`; nothing else is unpickled."""
    if not path.is_file():
        raise ValueError(f"--init_backbone {path} does not exist: give a Hugging Face folder or a backbone.pt")
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            return content[key]
    return content


def export_encoder(encoder: LlavaViTPackingModel, output: Path) -> None:
    """Write the three exports (layout above)."""
    weights = {name: tensor.detach().cpu().clone() for name, tensor in encoder.state_dict().items()}
    torch.save(packing_to_source(weights), output / "backbone.pt")
    (output / "backbone.json").write_text(json.dumps(encoder.config.to_dict(), indent=1, sort_keys=True))
    save_encoder_folder(encoder, output / "hf")
