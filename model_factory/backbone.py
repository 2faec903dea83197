"""backbone.pt: an encoder's weights as plain tensors in the source key layout,
with its configuration beside it.

    backbone.pt      tensors, loaded with weights_only=True
    backbone.json    sizes, norm eps, rotary rule; public files come without it

Foreign files may nest the tensors under `model` or `state_dict` and prefix their names as DDP and
torch.compile do.
"""

import json
from pathlib import Path

import torch

from .registry import packing_config, packing_name
from .state_dict_adapter import packing_to_source, source_to_packing, strip_wrappers
from .vit_preview_v0_packing_hf import LlavaViTPackingConfig, LlavaViTPackingModel


def save_backbone(model: LlavaViTPackingModel, path: Path) -> None:
    """Write weights and configuration of a packing model."""
    weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    torch.save(packing_to_source(weights), path)
    path.with_suffix(".json").write_text(
        json.dumps(model.config.to_dict(), indent=1, sort_keys=True)
    )


def backbone_config(
    path: Path, model_name: str, rope_pairing: str = "legacy"
) -> LlavaViTPackingConfig:
    """Configuration beside the weights; without one the registered sizes of
    `model_name` and the given rotary rule.
    """
    described = path.with_suffix(".json")
    if described.is_file():
        return LlavaViTPackingConfig.from_dict(json.loads(described.read_bytes()))
    return packing_config(packing_name(model_name), rope_pairing=rope_pairing)


def load_backbone(
    path: Path, model_name: str, rope_pairing: str = "legacy"
) -> LlavaViTPackingModel:
    """Packing model with the weights of a backbone.pt.

    Raises ValueError when the file is missing or any tensor is missing, unexpected or of another
    shape.
    """
    weights = read_weights(path)
    config = backbone_config(path, model_name, rope_pairing)
    check_is_model(config, model_name, str(path))
    model = LlavaViTPackingModel(config)
    expected = model.state_dict()
    missing, unexpected = (
        sorted(expected.keys() - weights.keys()),
        sorted(weights.keys() - expected.keys()),
    )
    wrong = [
        f"{key} {list(weights[key].shape)} instead of {list(expected[key].shape)}"
        for key in sorted(expected.keys() & weights.keys())
        if weights[key].shape != expected[key].shape
    ]
    if missing or unexpected or wrong:
        raise ValueError(
            f"{path} does not fit {model_name}: missing {missing[:5]}, unexpected "
            f"{unexpected[:5]}, shapes {wrong[:5]}: "
            "is the model name right?"
        )
    model.load_state_dict(weights)
    return model


def check_is_model(config: LlavaViTPackingConfig, model_name: str, origin: str) -> None:
    """ValueError when a configuration read from `origin` is not of the named model's size."""
    named = packing_config(packing_name(model_name))
    for field in ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(config, field) != getattr(named, field):
            raise ValueError(
                f"{origin} is no {model_name}: its {field} is {getattr(config, field)}, not "
                f"{getattr(named, field)}"
            )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a backbone.pt in the packing key layout; nothing but tensors is unpickled."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a backbone.pt, as a training run writes it")
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return source_to_packing(strip_wrappers(content))
