"""Frozen public image encoders behind one call that maps frames to patch tokens.

    encoder = load_image_encoder("dinov2", "path/of/a/downloaded/folder")
    tokens = encoder.encode(frames)        # uint8 [B, 3, H, W] -> [B, L, D]

Everything comes from a local folder through transformers' own classes; nothing is fetched and no
code of the folder is run. A folder of another model than the named family is an error. Cost: that
of the model; frames are resized on their own device.

Shape legend: B frames, L patch tokens of a frame, D width, p patch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from .command_line.reading import names_place
from .model_folder import LOCAL, check_model_folder, json_object, model_type_of
from .packing import CLIP_MEAN, CLIP_STD, MAX_BYTE, patchify
from .registry import IMAGE_FAMILIES as FAMILIES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Channels = tuple[float, float, float]
Norm = tuple[Channels, Channels]  # mean and std of pixels from 0 to 1

# what the families were trained with, as in their public preprocessor_config.json
CLIP_NORM: Norm = (CLIP_MEAN, CLIP_STD)
IMAGENET_NORM: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_NORM: Norm = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DEFAULT_SIZE = 224  # the size of most public image encoders, for a folder that names none
NAFLEX_PATCHES = 256  # most patches of a frame, by default, for models of any image size


@dataclass(frozen=True)
class _VisionModel:
    """A vision model of transformers.

    class_name   of its class
    class_token  whether a class token precedes the patch tokens
    norm         normalisation where the folder has no preprocessor_config.json
    naflex       whether it takes images of any aspect as a list of patches
    """

    class_name: str
    class_token: bool
    norm: Norm
    naflex: bool = False


VISION_MODELS = {
    "clip": _VisionModel("CLIPVisionModel", class_token=True, norm=CLIP_NORM),
    "metaclip_2": _VisionModel("MetaClip2VisionModel", class_token=True, norm=CLIP_NORM),
    "siglip": _VisionModel("SiglipVisionModel", class_token=False, norm=HALF_NORM),
    "siglip2": _VisionModel("Siglip2VisionModel", class_token=False, norm=HALF_NORM, naflex=True),
    "dinov2": _VisionModel("Dinov2Model", class_token=True, norm=IMAGENET_NORM),
    "dinov2_with_registers": _VisionModel(
        "Dinov2WithRegistersModel", class_token=True, norm=IMAGENET_NORM
    ),
    "dinov3_vit": _VisionModel("DINOv3ViTModel", class_token=True, norm=IMAGENET_NORM),
    "aimv2": _VisionModel("Aimv2VisionModel", class_token=False, norm=CLIP_NORM),
}


@dataclass(frozen=True)
class Preprocessing:
    """How frames are prepared.

    norm         mean and std
    resize       short side after scaling, in pixels
    crop         side of the centre crop, in pixels
    max_patches  of a frame, for NaFlex models
    """

    norm: Norm
    resize: int
    crop: int
    max_patches: int = NAFLEX_PATCHES


class FrozenImageEncoder(nn.Module):
    """A vision model with its preprocessing; see `encode`."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: PreTrainedModel, kind: _VisionModel, preprocessing: Preprocessing):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.kind = kind
        self.preprocessing = preprocessing
        self.patch_size: int = model.config.patch_size
        self.width: int = model.config.hidden_size
        registers = getattr(model.config, "num_register_tokens", 0)
        self.num_extra_tokens = registers + kind.class_token
        # filled by set_normalisation; not persistent, as they are no weights of the model
        self.register_buffer("mean", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(3, 1, 1), persistent=False)
        mean, std = preprocessing.norm
        self.set_normalisation(mean, std)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise by another mean and std per channel, of pixels from 0 to 1."""
        # one number per channel, against frames [B, 3, H, W]
        means = torch.tensor(mean)
        stds = torch.tensor(std)
        self.mean.copy_(means.view(3, 1, 1))
        self.std.copy_(stds.view(3, 1, 1))

    def train(self, mode: bool = True) -> FrozenImageEncoder:
        """Stay in evaluation mode, whatever mode the surrounding module is put into: dropout would
        change the tokens of a frozen model."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Patch tokens [B, L, D] of frames [B, 3, H, W], uint8 or float in 0..1, in raster order.

        Frames are scaled (bicubic) so that the short side has the folder's resize length, then
        cropped at the centre to the model's image size; NaFlex models keep the aspect and take as
        many patches as they may. Class and register tokens are left out. Raises ValueError for
        another shape or range.
        """
        pixels = _unit_range(frames)
        if self.kind.naflex:
            return self._encode_naflex(pixels)
        scaled = _scale_short_side(pixels, self.preprocessing.resize)
        cropped = _centre_crop(scaled, self.preprocessing.crop)
        out = self.model(pixel_values=self._normalised(cropped))
        return out.last_hidden_state[:, self.num_extra_tokens :]

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Same as `encode`."""
        return self.encode(frames)

    def _encode_naflex(self, pixels: torch.Tensor) -> torch.Tensor:
        p = self.patch_size
        height, width = pixels.shape[-2:]
        grid = naflex_grid(height, width, max_patches=self.preprocessing.max_patches)
        size = (grid[0] * p, grid[1] * p)
        resized = self._normalised(_resize(pixels, size))
        patches = patchify(resized, p).unflatten(-1, (3, p, p))
        # these models take the channel last inside of a patch
        rows = patches.movedim(-3, -1).flatten(-3)
        batch, count = rows.shape[:2]
        mask = torch.ones(batch, count, dtype=torch.int32, device=rows.device)
        shapes = torch.tensor([grid] * batch, device=rows.device)
        out = self.model(pixel_values=rows, pixel_attention_mask=mask, spatial_shapes=shapes)
        return out.last_hidden_state

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        return ((pixels - self.mean) / self.std).to(self.model.dtype)


