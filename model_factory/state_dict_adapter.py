"""Key layouts of the encoder's weights, as one table that is read in every direction.

    packing   our Hugging Face folders and the packed model
    source    a backbone.pt and the dense source model
    split     published Hugging Face folders (model types llava_vit, onevision_encoder), where
              queries, keys and values are three tensors

Only the split layout changes tensors: q, k and v are joined when it is read and parted when it is
written, bit for bit. A name that fits no rule is an error that lists it; none is dropped.
"""

import re
from collections.abc import Iterable, Mapping

import torch

Weights = dict[str, torch.Tensor]

WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put in front of names

# packing, source, split (with q, k and v joined); `{i}` stands for a layer number
KEY_TABLE = (
    ("patch_embed.proj.", "conv1.", "embeddings.patch_embedding."),
    ("layernorm_pre.", "ln_pre.", "layernorm_pre."),
    (
        "encoder.layers.{i}.layer_norm1.",
        "transformer.layers.{i}.ln_1.",
        "encoder.layers.{i}.layer_norm1.",
    ),
    (
        "encoder.layers.{i}.layer_norm2.",
        "transformer.layers.{i}.ln_2.",
        "encoder.layers.{i}.layer_norm2.",
    ),
    (
        "encoder.layers.{i}.self_attn.qkv.",
        "transformer.layers.{i}.attn.in_proj.",
        "encoder.layers.{i}.self_attn.qkv_proj.",
    ),
    (
        "encoder.layers.{i}.self_attn.proj.",
        "transformer.layers.{i}.attn.out_proj.",
        "encoder.layers.{i}.self_attn.out_proj.",
    ),
    ("encoder.layers.{i}.mlp.fc1.", "transformer.layers.{i}.mlp.0.", "encoder.layers.{i}.mlp.fc1."),
    ("encoder.layers.{i}.mlp.fc2.", "transformer.layers.{i}.mlp.2.", "encoder.layers.{i}.mlp.fc2."),
    ("layernorm_post.", "ln_post.", "layernorm_post."),
    ("head.", "head.", "head."),
)
LAYOUTS = {"packing": 0, "source": 1, "split": 2}
MOST_KEYS = 20  # named in one message; a wrong model differs in hundreds
_PARTED = re.compile(r"^(.*\.)([qkv])_proj\.(weight|bias)$")


def strip_wrappers(state_dict: Mapping[str, torch.Tensor]) -> Weights:
    """Weights without `module.` in front of names and without `_orig_mod.` anywhere; ValueError
    when that gives two tensors one name.
    """
    stripped: Weights = {}
    for key, tensor in state_dict.items():
        # the two wrappers nest in either order, and more than once
        while key.startswith(WRAPPERS):
            key = key.split(".", 1)[1]
        key = key.replace("._orig_mod.", ".")
        if key in stripped:
            raise ValueError(f"two tensors are called {key} once module. and _orig_mod. are gone")
        stripped[key] = tensor
    return stripped


