"""One file of a benchmark -> a view: whole frames, patches chosen by the codec, or a picture.

    validation   frames from the middle of S equal segments of the clip, centre square
    crops        T samplings shifted within the segments, S squares along the long side
    versions     of training clips: a uniform place in every segment, other colours; drawn from
                 (seed, clip, version), so a version can be stored and met again

Segments are (n - 1) / S frames long, as published: 8 frames of 64 are 3, 11, 19, ... Whole frames
are read by decord where it is installed, by PyAV otherwise, or by torchcodec; codec patches always
come from PyAV, which exports the motion vectors. decord shows pictures as they are stored, so clips
that are to be turned or stretched go to PyAV in any case. It also conceals damage inside of a file,
which PyAV rejects; a file that breaks off is rejected by all.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.codec.decode import decode_video
from data_pipeline.codec.decompose import decompose_video
from data_pipeline.codec.framing import frame_to
from data_pipeline.codec.open_video import InputLimits, is_image, open_image, open_video
from data_pipeline.codec.saliency import SaliencyConfig, is_static, patch_saliency
from data_pipeline.codec.selection import select_patches
from data_pipeline.codec.timeline import read_timeline
from data_pipeline.counter_rng import counter_rng
from data_pipeline.errors import RejectedInput
from data_pipeline.loading.views import View, image_view, still_view
from data_pipeline.shards.sample_builder import cut_patches
from model_factory.packing import interpolate_frame_indices

from .probe_augment import recolour
from .probe_config import InputConfig

GOPS = (16, 32, 64)


@dataclass(frozen=True, order=True)
class Look:
    """What of a clip is looked at. `version` 0 is plain, others are drawn; `within` is the place of
    the frames in their segments, `across` that of the square along the long side, both 0 to 1."""

    clip: int
    version: int = 0
    within: float = 0.5
    across: float = 0.5


def view_of_file(path: Path, look: Look, config: InputConfig, size: int, patch_size: int) -> View:
    """The view of a video or picture. Raises RejectedInput for a file that cannot be read."""
    framed = (size, patch_size, look.across)
    if is_image(path):
        picture = _picture(path, *framed)
        return image_view(torch.from_numpy(_coloured(picture[None], look, config)[0]), patch_size)
    if config.view == "codec":
        return _codec_patches(path, look, config, *framed)
    return _whole_frames(path, look, config, *framed)


def frame_numbers(total: int, look: Look, config: InputConfig) -> np.ndarray:
    """Frames of a clip of `total` frames, int64 [num_frames]; those of a short clip repeat."""
    count = config.num_frames
    within = np.full(count, look.within)
    if look.version and "jitter" in config.augmentations:
        draw = counter_rng(config.seed, "probe jitter", look.clip, look.version)
        within = draw.random(count)
    return ((np.arange(count) + within) * (total - 1) / count).astype(np.int64)


def have_decord() -> bool:
    """Whether decord can be imported."""
    try:
        import decord  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def chosen_decoder(config: InputConfig) -> str:
    """The reader of whole frames: decord, av or torchcodec. ValueError when it is not installed."""
    if config.view == "codec":
        return "av"
    if config.decoder == "auto":
        return "decord" if have_decord() else "av"
    if config.decoder != "av" and importlib.util.find_spec(config.decoder) is None:
        raise ValueError(f"--decoder {config.decoder} is not installed: pip install it, or take av")
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


def _coloured(frames: np.ndarray, look: Look, config: InputConfig) -> np.ndarray:
    if not look.version:
        return frames
    draw = counter_rng(config.seed, "probe colours", look.clip, look.version)
    return recolour(frames, draw, config.augmentations)


def _whole_frames(path, look, config, size, patch_size, place) -> View:
    decoder = chosen_decoder(config)
    if decoder != "av" and not _is_plain(path):
        decoder = "av"
    read = {"av": _read_with_av, "decord": _read_with_decord, "torchcodec": _read_with_torchcodec}
    asked = (path, look, config, size, patch_size, place)
    try:
        pictures, numbers, total = read[decoder](*asked)
    except RejectedInput:
        if decoder == "av" or config.decoder != "auto":
            raise
        pictures, numbers, total = _read_with_av(*asked)  # decord fails on some good narrow clips
    times = interpolate_frame_indices(
        torch.from_numpy(numbers)[None], torch.tensor([total]), config.target_frames
    )
    frames = [torch.from_numpy(picture) for picture in _coloured(pictures, look, config)]
    return still_view(frames, patch_size, times)


def _codec_patches(path, look, config, size, patch_size, place) -> View:
    """The patches that packing would keep."""
    gop = chosen_gop(config, (size // patch_size) ** 2)
    framed = (config.target_frames, size, patch_size, gop)
    clip = decompose_video(path, *framed, place=place)
    saliency = SaliencyConfig(camera=config.camera, centre_prior=config.centre_prior)
    selection = select_patches(
        patch_saliency(clip, patch_size, saliency),
        clip.is_i_frame,
        config.num_tokens,
        is_static=is_static(clip),
    )
    frame, row, column = selection.positions.astype(np.int64).T
    frames = _coloured(clip.frames, look, config)
    patches = torch.from_numpy(cut_patches(frames, frame, row, column, patch_size))
    positions = np.stack([clip.times[frame], row, column], axis=-1)
    return View((patches.movedim(-1, 1),), torch.from_numpy(positions), (1, 1, len(patches)))


def _picture(path: Path, size: int, patch_size: int, place: float) -> np.ndarray:
    return _framed(open_image(path, InputLimits())[None], size, patch_size, place)[0]


def _framed(pictures: np.ndarray, size: int, patch_size: int, place: float) -> np.ndarray:
    """uint8 [T, H, W, 3] -> [T, size, size, 3]."""
    framing = frame_to(*pictures.shape[1:3], size, patch_size, "crop", place)
    return np.stack([framing.scale(picture) for picture in pictures])


def _is_plain(path: Path) -> bool:
    """Whether frames are shown as they are stored: upright, square pixels, not interlaced. Checks
    the container, its limits and its end by the way, before any other reader opens the file."""
    import av

    read_timeline(path, InputLimits())
    container, stream = open_video(path, InputLimits())
    try:
        first = next(container.decode(stream))
    except (av.FFmpegError, StopIteration) as error:
        raise RejectedInput("decode", f"{path}: no frame can be decoded: {error}") from error
    finally:
        container.close()
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1
    return first.rotation == 0 and aspect == 1 and not first.interlaced_frame


def _read_with_decord(path, look, config, size, patch_size, place):
    import decord

    try:
        reader = decord.VideoReader(
            str(path), ctx=decord.cpu(0), num_threads=config.decoder_threads
        )
        total = len(reader)
        numbers = frame_numbers(total, look, config)
        raw = reader.get_batch(list(numbers)).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise RejectedInput("decode", f"{path}: {str(error).splitlines()[0]}") from error
    return _framed(raw, size, patch_size, place), numbers, total


def _read_with_torchcodec(path, look, config, size, patch_size, place):
    from torchcodec.decoders import VideoDecoder

    try:
        threads = {"num_ffmpeg_threads": config.decoder_threads}
        reader = VideoDecoder(str(path), dimension_order="NHWC", **threads)
        total = len(reader)
        numbers = frame_numbers(total, look, config)
        raw = reader.get_frames_at(numbers.tolist()).data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        raise RejectedInput("decode", f"{path}: {str(error).splitlines()[0]}") from error
    return _framed(raw, size, patch_size, place), numbers, total


def _read_with_av(path, look, config, size, patch_size, place):
    seen = {}

    def wanted(total: int) -> np.ndarray:
        seen["total"], seen["numbers"] = total, frame_numbers(total, look, config)
        return np.unique(seen["numbers"])

    video = decode_video(path, wanted, size, patch_size, place=place)
    numbers = seen["numbers"]
    return video.frames[np.searchsorted(np.unique(numbers), numbers)], numbers, seen["total"]
