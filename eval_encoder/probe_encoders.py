"""Weights -> a frozen encoder. What is named is what is judged:
a path that does not fit is an error.
"""

from pathlib import Path

import torch

from model_factory.backbone import load_backbone
from model_factory.registry import packing_config, packing_name
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel


def build_encoder(model_name: str, model_weight: str, seed: int) -> LlavaViTPackingModel:
    """Frozen encoder in eval mode, from

    a Hugging Face folder, a training output folder (its hf/ export), a backbone.pt (with the
    backbone.json beside it, else --model_name and the public rotary rule), or `random`: untrained
    weights of --model_name, the baseline. Raises ValueError for anything else.
    """
    path = Path(model_weight)
    if model_weight == "random":
        torch.manual_seed(seed)
        model = LlavaViTPackingModel(
            packing_config(packing_name(model_name), rope_pairing="rotary")
        )
    elif (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        model = LlavaViTPackingModel.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
    elif (path / "hf" / "config.json").is_file():
        model = LlavaViTPackingModel.from_pretrained(
            path / "hf", dtype=torch.float32, local_files_only=True
        )
    elif path.is_file():
        model = load_backbone(path, model_name)
    else:
        raise ValueError(
            f"--model_weight {model_weight!r} is no Hugging Face folder, no training output with "
            "an hf/ export and no "
            "weights file; write `random` to judge an untrained encoder"
        )
    return model.eval().requires_grad_(False)
