"""One file -> a view: whole frames, patches selected by the codec, or an image; for both probes.

    validation   frames from the middle of S equal segments of the clip, centre crop
    crops        T samplings shifted within the segments, S crops along the long side
    versions     of training clips: a uniform position in every segment, other colours; drawn from
                 (seed, clip, version), so a version can be stored and met again

Pixels come from a child process (clip_reader.py).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline.codec.framing import Framing
from data_pipeline.codec.open_video import InputLimits, is_image
from data_pipeline.codec.patches import SelectionConfig
from data_pipeline.codec.saliency import SaliencyConfig
from data_pipeline.codec.selection import Order, cut_patches
from data_pipeline.loading.views import View, image_view, shrink, still_view, tube_view
from data_pipeline.random import counter_rng
from model_factory.packing import interpolate_frame_indices

from .clip_input import InputConfig
from .clip_reader import PixelReader, PixelRequest, check_decoder, recolour, shared_reader

GOPS = (16, 32, 64)  # packing's default, and what smaller budgets need


@dataclass(frozen=True, order=True)
class Look:
    """One way to look at a clip, given by its index in a list.

    version   0 is plain, others are drawn
    within    position of the frames in their segments, 0 to 1
    across    position of the crop along the long side, 0 to 1
    """

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
    frames_per_token: int = 1,
) -> View:
    """The view of a video or image; without a `reader`, by the one that this process shares. Whole
    frames and images are given in tubes of `frames_per_token`.

    Raises RejectedInput for a file that cannot be read.
    """
    framing = Framing(
        num_frames=config.target_frames,
        size=size,
        patch_size=patch_size,
        crop_position=look.across,
        limits=limits or InputLimits(),
    )
    request = _request(path, look, config=config, framing=framing)
    pixels = (reader or shared_reader()).read(request)
    frames = pixels.frames
    if look.version:
        draw = counter_rng(config.seed, "probe colours", look.clip, look.version)
        frames = recolour(frames, draw, parts=config.augmentations)
    if request.kind == "image":
        picture = image_view(torch.from_numpy(frames[0]), patch_size)
        return tube_view(picture, frames_per_token)
    if pixels.positions is not None and pixels.times is not None:
        patches = torch.from_numpy(cut_patches(frames, pixels.positions, patch_size=patch_size))
        positions = pixels.positions.copy()
        # A short clip has fewer frames than instants: frame numbers are no temporal positions.
        positions[:, 0] = pixels.times[positions[:, 0]]
        # selected patches fill no grid: they are given as one row of one frame
        grid = (1, 1, len(patches))
        channels_first = patches.movedim(-1, 1)
        return View((channels_first,), torch.from_numpy(positions), grid)
    # Whole frames have their times on the time base, whatever the length of the clip.
    times = interpolate_frame_indices(
        torch.from_numpy(pixels.numbers)[None],
        torch.tensor([pixels.total]),
        target_frames=config.target_frames,
    )
    scaled = [
        shrink(frame, patch_size=patch_size, scale=config.frame_scale)
        for frame in torch.from_numpy(frames)
    ]
    view = still_view(scaled, patch_size=patch_size, times=times)
    return tube_view(view, frames_per_token)


def chosen_decoder(config: InputConfig) -> str:
    """The reader of whole frames: av, the packer's own, unless another one is asked for. Raises
    ValueError when it is not installed."""
    if config.view == "codec" or config.decoder == "auto":
        return "av"
    check_decoder(config.decoder)
    return config.decoder


def selection_of(config: InputConfig) -> SelectionConfig:
    """How the patches of raw codec input are selected. Raises ValueError for settings that exclude
    each other."""
    saliency = SaliencyConfig(
        score=config.score,
        camera=config.camera,
        centre_prior=config.centre_prior,
    )
    order = Order(i_frame_share=config.i_frame_share)
    return SelectionConfig(rule=config.rule, order=order, saliency=saliency)


def chosen_gop(config: InputConfig, rows: int, columns: int) -> int:
    """Frames between I-frames of raw codec input: as asked for, else the smallest of 16, 32 and 64
    that leaves half of the budget to P-frames, whole frames having rows x columns patches.

    Raises ValueError for a budget that cannot hold the I-frames.
    """
    frames = config.target_frames
    budget = config.num_tokens
    selection = selection_of(config)

    def i_frame_tokens(gop: int) -> int:
        # rounded up: a shorter last group begins with an I-frame too
        return selection.whole_tokens(-(-frames // gop), rows=rows, columns=columns)

    fitting = [gop for gop in GOPS if i_frame_tokens(gop) <= budget // 2]
    gop = config.gop  # 0: not given
    if not gop:
        gop = fitting[0] if fitting else GOPS[-1]
    needed = i_frame_tokens(gop)
    if needed > budget:
        raise ValueError(
            f"--K_keep {budget} cannot hold the I-frames of {frames} frames, {needed} patches "
            f"with --gop {gop}: raise it, take a longer --gop, a smaller --input_size or "
            "--i_frame_share"
        )
    return gop


def _request(path: Path, look: Look, config: InputConfig, framing: Framing) -> PixelRequest:
    """What a look asks of a file."""
    if is_image(path):
        return PixelRequest(str(path), kind="image", framing=framing)
    if config.view == "codec":
        side = framing.size // framing.patch_size
        return PixelRequest(
            str(path),
            kind="patches",
            framing=framing,
            gop=chosen_gop(config, rows=side, columns=side),
            num_patches=config.num_tokens,
            selection=selection_of(config),
        )
    return PixelRequest(
        str(path),
        kind="frames",
        framing=replace(framing, within=positions_within(look, config)),
        decoder=chosen_decoder(config),
        decoder_threads=config.decoder_threads,
    )


def positions_within(look: Look, config: InputConfig) -> tuple[float, ...]:
    """Position of each whole frame in its segment, 0 to 1."""
    if look.version and "jitter" in config.augmentations:
        draw = counter_rng(config.seed, "probe jitter", look.clip, look.version)
        # one position per segment, so that frames stay in order
        within = draw.random(config.num_frames)
        return tuple(within.tolist())
    return (look.within,) * config.num_frames
