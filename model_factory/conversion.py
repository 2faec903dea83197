"""From a backbone.pt to a Hugging Face folder of the packing model,
checked before and after it is written.

Every input goes, in fp32, through the dense source model and through the packing model: images of
several resolutions, moving videos at interpolated times, and one mixed pack of them all; once
before saving and once with the reloaded folder, whose tensors must also be those of the file bit
for bit, so that no random start can pass for a weight. Cost: some 17,000 tokens through the
encoder.
"""

import shutil
from pathlib import Path

import torch

from .backbone import load_backbone, read_weights
from .export_folder import save_encoder_folder
from .files import CHECKSUMS_NAME
from .packing import (
    TARGET_FRAMES,
    compute_patch_positions_from_grid_thw,
    compute_patch_positions_with_interpolated_temporal,
    interpolate_frame_indices,
    patchify,
)
from .state_dict_adapter import first_keys
from .vit_preview_v0 import LlavaViTEncoder
from .vit_preview_v0_packing_hf import LlavaViTPackingModel

TOLERANCE = 1e-4  # absolute, fp32
NUM_FRAMES = 8
IMAGE_GRIDS = ((14, 14), (10, 20), (24, 18))  # rows and columns of patches
VIDEO_GRIDS = ((14, 14), (6, 9))


class ConversionError(ValueError):
    """A checkpoint that does not convert faithfully; the message says where."""


def convert(
    model_name: str, weight_path: Path, output_dir: Path, rope_pairing: str = "legacy"
) -> list[str]:
    """Convert and verify; returns one line per check. Raises ConversionError or ValueError.

    The configuration is read from the .json beside the weights when there is one, else it is the
    registered one with `rope_pairing` (the public weights' rule is "legacy"); the norm eps of the
    source are kept, so that the folder is the same function.
    """
    target = load_backbone(weight_path, model_name, rope_pairing).eval()
    source = LlavaViTEncoder(target.config)
    source.load_state_dict(read_weights(weight_path))
    lines = [f"before saving: {line}" for line in _verify(source.eval(), target)]
    origin = {"converted from": f"{weight_path.name} ({model_name})"}
    if output_dir.exists() and not output_dir.is_dir():
        raise ConversionError(f"{output_dir} is a file: give a folder as --output_dir")
    # a folder appears under its name only when it has passed
    unproven = output_dir.with_name(f".{output_dir.name}.unproven")
    try:
        save_encoder_folder(target, unproven, origin)
        reloaded = LlavaViTPackingModel.from_pretrained(unproven, dtype=torch.float32).eval()
        lines.append(_same_tensors(read_weights(weight_path), reloaded))
        lines += [f"after reloading: {line}" for line in _verify(source, reloaded)]
        output_dir.mkdir(parents=True, exist_ok=True)
        # the checksums last: until they lie there, those of an older export refuse the new files
        for path in sorted(unproven.iterdir(), key=lambda path: path.name == CHECKSUMS_NAME):
            path.replace(output_dir / path.name)
    finally:
        shutil.rmtree(unproven, ignore_errors=True)
    return lines


def _same_tensors(weights: dict[str, torch.Tensor], reloaded: LlavaViTPackingModel) -> str:
    saved = reloaded.state_dict()
    changed = [
        name
        for name, tensor in weights.items()
        if not torch.equal(tensor, saved[name].to(tensor.dtype))
    ]
    if changed:
        raise ConversionError(f"tensors changed on the way: {first_keys(changed)}")
    return f"all {len(weights)} tensors of the file are in the folder, bit for bit"


def _verify(source: LlavaViTEncoder, target: LlavaViTPackingModel) -> list[str]:
    """Compare both models input by input; ConversionError names the first one that differs."""
    p = target.config.patch_size
    cases = {}
    for number, (height, width) in enumerate(IMAGE_GRIDS):
        generator = torch.Generator().manual_seed(number)
        image = torch.rand(1, 3, height * p, width * p, generator=generator) * 4 - 2
        cases[f"image {height * p}x{width * p}"] = image, _packed_image(image, p)
    for height, width in VIDEO_GRIDS:
        video = _moving_video(height * p, width * p)
        cases[f"moving video {height * p}x{width * p}"] = video, _packed_video(video, p)
    with torch.inference_mode():
        dense = {
            name: source(pixels) if pixels.ndim == 4 else _dense_video(source, pixels)
            for name, (pixels, _) in cases.items()
        }
        lines = [_compare(name, target, [cases[name][1]], [dense[name]]) for name in cases]
        names = sorted(cases)  # mixes images and videos
        packed = [cases[name][1] for name in names]
        lines.append(_compare("mixed pack", target, packed, [dense[name] for name in names]))
    return lines


def _moving_video(height: int, width: int) -> torch.Tensor:
    """A texture that moves from frame to frame, [1, 3, T, H, W]:
    a wrong frame order cannot go unnoticed.
    """
    texture = torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))
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
    per_frame = video.shape[-2] * video.shape[-1] // source.config.patch_size**2
    visible = (times[:, None] * per_frame + torch.arange(per_frame)).reshape(1, -1)
    return source(clip, visible_indices=visible)


def _packed_image(image: torch.Tensor, patch_size: int):
    rows = patchify(image, patch_size)[0]
    grid = torch.tensor([[1, image.shape[-2] // patch_size, image.shape[-1] // patch_size]])
    return rows, grid, compute_patch_positions_from_grid_thw(grid)


def _packed_video(video: torch.Tensor, patch_size: int):
    rows = patchify(video[0].transpose(0, 1), patch_size).flatten(0, 1)
    height, width = video.shape[-2] // patch_size, video.shape[-1] // patch_size
    positions = compute_patch_positions_with_interpolated_temporal(_frame_times(), height, width)
    return rows, torch.tensor([[NUM_FRAMES, height, width]]), positions


def _compare(name: str, target: LlavaViTPackingModel, cases, dense) -> str:
    rows, grids, positions = (torch.cat(parts) for parts in zip(*cases, strict=True))
    out = target(rows, grid_thw=grids, patch_positions=positions)
    tokens = torch.cat([result["visible_embeddings"][0] for result in dense])
    if out.last_hidden_state.shape != tokens.shape:
        raise ConversionError(
            f"{name}: {list(out.last_hidden_state.shape)} tokens, the source has "
            f"{list(tokens.shape)}"
        )
    differences = [out.last_hidden_state - tokens]
    if out.pooler_output is not None:  # a model without a head pools nothing
        pooled = torch.cat([result["head_output"] for result in dense])
        differences.append(out.pooler_output - pooled)
    worst = float(torch.stack([difference.abs().max() for difference in differences]).max())
    if not worst <= TOLERANCE:
        raise ConversionError(
            f"{name}: source and packing model differ by {worst:.2e}, allowed are {TOLERANCE:.0e}"
        )
    return f"{name}: {len(tokens)} tokens agree, largest difference {worst:.1e}"
