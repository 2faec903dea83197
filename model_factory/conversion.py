"""From a backbone.pt to a Hugging Face folder of the packing model,
checked before and after it is written.

Checks, in fp32: an image, a moving video at interpolated times, and a mixed pack of both, each
through the dense source model and through the packing model; then all of them again after reloading
the folder.
"""

from pathlib import Path

import torch

from .backbone import load_backbone, read_weights
from .packing import (
    TARGET_FRAMES,
    compute_patch_positions_from_grid_thw,
    compute_patch_positions_with_interpolated_temporal,
    interpolate_frame_indices,
    patchify,
)
from .registry import create_model
from .vit_preview_v0 import LlavaViTEncoder
from .vit_preview_v0_packing_hf import LlavaViTPackingModel, save_encoder_folder

TOLERANCE = 1e-4  # absolute, fp32; the two models may differ in norm eps (1e-5 and 1e-6)
NUM_FRAMES = 8


class ConversionError(ValueError):
    """A checkpoint that does not convert faithfully; the message says where."""


def convert(
    model_name: str, weight_path: Path, output_dir: Path, rope_pairing: str = "legacy"
) -> list[str]:
    """Convert and verify; returns one line per check. Raises ConversionError or ValueError.

    The configuration is read from the .json beside the weights when there is one, else it is the
    registered one with `rope_pairing` (the public weights' rule is "legacy").
    """
    target = load_backbone(weight_path, model_name, rope_pairing).eval()
    source = _source_model(target, weight_path, model_name)
    lines = [f"before saving: {line}" for line in _verify(source, target)]
    save_encoder_folder(target, output_dir)
    reloaded = LlavaViTPackingModel.from_pretrained(output_dir, dtype=torch.float32).eval()
    return lines + [f"after reloading: {line}" for line in _verify(source, reloaded)]


def _source_model(
    target: LlavaViTPackingModel, weight_path: Path, model_name: str
) -> LlavaViTEncoder:
    """The dense source model of the same weights;
    with a public file it has the source's own norm eps.
    """
    if weight_path.with_suffix(".json").is_file():
        source = LlavaViTEncoder(target.config)
    else:
        source = create_model(model_name, rope_pairing=target.config.rope_pairing)
    source.trunk.load_state_dict(read_weights(weight_path))
    return source.eval()


def _verify(source: LlavaViTEncoder, target: LlavaViTPackingModel) -> list[str]:
    """Compare both models on the three inputs; ConversionError names the first one that differs."""
    size = 14 * target.config.patch_size
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 4 - 2
    video = _moving_video(size)
    image_case = _packed_image(image, target.config.patch_size)
    video_case = _packed_video(video, target.config.patch_size)
    with torch.inference_mode():
        dense_image, dense_video = source(image), _dense_video(source, video)
        lines = [
            _compare("image", target, [image_case], [dense_image]),
            _compare("video", target, [video_case], [dense_video]),
            _compare("mixed pack", target, [video_case, image_case], [dense_video, dense_image]),
        ]
    return lines


def _moving_video(size: int) -> torch.Tensor:
    """A texture that moves from frame to frame, [1, 3, T, H, W]:
    a wrong frame order cannot go unnoticed.
    """
    texture = torch.randn(3, size, size, generator=torch.Generator().manual_seed(1))
    frames = [texture.roll((5 * t, 11 * t), dims=(1, 2)) for t in range(NUM_FRAMES)]
    return torch.stack(frames, dim=1)[None]


def _frame_times() -> torch.Tensor:
    indices = torch.arange(NUM_FRAMES)[None]
    return interpolate_frame_indices(indices, torch.tensor([NUM_FRAMES]), TARGET_FRAMES)


def _dense_video(source: LlavaViTEncoder, video: torch.Tensor) -> dict[str, torch.Tensor]:
    """The public way: frames scattered into an empty 64-frame clip, only their patches visible."""
    times = _frame_times()[0]
    clip = torch.zeros(1, 3, TARGET_FRAMES, *video.shape[-2:])
    clip[:, :, times] = video
    per_frame = (video.shape[-1] // source.config.patch_size) ** 2
    visible = (times[:, None] * per_frame + torch.arange(per_frame)).reshape(1, -1)
    return source(clip, visible_indices=visible)


def _packed_image(image: torch.Tensor, patch_size: int):
    rows = patchify(image, patch_size)[0]
    side = image.shape[-1] // patch_size
    grid = torch.tensor([[1, side, side]])
    return rows, grid, compute_patch_positions_from_grid_thw(grid)


def _packed_video(video: torch.Tensor, patch_size: int):
    rows = patchify(video[0].transpose(0, 1), patch_size).flatten(0, 1)
    side = video.shape[-1] // patch_size
    positions = compute_patch_positions_with_interpolated_temporal(_frame_times(), side, side)
    return rows, torch.tensor([[NUM_FRAMES, side, side]]), positions


def _compare(name: str, target: LlavaViTPackingModel, cases, dense) -> str:
    rows, grids, positions = (torch.cat(parts) for parts in zip(*cases, strict=True))
    out = target(rows, grid_thw=grids, patch_positions=positions)
    tokens = torch.cat([result["visible_embeddings"][0] for result in dense])
    pooled = torch.cat([result["head_output"] for result in dense])
    if out.last_hidden_state.shape != tokens.shape:
        raise ConversionError(
            f"{name}: {list(out.last_hidden_state.shape)} tokens, the source has "
            f"{list(tokens.shape)}"
        )
    differences = (out.last_hidden_state - tokens, out.pooler_output - pooled)
    worst = float(torch.stack([difference.abs().max() for difference in differences]).max())
    if not worst <= TOLERANCE:
        raise ConversionError(
            f"{name}: source and packing model differ by {worst:.2e}, allowed are {TOLERANCE:.0e}"
        )
    return f"{name}: {len(tokens)} tokens agree, largest difference {worst:.1e}"
