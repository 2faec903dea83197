"""Weights -> a frozen encoder. What is named is what is judged:
a path that does not fit is an error.

    our encoders      packs as they are: whole frames or codec patches with positions
    image encoders    frame by frame, tokens of all frames joined, plus a fixed sine code of the
                      frame's number (base 10000, full size), as published

Both answer to one call: batch -> tokens of every item, and one pooled vector.
"""

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from data_pipeline.loading.packing import PackedBatch
from model_factory.backbone import load_backbone
from model_factory.command_line.reading import names_place
from model_factory.configuration import LlavaViTPackingConfig
from model_factory.files import CHECKSUMS_NAME, read_checksums
from model_factory.hf_image_encoders import FAMILIES, FrozenImageEncoder, load_image_encoder
from model_factory.packing import unpatchify
from model_factory.published_folder import model_type_of, published_model_type
from model_factory.registry import packing_config, packing_name
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel
from training.export import read_encoder

from ..feature_cache import weights_sha256
from .config import IMAGE_FAMILIES, InputConfig

TIME_BASE = 10_000.0
LOG = logging.getLogger("univit")


@dataclass(frozen=True)
class EncodedBatch:
    """Tokens [T, C] of all items in order, int64 lengths [N], pooled vectors [N, C]."""

    tokens: torch.Tensor
    lengths: torch.Tensor
    pooled: torch.Tensor


class ProbeEncoder:
    """A frozen encoder: `width` of its tokens, `patch_size`, the side `size` of the pictures that
    it is given (None: as asked for), and `sha256` of its weights."""

    width: int
    patch_size: int
    size: int | None = None

    def __init__(self, model: nn.Module, colours: torch.Tensor | None):
        self._model, self._colours = model.eval().requires_grad_(False), colours
        self.sha256 = _identity(model, colours)

    def to(self, device: torch.device) -> "ProbeEncoder":
        """The same encoder, on a device."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> EncodedBatch:
        """batch on the encoder's device; computed in bf16 on CUDA."""
        if self._colours is not None:
            colours = self._colours.to(batch.colours.device).expand_as(batch.colours)
            batch = replace(batch, colours=colours)
        kind = batch.pixels.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            return self._encode(batch)

    def _encode(self, batch: PackedBatch) -> EncodedBatch:
        raise NotImplementedError


class PackedEncoder(ProbeEncoder):
    """Ours: one variable-length pass; pooled by the encoder's own head where it has one."""

    def __init__(self, model: LlavaViTPackingModel, colours: torch.Tensor | None):
        super().__init__(model, colours)
        self.width, self.patch_size = model.config.hidden_size, model.config.patch_size

    def _encode(self, batch: PackedBatch) -> EncodedBatch:
        out = self._model(**batch.model_inputs())
        lengths = batch.cu_seqlens.diff().long()
        pooled = out.pooler_output
        if pooled is None:
            pooled = _means(out.last_hidden_state, lengths)
        return EncodedBatch(out.last_hidden_state, lengths, pooled)