def detect_layout(keys: Iterable[str]) -> str:
    """Layout whose rules fit the most of these names; ValueError when no name fits any rule."""
    # as KEY_TABLE names them: its split column has q, k and v joined
    joined = [re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", key) for key in keys]
    counts = {}
    for layout, column in LAYOUTS.items():
        patterns = [pattern for pattern, _ in _rules(column, column)]
        counts[layout] = 0
        for key in joined:
            if any(pattern.match(key) for pattern in patterns):
                counts[layout] += 1
    best = max(counts, key=lambda layout: counts[layout])
    if counts[best] == 0:
        raise ValueError(
            f"no known key layout among {len(joined)} names, is this another model's checkpoint? "
            f"They are: {first_keys(sorted(joined))}"
        )
    return best


def to_packing(state_dict: Mapping[str, torch.Tensor], layout: str | None = None) -> Weights:
    """Weights of any layout (None: detected), wrapped or not, in the packing layout.

    Raises ValueError that lists names of no rule and incomplete q, k, v triples.
    """
    weights = strip_wrappers(state_dict)
    layout = layout or detect_layout(weights)
    if layout == "split":
        weights = _join_qkv(weights)
    return _rename(weights, old=LAYOUTS[layout], new=LAYOUTS["packing"])


def from_packing(state_dict: Weights, layout: str) -> Weights:
    """Weights of the packing layout in another one; ValueError lists names of no rule."""
    renamed = _rename(state_dict, old=LAYOUTS["packing"], new=LAYOUTS[layout])
    return _part_qkv(renamed) if layout == "split" else renamed


def _join_qkv(weights: Weights) -> Weights:
    joined: Weights = {}
    triples: dict[str, Weights] = {}
    for key, tensor in weights.items():
        match = _PARTED.match(key)
        if match:
            joined_key = f"{match[1]}qkv_proj.{match[3]}"
            triples.setdefault(joined_key, {})[match[2]] = tensor
        else:
            joined[key] = tensor
    missing = []
    for key, parts in triples.items():
        absent = [part for part in "qkv" if part not in parts]
        missing += [key.replace("qkv_proj", f"{part}_proj") for part in absent]
    if missing:
        raise ValueError(f"missing of a q, k, v triple: {first_keys(missing)}")
    for key, parts in triples.items():
        # torch.cat alone would join rows of different numbers without an error
        shapes = [list(parts[part].shape) for part in "qkv"]
        if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
            raise ValueError(f"{key}: q, k and v have the shapes {shapes}, they must be equal")
        joined[key] = torch.cat([parts[part] for part in "qkv"])
    return joined


def _part_qkv(weights: Weights) -> Weights:
    parted: Weights = {}
    for key, tensor in weights.items():
        if ".qkv_proj." in key:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                # a chunk is a view, and safetensors refuses tensors that share memory
                parted[key.replace("qkv_proj", f"{part}_proj")] = piece.clone()
        else:
            parted[key] = tensor
    return parted


def check_fits(weights: Weights, expected: Weights, origin: str) -> None:
    """Raise ValueError that lists missing and unexpected names and tensors of another shape."""
    shapes = [
        f"{key} {list(weights[key].shape)} instead of {list(expected[key].shape)}"
        for key in sorted(expected.keys() & weights.keys())
        if weights[key].shape != expected[key].shape
    ]
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "of another shape": shapes,
        "not floating point": sorted(k for k in weights if not weights[k].is_floating_point()),
    }
    raise_problems(problems, origin)


def raise_problems(problems: dict[str, list[str]], origin: str) -> None:
    """Raise ValueError that lists every named problem; nothing where all lists are empty."""
    present = {name: keys for name, keys in problems.items() if keys}
    if present:
        # all lists share the room of one message
        most = max(1, MOST_KEYS // len(present))
        parts = [f"{name}: {first_keys(keys, most)}" for name, keys in present.items()]
        listed = "; ".join(parts)
        raise ValueError(
            f"{origin} does not hold this model's tensors, is the model name right? {listed}"
        )


def first_keys(keys: list[str], most: int = MOST_KEYS) -> str:
    """The first names of a list, and how many more there are."""
    more = ""
    if len(keys) > most:
        more = f" and {len(keys) - most} more"
    return ", ".join(keys[:most]) + more


def _rules(old: int, new: int) -> list[tuple[re.Pattern, str]]:
    """(pattern of a prefix, replacement) of every table row; `old` and `new` are its columns."""
    rules = []
    for row in KEY_TABLE:
        escaped = re.escape(row[old])
        pattern = escaped.replace(re.escape("{i}"), r"(\d+)")
        replacement = row[new].replace("{i}", r"\g<1>")
        rules.append((re.compile(f"^{pattern}"), replacement))
    return rules


def _rename(state_dict: Weights, old: int, new: int) -> Weights:
    rules = _rules(old, new)
    renamed: Weights = {}
    unknown = []
    for key, tensor in state_dict.items():
        for pattern, replacement in rules:
            if pattern.match(key):
                renamed[pattern.sub(replacement, key, count=1)] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(state_dict)} names fit no rule of the key layout, is this "
            f"another model's checkpoint? They are: {first_keys(sorted(unknown))}"
        )
    return renamed