@names_place("folder")
def load_image_encoder(
    family: str, folder: str | Path, dtype: torch.dtype = torch.float32
) -> FrozenImageEncoder:
    """Frozen encoder of a family, read from a local folder (config.json and safetensors).

    Raises ValueError for an unknown family, a folder that is missing or of another model, weights
    that are not all there, and what model_folder.py refuses.
    """
    import transformers

    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a local folder of a {family} model")
    check_model_folder(Path(folder))
    model_type = str(model_type_of(folder))
    base = model_type.removesuffix("_vision_model")
    if base not in FAMILIES[family]:
        raise ValueError(
            f"{path} is a {model_type} model; a {family} folder has the model type "
            f"{' or '.join(FAMILIES[family])}"
        )
    kind = VISION_MODELS[base]
    model, info = getattr(transformers, kind.class_name).from_pretrained(
        str(folder),
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        # the image half of a two-tower folder, where the class itself does not look for it
        key_mapping={r"^vision_model\.": ""} if base == "aimv2" else None,
        **LOCAL,
    )
    # unexpected tensors are no error: the text half of a two-tower folder is among them
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(f"{folder} lacks the weights {missing}")
    image_size = getattr(model.config, "image_size", None)
    preprocessing = _preprocessing(Path(folder), kind=kind, image_size=image_size)
    return FrozenImageEncoder(model, kind=kind, preprocessing=preprocessing)


def naflex_grid(height: int, width: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of patches of an image of height x width pixels, scaled with its aspect as
    far as `max_patches` allow: both sides are rounded up to whole patches, as in the public NaFlex
    preprocessing.
    """
    best = (0.0, 1, 1)
    for count in range(1, max_patches + 1):
        # the largest scales at which one side fills exactly `count` patches
        matching_columns = math.ceil(width * count / height)
        matching_rows = math.ceil(height * count / width)
        by_rows = (count / height, count, matching_columns)
        by_columns = (count / width, matching_rows, count)
        for scale, rows, columns in (by_rows, by_columns):
            if rows * columns <= max_patches:
                best = max(best, (scale, rows, columns))
    return best[1:]


def _unit_range(frames: torch.Tensor) -> torch.Tensor:
    """Frames as floats from 0 to 1; ValueError for another shape or range."""
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must have shape [B, 3, H, W], got {list(frames.shape)}")
    if frames.dtype == torch.uint8:
        return frames.float() / MAX_BYTE
    low = float(frames.min())
    high = float(frames.max())
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(
            f"frames must be uint8 or floats from 0 to 1, got {frames.dtype} from {low:.3g} to "
            f"{high:.3g}: the encoder normalises them itself"
        )
    return frames.float()


def _preprocessing(folder: Path, kind: _VisionModel, image_size: int | None) -> Preprocessing:
    """The folder's own preprocessing, completed by the family's."""
    path = folder / "preprocessor_config.json"
    described = json_object(path) if path.is_file() else {}
    mean, std = kind.norm
    resize = _side(described.get("size"))
    crop = None
    if described.get("do_center_crop", True):
        crop = _side(described.get("crop_size"))
    # the folder's statements before the model's own size
    crop = crop or resize or image_size or DEFAULT_SIZE
    return Preprocessing(
        norm=(
            tuple(described.get("image_mean") or mean),
            tuple(described.get("image_std") or std),
        ),
        resize=resize or crop,
        crop=crop,
        max_patches=described.get("max_num_patches", NAFLEX_PATCHES),
    )


def _side(size: int | dict[str, int] | None) -> int | None:
    """Side in pixels, from 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(size, dict):
        return next(iter(size.values()), None)
    return size


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    # bicubic weights are negative in places, so that values overshoot
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def _scale_short_side(pixels: torch.Tensor, side: int) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    scale = side / min(height, width)
    # the product of the short side may round to just below `side`
    scaled_height = max(side, int(height * scale))
    scaled_width = max(side, int(width * scale))
    return _resize(pixels, (scaled_height, scaled_width))


def _centre_crop(pixels: torch.Tensor, side: int) -> torch.Tensor:
    if min(pixels.shape[-2:]) < side:  # a folder that scales below its crop: scale to the crop
        pixels = _scale_short_side(pixels, side)
    height, width = pixels.shape[-2:]
    top = (height - side) // 2
    left = (width - side) // 2
    rows = slice(top, top + side)
    columns = slice(left, left + side)
    return pixels[..., rows, columns]
