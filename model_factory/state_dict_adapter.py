"""Key layouts as data: one table, both directions.

The source layout is what a `backbone.pt` holds, the packing layout what our Hugging Face folders
hold. No tensor changes on the way; only names do. A name that fits no rule is an error, never
dropped.
"""

import re

import torch

WRAPPER_PREFIXES = ("module.", "_orig_mod.")

# (source prefix, packing prefix); `{i}` stands for a layer number
KEY_MAP = (
    ("conv1.", "patch_embed.proj."),
    ("ln_pre.", "layernorm_pre."),
    ("transformer.layers.{i}.ln_1.", "encoder.layers.{i}.layer_norm1."),
    ("transformer.layers.{i}.ln_2.", "encoder.layers.{i}.layer_norm2."),
    ("transformer.layers.{i}.attn.in_proj.", "encoder.layers.{i}.self_attn.qkv."),
    ("transformer.layers.{i}.attn.out_proj.", "encoder.layers.{i}.self_attn.proj."),
    ("transformer.layers.{i}.mlp.0.", "encoder.layers.{i}.mlp.fc1."),
    ("transformer.layers.{i}.mlp.2.", "encoder.layers.{i}.mlp.fc2."),
    ("ln_post.", "layernorm_post."),
    ("head.", "head."),
)


def _rules(pairs):
    compiled = []
    for old, new in pairs:
        pattern = re.escape(old).replace(re.escape("{i}"), r"(\d+)")
        compiled.append((re.compile("^" + pattern), new.replace("{i}", r"\g<1>")))
    return compiled


_TO_PACKING = _rules(KEY_MAP)
_TO_SOURCE = _rules((new, old) for old, new in KEY_MAP)


def strip_wrappers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop any run of `module.` and `_orig_mod.` prefixes that DDP and
    torch.compile put in front of names.
    """
    stripped = {}
    for key, tensor in state_dict.items():
        while key.startswith(WRAPPER_PREFIXES):
            key = key.split(".", 1)[1]
        stripped[key] = tensor
    return stripped


def source_to_packing(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename source keys to packing keys; ValueError lists every key that is neither."""
    return _rename(state_dict, _TO_PACKING, "source")


def packing_to_source(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename packing keys to source keys; ValueError lists every key that is neither."""
    return _rename(state_dict, _TO_SOURCE, "packing")


def _rename(state_dict, rules, layout):
    renamed, unknown = {}, []
    for key, tensor in state_dict.items():
        for pattern, replacement in rules:
            if pattern.match(key):
                renamed[pattern.sub(replacement, key, count=1)] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(state_dict)} keys are not of the {layout} layout: "
            f"{', '.join(sorted(unknown)[:10])}"
            " ...: is this another model's checkpoint?"
        )
    return renamed
