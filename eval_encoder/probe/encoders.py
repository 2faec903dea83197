"""Weights -> a frozen encoder. A path that does not hold the named encoder is an error; there is no
fallback.

    our encoders      packs as they are: whole frames or codec patches with positions
    image encoders    frame by frame, tokens of all frames joined, plus a fixed sine code of the
                      index (base 10000, full amplitude), as published

Both map a batch to the tokens of every item and one pooled vector.
"""

import json
import logging
import math
from dataclasses import dataclass, replace

import torch

from data_pipeline.loading.packing import PackedBatch
from model_factory.hf_image_encoders import FrozenImageEncoder, load_image_encoder
from model_factory.open_encoder import Kind, locate_encoder, open_encoder
from model_factory.packing import gain_and_offset, unpatchify
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel
from training.export import read_encoder

from ..feature_cache import weights_sha256
from .config import IMAGE_FAMILIES, InputConfig

TIME_BASE = 10_000.0  # the usual base of sine codes
# fields of a configuration that depend on where and how the same weights were stored
STORAGE_FIELDS = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
Model = FrozenImageEncoder | LlavaViTPackingModel
LOG = logging.getLogger("univit")


@dataclass(frozen=True)
class EncodedBatch:
    """Tokens [T, C] of all items in order, int64 lengths [N], pooled vectors [N, C]."""

    tokens: torch.Tensor
    lengths: torch.Tensor
    pooled: torch.Tensor


class ProbeEncoder:
    """A frozen encoder.

    width       of its tokens
    patch_size  in pixels
    size        side of the frames that it is given, in pixels; None: that of the configuration
    sha256      of its configuration, its preprocessing and its weights
    frames_per_token  of its input
    """

    width: int
    patch_size: int
    size: int | None = None
    frames_per_token: int = 1

    def __init__(self, model: Model, normalisation: torch.Tensor | None):
        self._model = model.eval().requires_grad_(False)
        self._normalisation = normalisation  # gain and offset [2, 3] in place of the batch's own
        self.sha256 = _identity(model, normalisation)

    def to(self, device: torch.device) -> "ProbeEncoder":
        """The same encoder, on a device."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> EncodedBatch:
        """Tokens of a batch on the encoder's device; computed in bf16 on CUDA."""
        if self._normalisation is not None:
            normalisation = self._normalisation.to(batch.colours.device).expand_as(batch.colours)
            batch = replace(batch, colours=normalisation)
        device_type = batch.pixels.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
            return self._encode(batch)

    def _encode(self, batch: PackedBatch) -> EncodedBatch:
        raise NotImplementedError


class PackedProbeEncoder(ProbeEncoder):
    """An encoder of ours: one variable-length pass, pooled by its own head or by the mean."""

    def __init__(self, model: LlavaViTPackingModel, normalisation: torch.Tensor | None):
        super().__init__(model, normalisation)
        self.width = model.config.hidden_size
        self.patch_size = model.config.patch_size
        channels = model.config.num_channels
        if channels % 3:
            raise ValueError(f"the encoder takes {channels} channels, no whole frames of three")
        self.frames_per_token = channels // 3

    def _encode(self, batch: PackedBatch) -> EncodedBatch:
        out = self._model(**batch.model_inputs())
        lengths = batch.cu_seqlens.diff().long()
        pooled = out.pooler_output
        if pooled is None:
            items = out.last_hidden_state.split(lengths.tolist())
            pooled = torch.stack([item.mean(dim=0) for item in items])
        return EncodedBatch(tokens=out.last_hidden_state, lengths=lengths, pooled=pooled)


