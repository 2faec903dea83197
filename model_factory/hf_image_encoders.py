"""Frozen public image encoders behind one call: frames in, patch tokens out.

    encoder = load_image_encoder("dinov2", "path/of/a/downloaded/folder")
    tokens = encoder.encode(frames)        # uint8 [B, 3, H, W] -> [B, L, D]

Everything comes from a local folder through transformers' own classes; nothing is fetched and no
code of the folder is run. A folder of another model than the family named is an error. Cost: that
of the model; frames are resized on their own device.

Shape legend: B frames, L patch tokens of a frame, D width, p patch size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .command_line.reading import names_place
from .model_folder import LOCAL, check_model_folder, json_object, model_type_of
from .packing import CLIP_MEAN, CLIP_STD, patchify
from .registry import IMAGE_FAMILIES as FAMILIES

CLIP_NORM = (CLIP_MEAN, CLIP_STD)
IMAGENET_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_NORM = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DEFAULT_SIZE = 224
NAFLEX_PATCHES = 256  # most patches of a frame for models without a fixed picture size


@dataclass(frozen=True)
class _VisionModel:
    """A transformers class, what precedes its patch tokens, and the normalisation it was trained
    with (used where the folder has no preprocessor_config.json).
    """

    class_name: str
    class_token: bool
    norm: tuple
    naflex: bool = False


VISION_MODELS = {
    "clip": _VisionModel("CLIPVisionModel", True, CLIP_NORM),
    "metaclip_2": _VisionModel("MetaClip2VisionModel", True, CLIP_NORM),
    "siglip": _VisionModel("SiglipVisionModel", False, HALF_NORM),
    "siglip2": _VisionModel("Siglip2VisionModel", False, HALF_NORM, naflex=True),
    "dinov2": _VisionModel("Dinov2Model", True, IMAGENET_NORM),
    "dinov2_with_registers": _VisionModel("Dinov2WithRegistersModel", True, IMAGENET_NORM),
    "dinov3_vit": _VisionModel("DINOv3ViTModel", True, IMAGENET_NORM),
    "aimv2": _VisionModel("Aimv2VisionModel", False, CLIP_NORM),
}


@dataclass(frozen=True)
class Preprocessing:
    """(mean, std), short side after scaling, side of the centre crop, most NaFlex patches."""

    norm: tuple
    resize: int
    crop: int
    max_patches: int = NAFLEX_PATCHES


class FrozenImageEncoder(nn.Module):
    """A vision model with its preprocessing; see `encode`."""

    def __init__(self, model: nn.Module, kind: _VisionModel, preprocessing: Preprocessing):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.kind, self.preprocessing = kind, preprocessing
        self.patch_size: int = model.config.patch_size
        self.width: int = model.config.hidden_size
        registers = getattr(model.config, "num_register_tokens", 0)
        self.num_extra_tokens = registers + kind.class_token
        mean, std = preprocessing.norm
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise by another mean and std per channel, of pixels from 0 to 1."""
        self.mean.copy_(torch.tensor(mean).view(3, 1, 1))
        self.std.copy_(torch.tensor(std).view(3, 1, 1))

    def train(self, mode: bool = True) -> "FrozenImageEncoder":
        """Stays in evaluation mode: a frozen model's dropout must not follow its surroundings."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Patch tokens [B, L, D] of frames [B, 3, H, W], uint8 or float in 0..1, in raster order.

        Frames are scaled (bicubic) so that the short side has the folder's resize length, then
        cropped at the centre to the model's picture size; NaFlex models keep the aspect and take as
        many patches as they may.
        Class and register tokens are left out. Raises ValueError for another shape or range.
        """
        pixels = self._checked(frames)
        if self.kind.naflex:
            return self._encode_naflex(pixels)
        resize, crop = self.preprocessing.resize, self.preprocessing.crop
        pixels = self._normalised(_centre_crop(_short_side(pixels, resize), crop))
        out = self.model(pixel_values=pixels)
        return out.last_hidden_state[:, self.num_extra_tokens :]

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Same as `encode`."""
        return self.encode(frames)

    def _encode_naflex(self, pixels: torch.Tensor) -> torch.Tensor:
        p = self.patch_size
        grid = naflex_grid(*pixels.shape[-2:], self.preprocessing.max_patches)
        pixels = self._normalised(_resize(pixels, (grid[0] * p, grid[1] * p)))
        rows = patchify(pixels, p).unflatten(-1, (3, p, p)).movedim(-3, -1).flatten(-3)
        batch, count = rows.shape[:2]
        mask = torch.ones(batch, count, dtype=torch.int32, device=rows.device)
        shapes = torch.tensor([grid] * batch, device=rows.device)
        out = self.model(pixel_values=rows, pixel_attention_mask=mask, spatial_shapes=shapes)
        return out.last_hidden_state

    def _checked(self, frames: torch.Tensor) -> torch.Tensor:
        if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
            raise ValueError(f"frames must have shape [B, 3, H, W], got {list(frames.shape)}")
        if frames.dtype == torch.uint8:
            return frames.float() / 255
        low, high = float(frames.min()), float(frames.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"frames must be uint8 or floats from 0 to 1, got {frames.dtype} from {low:.3g} to "
                f"{high:.3g}: the encoder normalises them itself"
            )
        return frames.float()

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        return ((pixels - self.mean) / self.std).to(self.model.dtype)


@names_place("folder")
def load_image_encoder(
    family: str, folder: str | Path, dtype: torch.dtype = torch.float32
) -> FrozenImageEncoder:
    """Frozen encoder of a family from a local folder (config.json and safetensors).

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
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks the weights {', '.join(sorted(info['missing_keys']))}")
    image_size = getattr(model.config, "image_size", None)
    return FrozenImageEncoder(model, kind, _preprocessing(Path(folder), kind, image_size))


