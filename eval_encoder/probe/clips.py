"""One file of a benchmark -> a view: whole frames, patches chosen by the codec, or a picture.

    validation   frames from the middle of S equal segments of the clip, centre square
    crops        T samplings shifted within the segments, S squares along the long side
    versions     of training clips: a uniform place in every segment, other colours; drawn from
                 (seed, clip, version), so a version can be stored and met again

Pixels come from a child process (probe_reader.py).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data_pipeline.codec.open_video import InputLimits, is_image
from data_pipeline.codec.patches import cut_patches
from data_pipeline.loading.views import View, image_view, still_view
from data_pipeline.random import counter_rng
from model_factory.packing import interpolate_frame_indices

from .augment import recolour
from .config import InputConfig
from .reader import PixelReader, PixelRequest, check_decoder, segment_frames, shared_reader

GOPS = (16, 32, 64)


@dataclass(frozen=True, order=True)
class Look:
    """What of a clip is looked at. `version` 0 is plain, others are drawn; `within` is the place of
    the frames in their segments, `across` that of the square along the long side, both 0 to 1."""

    clip: int
    version: int = 0
    within: float = 0.5
    across: float = 0.5


def view_of_file(
    path: Path,
    look: Look,
    config: InputConfig,
    size: int,
    patch_size: int,
    reader: PixelReader | None = None,
    limits: InputLimits | None = None,
) -> View:
    """The view of a video or picture; without a `reader`, by the one that this process shares.

    Raises RejectedInput for a file that cannot be read.
    """
    reader = reader or shared_reader()
    request = _request(path, look, config, size, patch_size)
    if limits is not None:
        request = replace(request, limits=limits)
    pixels = reader.read(request)
    pictures = _coloured(pixels.pictures, look, config)
    if request.kind == "image":
        return image_view(torch.from_numpy(pictures[0]), patch_size)
    if request.kind == "patches":
        patches = torch.from_numpy(cut_patches(pictures, pixels.positions, patch_size))
        positions = pixels.positions.copy()
        positions[:, 0] = pixels.times[positions[:, 0]]
        return View((patches.movedim(-1, 1),), torch.from_numpy(positions), (1, 1, len(patches)))
    times = interpolate_frame_indices(
        torch.from_numpy(pixels.numbers)[None],
        torch.tensor([pixels.total]),
        config.target_frames,
    )
    return still_view([torch.from_numpy(picture) for picture in pictures], patch_size, times)


def frame_numbers(total: int, look: Look, config: InputConfig) -> np.ndarray:
    """Frames of a clip of `total` frames, int64 [num_frames]; those of a short clip repeat."""
    return segment_frames(total, _places(look, config))


def chosen_decoder(config: InputConfig) -> str:
    """The reader of whole frames: av, the packer's own, unless another one is asked for. ValueError
    when it is not installed."""
    if config.view == "codec" or config.decoder == "auto":
        return "av"
    check_decoder(config.decoder)
    return config.decoder


def chosen_gop(config: InputConfig, frame_tokens: int) -> int:
    """Frames between I-frames of raw codec input: as asked for, else the smallest of 16, 32 and 64
    that leaves half of the budget to P-frames, whole frames having `frame_tokens` patches.

    Raises ValueError for a budget that cannot hold the I-frames.
    """
    frames, budget = config.target_frames, config.num_tokens

    def needed(gop: int) -> int:
        return -(-frames // gop) * frame_tokens

    fitting = [gop for gop in GOPS if needed(gop) <= budget // 2]
    gop = config.gop or (fitting[0] if fitting else GOPS[-1])
    if needed(gop) > budget:
        raise ValueError(
            f"--K_keep {budget} cannot hold the I-frames of {frames} frames, {needed(gop)} patches "
            f"with --gop {gop}: raise it, take a longer --gop, or a smaller --input_size"
        )
    return gop


def _request(
    path: Path, look: Look, config: InputConfig, size: int, patch_size: int
) -> PixelRequest:
    """What a look asks of a file."""
    shape = {"path": str(path), "size": size, "patch_size": patch_size, "place": look.across}
    if is_image(path):
        return PixelRequest(kind="image", **shape)
    if config.view == "codec":
        return PixelRequest(
            kind="patches",
            num_frames=config.target_frames,
            gop=chosen_gop(config, (size // patch_size) ** 2),
            num_patches=config.num_tokens,
            camera=config.camera,
            centre_prior=config.centre_prior,
            **shape,
        )
    return PixelRequest(
        kind="frames",
        within=_places(look, config),
        decoder=chosen_decoder(config),
        decoder_threads=config.decoder_threads,
        **shape,
    )


def _places(look: Look, config: InputConfig) -> tuple[float, ...]:
    """Place of each frame in its segment."""
    if look.version and "jitter" in config.augmentations:
        draw = counter_rng(config.seed, "probe jitter", look.clip, look.version)
        return tuple(draw.random(config.num_frames).tolist())
    return (look.within,) * config.num_frames


def _coloured(frames: np.ndarray, look: Look, config: InputConfig) -> np.ndarray:
    if not look.version:
        return frames
    draw = counter_rng(config.seed, "probe colours", look.clip, look.version)
    return recolour(frames, draw, config.augmentations)
