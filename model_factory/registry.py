"""Model names: `create_model(name)` for every size, in every front end.

    llava_vit_<size>_<norm>              LlavaViTEncoder, dense images and clips, source key
                                         layout, norm eps 1e-5
    hf_llava_vit_packing_<size>_<norm>   LlavaViTPackingModel, packed patch rows, norm eps 1e-6
    ov_encoder_<size>                    the packed model in the published encoders' shapes: patch
                                         14, images of 224

`packing_config` alone needs no weights, so counting parameters on the meta device is cheap.
"""

from __future__ import annotations

import difflib
import fnmatch
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import LlavaViTPackingConfig
    from .vit_preview_v0 import LlavaViTEncoder
    from .vit_preview_v0_packing_hf import LlavaViTPackingModel

SOURCE_PREFIX = "llava_vit_"
PACKING_PREFIX = "hf_llava_vit_packing_"
PUBLISHED_PREFIX = "ov_encoder_"

# patch size, width, layers, heads, MLP width
SHAPES = {
    "tiny": (16, 128, 3, 4, 512),
    "small": (16, 384, 6, 6, 1536),
    "base": (16, 768, 12, 12, 3072),
    "large": (14, 1024, 24, 16, 4096),
    "huge": (14, 1280, 32, 20, 5120),
    "giant": (14, 1536, 40, 16, 6144),
}
SIZES = (*(f"{shape}_ln" for shape in SHAPES), "base_rms", "large_rms")
PUBLISHED_SIZES = ("base", "large", "huge")
PUBLISHED_PATCH = 14
CLIP_SIZE = 224  # of all published recipes and encoders; a multiple of 14 and of 16
# public image encoders, by family: the model types that their folders come with
IMAGE_FAMILIES = {
    "clip": ("clip",),
    "metaclip": ("clip", "metaclip_2"),
    "siglip": ("siglip",),
    "siglip2": ("siglip", "siglip2"),  # fixed sizes are stored as siglip, NaFlex as siglip2
    "dinov2": ("dinov2", "dinov2_with_registers"),
    "dinov3": ("dinov3_vit",),
    "aimv2": ("aimv2",),
}
NORMS = {"ln": "layer_norm", "rms": "rms_norm"}


def list_models(pattern: str = "*") -> list[str]:
    """All known names that match a shell-style pattern (`*large*`), sorted."""
    names = [prefix + size for prefix in (SOURCE_PREFIX, PACKING_PREFIX) for size in SIZES]
    names += [PUBLISHED_PREFIX + size for size in PUBLISHED_SIZES]
    return sorted(fnmatch.filter(names, pattern))


def _parts(name: str) -> tuple[str, str, str]:
    """Prefix, shape and norm of a known name."""
    if name not in list_models():
        near = difflib.get_close_matches(name, list_models(), n=4, cutoff=0.3)
        raise ValueError(
            f"unknown model {name!r}; nearest known: {', '.join(near or list_models())}. "
            "list_models() names all"
        )
    if name.startswith(PUBLISHED_PREFIX):
        return PUBLISHED_PREFIX, name.removeprefix(PUBLISHED_PREFIX), "ln"
    prefix = PACKING_PREFIX if name.startswith(PACKING_PREFIX) else SOURCE_PREFIX
    shape, norm = name.removeprefix(prefix).rsplit("_", 1)
    return prefix, shape, norm


def packing_name(name: str) -> str:
    """The packing model's name of the same size; ValueError for an unknown name."""
    prefix, shape, norm = _parts(name)
    return name if prefix == PUBLISHED_PREFIX else f"{PACKING_PREFIX}{shape}_{norm}"


def clip_shape(name: str) -> tuple[int, int]:
    """(side of a clip, side of a patch) in pixels that clips for a registered model are packed
    with; ValueError for an unknown name. Only the patch size is a property of the weights.
    """
    prefix, shape, _ = _parts(name)
    patch = PUBLISHED_PATCH if prefix == PUBLISHED_PREFIX else SHAPES[shape][0]
    return CLIP_SIZE, patch


def packing_config(name: str, **overrides: Any) -> LlavaViTPackingConfig:
    """LlavaViTPackingConfig of a registered name; `overrides` are config fields.

    ValueError for an unknown name or field, with the nearest known ones.
    """
    from transformers import PretrainedConfig

    from .configuration import LlavaViTPackingConfig

    known = [*LlavaViTPackingConfig.own_fields(), *PretrainedConfig().to_dict()]
    for field in overrides:
        if field not in known:
            near = ", ".join(difflib.get_close_matches(field, known, n=3, cutoff=0.3))
            raise ValueError(f"unknown config field {field!r}; nearest known: {near}")
    prefix, shape, norm = _parts(name)
    patch, width, layers, heads, hidden = SHAPES[shape]
    fields = dict(
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden,
        layer_norm_type=NORMS[norm],
    )
    if prefix == SOURCE_PREFIX:
        # torch's defaults, of LayerNorm and of RMSNorm: the source model was trained with them
        fields.update(layer_norm_eps=1e-5, head_norm_eps=None)
    elif prefix == PUBLISHED_PREFIX:
        fields.update(patch_size=PUBLISHED_PATCH, image_size=CLIP_SIZE)
    return LlavaViTPackingConfig(**{**fields, **overrides})


def create_model(name: str, **overrides: Any) -> LlavaViTEncoder | LlavaViTPackingModel:
    """Randomly initialised model of a registered name; `overrides` are config fields.

    ValueError for an unknown name, with the nearest known ones.
    """
    config = packing_config(name, **overrides)
    if name.startswith(SOURCE_PREFIX):
        from .vit_preview_v0 import LlavaViTEncoder

        return LlavaViTEncoder(config)
    from .vit_preview_v0_packing_hf import LlavaViTPackingModel

    return LlavaViTPackingModel(config)