def naflex_grid(height: int, width: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture scaled as far as `max_patches` allow, with its
    aspect: both sides rounded up to whole patches, as the public NaFlex preprocessing does.
    """
    best = (0.0, 1, 1)
    for count in range(1, max_patches + 1):
        # the largest scales at which one side fills exactly `count` patches
        by_rows = (count / height, count, math.ceil(width * count / height))
        by_columns = (count / width, math.ceil(height * count / width), count)
        for scale, rows, columns in (by_rows, by_columns):
            if rows * columns <= max_patches:
                best = max(best, (scale, rows, columns))
    return best[1:]


def _preprocessing(folder: Path, kind: _VisionModel, image_size) -> Preprocessing:
    """The folder's own, else the family's."""
    path = folder / "preprocessor_config.json"
    described = json_object(path) if path.is_file() else {}
    norm = tuple(
        tuple(described.get(name) or default)
        for name, default in zip(("image_mean", "image_std"), kind.norm, strict=True)
    )
    resize = _side(described.get("size"))
    crop = _side(described.get("crop_size")) if described.get("do_center_crop", True) else None
    crop = crop or resize or image_size or DEFAULT_SIZE
    return Preprocessing(
        norm, resize or crop, crop, described.get("max_num_patches", NAFLEX_PATCHES)
    )


def _side(size) -> int | None:
    """Side in pixels out of 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    return next(iter(size.values()), None) if isinstance(size, dict) else size


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def _short_side(pixels: torch.Tensor, side: int) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    scale = side / min(height, width)
    return _resize(pixels, (max(side, int(height * scale)), max(side, int(width * scale))))


def _centre_crop(pixels: torch.Tensor, side: int) -> torch.Tensor:
    if min(pixels.shape[-2:]) < side:  # a folder that scales below its crop: scale to the crop
        pixels = _short_side(pixels, side)
    top, left = ((length - side) // 2 for length in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]
