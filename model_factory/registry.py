"""Model names: `create_model(name)` for every size, in both front ends.

    llava_vit_<size>_ln              LlavaViTEncoder, dense pictures and clips, source key layout,
                                     norm eps 1e-5
    hf_llava_vit_packing_<size>_ln   LlavaViTPackingModel, packed patch rows, norm eps 1e-6

`packing_config` alone needs no weights, so counting parameters on the meta device is cheap.
"""

import difflib
import fnmatch

SOURCE_PREFIX = "llava_vit_"
PACKING_PREFIX = "hf_llava_vit_packing_"

# name part: patch size, width, layers, heads, MLP width
SIZES = {
    "tiny_ln": (16, 128, 3, 4, 512),
    "small_ln": (16, 384, 6, 6, 1536),
    "base_ln": (16, 768, 12, 12, 3072),
    "large_ln": (14, 1024, 24, 16, 4096),
    "huge_ln": (14, 1280, 32, 20, 5120),
    "giant_ln": (14, 1536, 40, 16, 6144),
}


def list_models(pattern: str = "*") -> list[str]:
    """All known names that match a shell-style pattern, sorted."""
    names = [prefix + size for prefix in (SOURCE_PREFIX, PACKING_PREFIX) for size in SIZES]
    return sorted(fnmatch.filter(names, pattern))


def _size_of(name: str) -> str:
    for prefix in (PACKING_PREFIX, SOURCE_PREFIX):
        if name.startswith(prefix) and name[len(prefix) :] in SIZES:
            return name[len(prefix) :]
    near = difflib.get_close_matches(name, list_models(), n=4, cutoff=0.3)
    raise ValueError(
        f"unknown model {name!r}; nearest known: {', '.join(near)}. list_models() names all"
    )


def packing_name(name: str) -> str:
    """The packing model's name of the same size; ValueError for an unknown name."""
    return PACKING_PREFIX + _size_of(name)


def packing_config(name: str, **overrides):
    """LlavaViTPackingConfig of a registered name; `overrides` are config fields.

    ValueError for an unknown name.
    """
    from .vit_preview_v0_packing_hf import LlavaViTPackingConfig

    patch, width, layers, heads, hidden = SIZES[_size_of(name)]
    source = name.startswith(SOURCE_PREFIX)
    fields = dict(
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden,
        layer_norm_eps=1e-5 if source else 1e-6,
        head_norm_eps=None if source else 1e-6,
    )
    return LlavaViTPackingConfig(**{**fields, **overrides})


def create_model(name: str, **overrides):
    """Randomly initialised model of a registered name; `overrides` are config fields."""
    config = packing_config(name, **overrides)
    if name.startswith(PACKING_PREFIX):
        from .vit_preview_v0_packing_hf import LlavaViTPackingModel

        return LlavaViTPackingModel(config)
    from .vit_preview_v0 import LlavaViTEncoder

    return LlavaViTEncoder(config)
