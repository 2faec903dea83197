"""Conversion of a backbone.pt to a Hugging Face folder of the packing model, verified before and
after it is written.

Every input goes, in fp32, through the dense source model and through the packing model: images of
several resolutions, moving videos at interpolated times, and one mixed pack of them all; once
before saving and once with the reloaded folder, whose tensors must also equal those of the file bit
for bit, so that no random start can pass for a weight. Cost: some 17,000 tokens through the
encoder.
"""

import shutil
from dataclasses import dataclass
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

TOLERANCE = 1e-4  # absolute, fp32: both models add in different orders
NUM_FRAMES = 8  # fewer than the 64 of the time base, so that times are interpolated
# rows and columns of patches: a square, wide, and high, as mixed up axes pass on squares
IMAGE_GRIDS = ((14, 14), (10, 20), (24, 18))
VIDEO_GRIDS = ((14, 14), (6, 9))


@dataclass(frozen=True)
class _Case:
    """One input, dense and as an item of a pack: rows [S, P], grid [1, 3], positions [S, 3]."""

    name: str
    pixels: torch.Tensor
    rows: torch.Tensor
    grid: torch.Tensor
    positions: torch.Tensor


class ConversionError(ValueError):
    """A checkpoint that does not convert faithfully; the message names the check that failed."""


def convert(
    model_name: str, weight_path: Path, output_dir: Path, rope_pairing: str = "legacy"
) -> list[str]:
    """Convert and verify; returns one line per check. Raises ConversionError or ValueError.

    The configuration is read from the .json beside the weights when there is one, else it is the
    registered one with `rope_pairing` (the public weights' rule is "legacy"); the norm eps of the
    source are kept, so that the folder is the same function.
    """
    target = load_backbone(
        weight_path,
        model_name=model_name,
        rope_pairing=rope_pairing,
    ).eval()
    source = LlavaViTEncoder(target.config)
    source.load_state_dict(read_weights(weight_path))
    lines = [f"before saving: {line}" for line in _verify(source.eval(), target)]
    # the name alone: a card that is published should not show this machine's folders
    origin: dict[str, object] = {"converted from": f"{weight_path.name} ({model_name})"}
    if output_dir.exists() and not output_dir.is_dir():
        raise ConversionError(f"{output_dir} is a file: give a folder as --output_dir")
    # a folder appears under its name only when it has passed
    unproven = output_dir.with_name(f".{output_dir.name}.unproven")
    try:
        save_encoder_folder(target, folder=unproven, run=origin)
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
        # in the file's dtype: the models are fp32, which holds half precision exactly
        if not torch.equal(tensor, saved[name].to(tensor.dtype))
    ]
    if changed:
        raise ConversionError(f"tensors changed on the way: {first_keys(changed)}")
    return f"all {len(weights)} tensors of the file are in the folder, bit for bit"


def _verify(source: LlavaViTEncoder, target: LlavaViTPackingModel) -> list[str]:
    """Compare both models input by input; ConversionError names the first one that differs."""
    p = target.config.patch_size
    channels = target.config.num_channels
    cases = [
        _image_case(seed, grid=grid, p=p, channels=channels)
        for seed, grid in enumerate(IMAGE_GRIDS)
    ]
    cases += [_video_case(grid, p=p, channels=channels) for grid in VIDEO_GRIDS]
    with torch.inference_mode():
        dense = [_dense(source, case.pixels) for case in cases]
        lines = [
            _compare(case.name, target, cases=[case], dense=[result])
            for case, result in zip(cases, dense, strict=True)
        ]
        lines.append(_compare("mixed pack", target, cases=cases, dense=dense))
    return lines


def _image_case(seed: int, grid: tuple[int, int], p: int, channels: int) -> _Case:
    """Noise in the range of normalised pixels; the grid counts patches of p x p pixels."""
    height, width = grid
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, channels, height * p, width * p, generator=generator)
    image = noise * 4 - 2  # CLIP's normalisation maps 0..1 to some -1.8..2.2
    grid_thw = torch.tensor([[1, height, width]])
    return _Case(
        name=f"image {height * p}x{width * p}",
        pixels=image,
        rows=patchify(image, p)[0],
        grid=grid_thw,
        positions=compute_patch_positions_from_grid_thw(grid_thw),
    )


def _video_case(grid: tuple[int, int], p: int, channels: int) -> _Case:
    """A texture that moves from frame to frame, so that a wrong frame order shows."""
    height, width = grid
    generator = torch.Generator().manual_seed(1)
    texture = torch.randn(channels, height * p, width * p, generator=generator)
    frames = []
    for t in range(NUM_FRAMES):
        # in pixels: no later frame is shifted by whole patches of 14 or 16
        shift = (5 * t, 11 * t)
        frames.append(texture.roll(shift, dims=(1, 2)))
    video = torch.stack(frames)  # [T, C, H, W]
    return _Case(
        name=f"moving video {height * p}x{width * p}",
        pixels=video.transpose(0, 1)[None],
        rows=patchify(video, p).flatten(0, 1),
        grid=torch.tensor([[NUM_FRAMES, height, width]]),
        positions=compute_patch_positions_with_interpolated_temporal(
            _times(), height=height, width=width
        ),
    )


def _times() -> torch.Tensor:
    """Times [1, T] of the frames of a video."""
    return interpolate_frame_indices(torch.arange(NUM_FRAMES)[None], torch.tensor([NUM_FRAMES]))


def _dense(source: LlavaViTEncoder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output of the source for an image [1, C, H, W] or a video [1, C, T, H, W]. A video is encoded
    the public way: its frames lie in an empty 64-frame clip, and only their patches are visible."""
    if pixels.ndim == 4:
        return source(pixels)
    height, width = pixels.shape[-2:]
    times = _times()[0]
    channels = pixels.shape[1]
    clip = torch.zeros(1, channels, TARGET_FRAMES, height, width)
    clip[:, :, times] = pixels
    per_frame = height * width // source.config.patch_size**2
    index_in_frame = torch.arange(per_frame)
    index_in_clip = times[:, None] * per_frame + index_in_frame
    visible = index_in_clip.reshape(1, -1)
    return source(clip, visible_indices=visible)


def _compare(
    name: str,
    target: LlavaViTPackingModel,
    cases: list[_Case],
    dense: list[dict[str, torch.Tensor]],
) -> str:
    """The line of a pack of these inputs; ConversionError where it differs from the dense
    outputs."""
    out = target(
        torch.cat([case.rows for case in cases]),
        grid_thw=torch.cat([case.grid for case in cases]),
        patch_positions=torch.cat([case.positions for case in cases]),
    )
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
    largest = [difference.abs().max() for difference in differences]
    worst = float(torch.stack(largest).max())
    # not `worst > TOLERANCE`: outputs with NaN must fail
    if not worst <= TOLERANCE:
        raise ConversionError(
            f"{name}: source and packing model differ by {worst:.2e}, allowed are {TOLERANCE:.0e}"
        )
    return f"{name}: {len(tokens)} tokens agree, largest difference {worst:.1e}"
