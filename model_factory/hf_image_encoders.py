"""Frozen public image encoders behind one call: frames in, patch tokens out.

    encoder = load_image_encoder("dinov2", "path/of/a/downloaded/folder")
    tokens = encoder.encode(frames)        # uint8 [B, 3, H, W] -> [B, L, D]

Everything comes from a local folder through transformers' own classes; nothing is fetched and no
code of the folder is run. A folder of another model than the family named is an error. Cost: that
of the model; frames are resized on their own device.

Shape legend: B frames, L patch tokens of a frame, D width, p patch size.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .packing import CLIP_MEAN, CLIP_STD, patchify

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
# public family name: the model types that its folders come with
FAMILIES = {
    "clip": ("clip",),
    "metaclip": ("clip", "metaclip_2"),
    "siglip": ("siglip",),
    "siglip2": ("siglip", "siglip2"),  # fixed sizes are stored as siglip, NaFlex as siglip2
    "dinov2": ("dinov2", "dinov2_with_registers"),
    "dinov3": ("dinov3_vit",),
    "aimv2": ("aimv2",),
}


class FrozenImageEncoder(nn.Module):
    """A vision model with its preprocessing; see `encode`."""

    def __init__(self, model: nn.Module, kind: _VisionModel, norm: tuple, size: int):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.kind, self.size = kind, size
        self.patch_size: int = model.config.patch_size
        self.width: int = model.config.hidden_size
        registers = getattr(model.config, "num_register_tokens", 0)
        self.num_extra_tokens = registers + kind.class_token
        for name, values in zip(("mean", "std"), norm, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "FrozenImageEncoder":
        """Stays in evaluation mode: a frozen model's dropout must not follow its surroundings."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Patch tokens [B, L, D] of frames [B, 3, H, W], uint8 or float in 0..1, in raster order.

        Frames are scaled (bicubic) so that the short side fits the model's picture size and
        cropped at the centre; NaFlex models keep the aspect and take as many patches as they may.
        Class and register tokens are left out. Raises ValueError for another shape or range.
        """
        pixels = self._checked(frames)
        if self.kind.naflex:
            return self._encode_naflex(pixels)
        pixels = self._normalised(_short_side_crop(pixels, self.size))
        out = self.model(pixel_values=pixels)
        return out.last_hidden_state[:, self.num_extra_tokens :]

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Same as `encode`."""
        return self.encode(frames)

    def _encode_naflex(self, pixels: torch.Tensor) -> torch.Tensor:
        p = self.patch_size
        grid = naflex_grid(*pixels.shape[-2:], p, NAFLEX_PATCHES)
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


def load_image_encoder(
    family: str, folder: str | Path, dtype: torch.dtype = torch.float32
) -> FrozenImageEncoder:
    """Frozen encoder of a family from a local folder (config.json and safetensors).

    Raises ValueError for an unknown family, a folder that is missing or of another model, and
    weights that are not all there.
    """
    import transformers

    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a local folder of a {family} model")
    model_type = str(json.loads(path.read_bytes()).get("model_type"))
    base = model_type.removesuffix("_vision_model")
    if base not in FAMILIES[family]:
        raise ValueError(
            f"{path} is a {model_type} model; a {family} folder has the model type "
            f"{' or '.join(FAMILIES[family])}"
        )
    kind = VISION_MODELS[base]
    model, info = getattr(transformers, kind.class_name).from_pretrained(
        str(folder), dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks the weights {', '.join(sorted(info['missing_keys']))}")
    norm, size = _preprocessing(Path(folder), kind, getattr(model.config, "image_size", None))
    return FrozenImageEncoder(model, kind, norm, size)


def naflex_grid(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of patches that keep the aspect and number at most `max_patches`."""
    scale = math.sqrt(max_patches * patch_size**2 / (height * width))
    rows, columns = (max(1, round(side * scale / patch_size)) for side in (height, width))
    while rows * columns > max_patches:  # rounding up both sides can exceed the budget
        rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
    return rows, columns


def _preprocessing(folder: Path, kind: _VisionModel, image_size) -> tuple[tuple, int]:
    """Normalisation and picture side: the folder's own, else the family's."""
    path = folder / "preprocessor_config.json"
    described = json.loads(path.read_bytes()) if path.is_file() else {}
    norm = tuple(
        tuple(described.get(name) or default)
        for name, default in zip(("image_mean", "image_std"), kind.norm, strict=True)
    )
    crop = described.get("crop_size") if described.get("do_center_crop", True) else None
    for size in (crop, described.get("size")):
        sides = list(size.values()) if isinstance(size, dict) else [size]
        if isinstance(sides[0], int):
            return norm, sides[0]
    return norm, image_size or DEFAULT_SIZE


def _resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def _short_side_crop(pixels: torch.Tensor, size: int) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    pixels = _resize(pixels, (max(size, round(height * scale)), max(size, round(width * scale))))
    top, left = ((side - size) // 2 for side in pixels.shape[-2:])
    return pixels[..., top : top + size, left : left + size]