class FramewiseEncoder(ProbeEncoder):
    """An image encoder on every frame; pooled by the mean of all tokens, without the code.

    Frames are cut to the encoder's own size when they are read, so its folder's larger resizing
    before the cut is left out, as published. A frame travels as one patch.
    """

    def __init__(self, model: FrozenImageEncoder, colours: torch.Tensor | None):
        shown = model.preprocessing
        side = shown.crop
        if model.kind.naflex:
            side = int(shown.max_patches**0.5) * model.patch_size
        model.preprocessing = replace(shown, resize=shown.crop)
        if colours is not None:  # the model normalises by itself: undo bytes -> (x - mean) / std
            gain, offset = colours
            model.std.copy_((1 / (255 * gain)).view(3, 1, 1))
            model.mean.copy_((-offset / (255 * gain)).view(3, 1, 1))
        super().__init__(model, None)
        self.width, self.patch_size, self.size = model.width, side, side

    def _encode(self, batch: PackedBatch) -> EncodedBatch:
        items, pooled = [], []
        bounds, side = batch.cu_seqlens.tolist(), math.isqrt(batch.pixels.shape[1] // 3)
        for start, end, grid in zip(bounds, bounds[1:], batch.grid_thw.tolist(), strict=False):
            frames, rows, columns = grid
            patches = batch.pixels[start:end].unflatten(0, (frames, rows, columns))
            tiles = unpatchify(patches, side)  # [F, h, w, 3, p, p]
            pictures = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
            tokens = self._model.encode(pictures).float()
            code = time_code(frames, self.width).to(tokens.device)
            pooled.append(tokens.mean(dim=(0, 1)))
            items.append((tokens + code[:, None]).flatten(0, 1))
        lengths = torch.tensor([len(item) for item in items], device=batch.pixels.device)
        return EncodedBatch(torch.cat(items), lengths, torch.stack(pooled))


def time_code(count: int, width: int) -> torch.Tensor:
    """Sine and cosine code float32 [count, width] of the numbers 0, 1, ..."""
    half = width // 2
    rates = TIME_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    code = torch.zeros(count, width)
    code[:, : 2 * half] = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    return code


def build_encoder(
    config: InputConfig, model_name: str, model_weight: str, seed: int
) -> ProbeEncoder:
    """Frozen encoder of the family that `config` names. Ours come from

    a Hugging Face folder, a run's folder (its hf/ export, else its newest checkpoint), a
    checkpoint, a backbone.pt (with the backbone.json beside it, else --model_name and the public
    rotary rule), or `random`: untrained weights of --model_name, the baseline. Image encoders come
    from a Hugging Face folder. Raises ValueError for anything else, and for a folder that differs
    from its checksums or could run code (model_factory/model_folder.py).
    """
    colours = None
    if config.mean is not None:
        mean, std = torch.tensor(config.mean), torch.tensor(config.std)
        colours = torch.stack([1 / (255 * std), -mean / std])
    if config.family in IMAGE_FAMILIES:
        return FramewiseEncoder(load_image_encoder(config.family, model_weight), colours)
    return PackedEncoder(packed_model(model_name, model_weight, seed), colours)


@names_place("model_weight")
def packed_model(model_name: str | None, model_weight: str, seed: int = 0) -> LlavaViTPackingModel:
    """An encoder of ours from any place that `load_encoder` names; ValueError for another."""
    path = Path(model_weight)
    if model_weight == "random":
        torch.manual_seed(seed)
        fields = packing_config(packing_name(model_name), rope_pairing="rotary")
        return LlavaViTPackingModel(fields)
    for folder in (path / "hf", path):
        weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        has_both = (folder / "config.json").is_file() and weights  # a .bin is refused, by its name
        # an export of which a file is lost is an error, and no reason to look elsewhere
        listed = read_checksums(folder / CHECKSUMS_NAME) or {}
        if has_both or any(name.endswith(".safetensors") for name in listed):
            _check_is_ours(folder)
            return LlavaViTPackingModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        return read_encoder(path)[0]
    if path.name == "model.safetensors" and (path.parent / "config.json").is_file():
        return packed_model(model_name, str(path.parent), seed)
    if path.is_file():
        described = path.with_suffix(".json").is_file()
        if not described:
            LOG.warning("%s has no backbone.json: %s, public rotary rule", path, model_name)
        return load_backbone(path, None if described else model_name)
    raise ValueError(
        f"--model_weight {model_weight!r} is no Hugging Face folder, no training run or checkpoint "
        "and no weights file; write `random` to judge an untrained encoder"
    )


def _check_is_ours(folder: Path) -> None:
    """ValueError for a folder of another model type, with the family that it may be of."""
    if not (folder / "config.json").is_file():  # the reader says so
        return
    found = str(model_type_of(folder))
    if found == LlavaViTPackingConfig.model_type or published_model_type(folder) is not None:
        return
    base = found.removesuffix("_vision_model")
    families = [name for name, types in FAMILIES.items() if base in types]
    hint = f"pass --model_family {' or '.join(families)}" if families else "it is none of ours"
    raise ValueError(f"{folder} is a {found} model: {hint}")


def _means(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean of every item's tokens [N, C]."""
    return torch.stack([item.mean(dim=0) for item in tokens.split(lengths.tolist())])


def _identity(model: nn.Module, colours: torch.Tensor | None) -> str:
    """Hash of the configuration, the preprocessing and every weight."""
    config = model.config if hasattr(model, "config") else model.model.config
    shown = getattr(model, "preprocessing", colours)
    unlike = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in unlike and not name.startswith("_")
    }  # what depends on where and how the same weights were stored is left out
    text = json.dumps([fields, str(shown)], sort_keys=True, default=str)
    return weights_sha256(text, {**model.state_dict(), **dict(model.named_buffers())})
