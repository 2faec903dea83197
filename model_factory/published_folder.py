"""Published encoder folders: config.json and safetensors in the split-qkv layout.

`LlavaViTPackingModel.from_pretrained` reads them through here; nothing of the folder is executed.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .configuration import LlavaViTPackingConfig
from .model_folder import json_object, model_type_of
from .state_dict_adapter import to_packing

MODEL_TYPES = ("llava_vit", "onevision_encoder")
# fields of ours that a published configuration lacks; all others have one meaning in both
OURS_ONLY = ("head_norm_eps", "rope_pairing", "rope_position_scale")
DEFAULTS = {  # of the published configuration class, for fields that are not written
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}


def published_model_type(folder: str | Path) -> str | None:
    """Model type of a local published folder; None for any other folder, name or file."""
    model_type = model_type_of(folder)
    return model_type if model_type in MODEL_TYPES else None


def read_published_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fields of LlavaViTPackingConfig and weights in the packing layout, in the folder's dtype.

    Expects a folder that model_folder.py has checked, so that an index names shards beside it only.
    Raises ValueError for an activation other than GELU, a folder without safetensors, and names
    that fit no rule.
    """
    folder = Path(folder)
    published = json_object(folder / "config.json")
    if published.get("hidden_act", "gelu") != "gelu":
        raise ValueError(
            f"{folder}/config.json: hidden_act is {published['hidden_act']!r}, this encoder has "
            "the exact gelu only"
        )
    shared = set(LlavaViTPackingConfig.own_fields()) - set(OURS_ONLY)
    fields = {**DEFAULTS, "rope_pairing": "legacy"}
    fields |= {name: published[name] for name in shared if name in published}
    # published heads use the norm eps of the blocks
    fields["head_norm_eps"] = fields.get("layer_norm_eps", 1e-6)
    # transformers 4 writes the first name, transformers 5 the second
    for spelling in ("torch_dtype", "dtype"):
        if published.get(spelling):
            fields["dtype"] = published[spelling]
    return fields, to_packing(_tensors(folder), "split")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        file_of_tensor = json_object(index).get("weight_map", {})
        names = sorted(set(file_of_tensor.values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} does not exist: the folder needs its weights as safetensors")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return tensors
