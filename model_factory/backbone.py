"""backbone.pt: an encoder's weights as plain tensors in the source key layout, with its
configuration beside it.

    backbone.pt         tensors, loaded with weights_only=True; .safetensors is read just as well
    backbone.json       sizes, norm eps, rotary rule; public files come without it
    backbone.pt.sha256  sha256 of both, written last; checked where it, or a SHA256SUMS, is there

Foreign files may have any key layout, nest the tensors under `model` or `state_dict`, and prefix
their names as DDP and torch.compile do.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from .configuration import LlavaViTPackingConfig
from .files import (
    OWN_LISTING,
    check_checksums,
    listing_of,
    read_checksums,
    write_atomically,
    write_checksums,
)
from .model_folder import json_object
from .registry import packing_config, packing_name
from .state_dict_adapter import check_fits, first_keys, from_packing, to_packing
from .vit_preview_v0_packing_hf import LlavaViTPackingModel

NESTING_KEYS = ("model", "state_dict")
SHAPE_FIELDS = (
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "layer_norm_type",
)


def save_backbone(model: LlavaViTPackingModel, path: Path) -> None:
    """Write weights and configuration of a packing model, and the checksums of both."""
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[name] = tensor.detach().cpu().clone()
    listing = path.with_name(f"{path.name}{OWN_LISTING}")
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(from_packing(weights, "source"), temporary)
    # a kill from here on leaves files without checksums, and none with wrong ones
    listing.unlink(missing_ok=True)
    os.replace(temporary, path)
    config_path = path.with_suffix(".json")
    fields = json.dumps(model.config.to_dict(), indent=1, sort_keys=True)
    write_atomically(config_path, fields.encode())
    write_checksums(path.parent, names=[path.name, config_path.name], listing=listing.name)


def backbone_config(
    path: Path, model_name: str | None, rope_pairing: str = "legacy"
) -> LlavaViTPackingConfig:
    """Configuration beside the weights; without one, the registered one of `model_name` with the
    given rotary rule. The registered norm eps is that of the training, so that the loaded function
    is the one that was trained.

    Raises ValueError for a file that differs from its checksum, and where there is neither a file
    nor a name.
    """
    config_path = path.with_suffix(".json")
    listing = listing_of(path)
    listed = read_checksums(path.parent / listing) or {}
    # a configuration that is listed and lost is an error of the check, not a file without one
    if config_path.is_file() or config_path.name in listed:
        check_checksums(path.parent, names=[config_path.name], listing=listing)
        return LlavaViTPackingConfig.from_dict(json_object(config_path))
    if model_name is None:
        raise ValueError(f"{config_path} does not exist: without it, name the model")
    return packing_config(model_name, rope_pairing=rope_pairing)


def load_backbone(
    path: Path, model_name: str | None, rope_pairing: str = "legacy"
) -> LlavaViTPackingModel:
    """Packing model with the weights of a backbone.pt; without a name, of the model that the
    backbone.json beside it describes.

    Raises ValueError when the file is missing, when it is another model than the named one, and
    when any tensor is missing, unexpected or of another shape.
    """
    weights = read_weights(path)
    config = backbone_config(path, model_name=model_name, rope_pairing=rope_pairing)
    if model_name is not None:
        check_is_model(config, model_name=model_name, origin=str(path))
    model = LlavaViTPackingModel(config)
    name = model_name or "what the file beside it describes"
    check_fits(weights, model.state_dict(), origin=f"{path}, loaded as {name},")
    model.load_state_dict(weights)
    return model


def check_is_model(config: LlavaViTPackingConfig, model_name: str, origin: str) -> None:
    """Raise ValueError when a configuration read from `origin` is not of the named model's size."""
    named = packing_config(packing_name(model_name))
    for field in SHAPE_FIELDS:
        if getattr(config, field) != getattr(named, field):
            raise ValueError(
                f"{origin} is no {model_name}: its {field} is {getattr(config, field)}, not "
                f"{getattr(named, field)}"
            )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .pt or .safetensors file in the packing key layout, whatever layout it has.

    Nothing but tensors is unpickled. Raises ValueError for a missing or unreadable file, for one
    that differs from its checksum, for content that is no mapping of tensors, and for names that
    fit no layout.
    """
    try:
        if path.is_file():
            check_checksums(path.parent, names=[path.name], listing=listing_of(path))
        return to_packing(named_tensors(read_tensors(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tensors(path: Path, device: str = "cpu") -> object:
    """Content of a .pt, .bin or .safetensors file; on the device "meta" its shapes alone.

    Raises ValueError, which does not name the file, when it is missing or unreadable, and for a
    pickle with anything but tensors in it, of which nothing is executed.
    """
    if path.is_dir():
        raise ValueError("is a folder: give the file, a .pt or .safetensors")
    if not path.is_file():
        raise ValueError("does not exist: give a backbone.pt, as a training run writes it")
    is_safetensors = path.suffix.lower() == ".safetensors"
    try:
        if is_safetensors:
            return load_file(path, device=device)
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the two readers' errors share no narrower base
        kind = "safetensors" if is_safetensors else "torch.save with nothing but tensors in it"
        raise ValueError(
            f"is no readable file of tensors ({type(error).__name__}); by its name it should be "
            f"{kind}"
        ) from error


def named_tensors(content: object) -> dict[str, torch.Tensor]:
    """The mapping of names to tensors in a file's content, which may be nested. Raises ValueError
    for any other content."""
    for key in NESTING_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not a mapping of names to tensors")
    strange = []
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            strange.append(str(key))
    if strange:
        raise ValueError(f"these entries are no tensors: {first_keys(strange)}")
    return content