class FramewiseEncoder(ProbeEncoder):
    """An image encoder on every frame; pooled by the mean of all tokens, without the time code.

    Frames are cropped to the encoder's own size when they are read, so the larger resize that its
    folder asks for before the crop is left out, as published. The reader takes the frame's side for
    the patch size, so that each frame arrives as one patch of a pack.
    """

    _model: FrozenImageEncoder

    def __init__(self, model: FrozenImageEncoder):
        preprocessing = model.preprocessing
        side = preprocessing.crop
        if model.kind.naflex:
            # takes any grid within a budget of patches: the largest square of that budget
            side = int(preprocessing.max_patches**0.5) * model.patch_size
        model.preprocessing = replace(preprocessing, resize=preprocessing.crop)
        # the model normalises by itself
        super().__init__(model, normalisation=None)
        self.width = model.width
        self.patch_size = side
        self.size = side

    def _encode(self, batch: PackedBatch) -> EncodedBatch:
        side = math.isqrt(batch.pixels.shape[1] // 3)
        lengths = batch.cu_seqlens.diff().tolist()
        tokens_of_items = []
        pooled = []
        for rows, grid in zip(batch.pixels.split(lengths), batch.grid_thw.tolist(), strict=True):
            tiles = unpatchify(rows.unflatten(0, grid), side)  # [F, h, w, 3, p, p]
            tiles = tiles.permute(0, 3, 1, 4, 2, 5)  # [F, 3, h, p, w, p]
            frames = tiles.flatten(4).flatten(2, 3)  # [F, 3, H, W]
            tokens = self._model.encode(frames).float()
            code = time_code(len(frames), self.width).to(tokens.device)
            # without the time code, which is the same in all clips of as many frames
            pooled.append(tokens.mean(dim=(0, 1)))
            coded = tokens + code[:, None]  # all tokens of a frame get the code of its index
            tokens_of_items.append(coded.flatten(0, 1))
        return EncodedBatch(
            tokens=torch.cat(tokens_of_items),
            lengths=torch.tensor([len(item) for item in tokens_of_items], device=rows.device),
            pooled=torch.stack(pooled),
        )


def time_code(count: int, width: int) -> torch.Tensor:
    """Sine and cosine code float32 [count, width] of the frame indices 0, 1, ..."""
    half = width // 2
    rates = TIME_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    indices = torch.arange(count, dtype=torch.float64)
    angles = indices[:, None] * rates
    code = torch.zeros(count, width)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    code[:, : 2 * half] = waves.float()  # the last channel of an odd width stays zero
    return code


def build_encoder(
    config: InputConfig, model_name: str, model_weight: str, seed: int
) -> ProbeEncoder:
    """Frozen encoder of the family that `config` names.

    Encoders of ours come from anything that model_factory/open_encoder.py names; `random` is an
    untrained one of --model_name, the baseline. Image encoders come from a Hugging Face folder.
    Raises ValueError for anything else, and for a folder that differs from its checksums or could
    run code (model_factory/model_folder.py).
    """
    if config.family in IMAGE_FAMILIES:
        image_encoder = load_image_encoder(config.family, model_weight)
        if config.mean is not None and config.std is not None:
            image_encoder.set_normalisation(config.mean, config.std)
        return FramewiseEncoder(image_encoder)
    normalisation = None
    if config.mean is not None and config.std is not None:
        normalisation = gain_and_offset(config.mean, config.std)
    model = packed_model(model_name, model_weight=model_weight, seed=seed)
    return PackedProbeEncoder(model, normalisation)


def packed_model(model_name: str | None, model_weight: str, seed: int = 0) -> LlavaViTPackingModel:
    """An encoder of ours from anything that open_encoder.py names; ValueError for another.

    A file without a .json beside it is read as --model_name with the rope pairing `legacy`, that of
    the public weights.
    """
    location = locate_encoder(model_weight)
    if location.kind is Kind.NOTHING:
        raise ValueError(
            f"--model_weight {model_weight!r} is no Hugging Face folder, no training run or "
            "checkpoint and no weights file; write `random` to evaluate an untrained encoder"
        )
    if location.families:
        families = " or ".join(location.families)
        raise ValueError(
            f"{location.path} is a {location.model_type} model: pass --model_family {families}"
        )
    if location.kind is Kind.WEIGHTS and not location.is_described:
        described = location.path.with_suffix(".json").name
        LOG.warning(
            "%s has no %s beside it: read as %s with the rope pairing of public weights",
            location.path,
            described,
            model_name,
        )
    # public weights follow the legacy rule, new ones of ours the rotary rule
    rope_pairing = "rotary" if location.kind is Kind.RANDOM else "legacy"
    return open_encoder(
        location,
        model_name=model_name,
        rope_pairing=rope_pairing,
        seed=seed,
        read_run=lambda path: read_encoder(path)[0],
    )


def _identity(model: Model, normalisation: torch.Tensor | None) -> str:
    """Hash of the configuration, the preprocessing and every weight."""
    if isinstance(model, FrozenImageEncoder):
        config = model.model.config
        preprocessing: object = model.preprocessing
    else:
        config = model.config
        preprocessing = normalisation
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in STORAGE_FIELDS and not name.startswith("_")
    }
    text = json.dumps([fields, str(preprocessing)], sort_keys=True, default=str)
    return weights_sha256(text, {**model.state_dict(), **dict(model.named_buffers())})
