"""Raw video -> a view, for benchmarks that are not packed:
whole frames, or patches chosen by the codec.

decord reads frames where it is installed, PyAV otherwise; codec patches always come from PyAV,
which exports the motion vectors.
"""

from pathlib import Path

import numpy as np
import torch

from data_pipeline.codec.decode import decode_video, frame_to
from data_pipeline.codec.decompose import decompose_video
from data_pipeline.codec.open_video import InputLimits, open_video
from data_pipeline.codec.saliency import patch_saliency
from data_pipeline.codec.selection import select_patches
from data_pipeline.errors import RejectedInput
from data_pipeline.loading.views import View, still_view
from data_pipeline.shards.sample_builder import cut_patches
from model_factory.packing import interpolate_frame_indices


def have_decord() -> bool:
    """Whether decord can be imported."""
    try:
        import decord  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def frames_of_video(
    path: Path, num_frames: int, size: int, patch_size: int, target_frames: int, decoder: str
) -> View:
    """Whole frames from the middle of `num_frames` equal segments,
    at their times on the target time base.

    Raises RejectedInput for a file that cannot be read.
    """
    use_decord = decoder == "decord" or (decoder == "auto" and have_decord())
    reader = _read_with_decord if use_decord else _read_with_av
    pictures, indices, total = reader(path, num_frames, size, patch_size)
    times = interpolate_frame_indices(
        torch.tensor(indices)[None], torch.tensor([total]), target_frames
    )
    return still_view([torch.from_numpy(picture) for picture in pictures], patch_size, times)


def codec_patches_of_video(
    path: Path, num_tokens: int, size: int, patch_size: int, target_frames: int, gop: int
) -> View:
    """The `num_tokens` patches that packing would keep.
    Raises RejectedInput for a file that cannot be read.
    """
    clip = decompose_video(path, target_frames, size, patch_size, gop)
    selection = select_patches(patch_saliency(clip, patch_size), clip.is_i_frame, num_tokens)
    frame, row, column = selection.positions.astype(np.int64).T
    patches = torch.from_numpy(cut_patches(clip.frames, frame, row, column, patch_size))
    positions = np.stack([clip.times[frame], row, column], axis=-1)
    return View((patches.movedim(-1, 1),), torch.from_numpy(positions), (1, 1, len(patches)))


def segment_middles(total: int, count: int) -> np.ndarray:
    """Frame numbers in the middle of `count` equal segments of `total` frames."""
    return np.minimum(((np.arange(count) + 0.5) * total / count).astype(int), total - 1)


def _read_with_decord(path: Path, num_frames: int, size: int, patch_size: int):
    import decord
    from PIL import Image

    open_video(path, InputLimits())[0].close()  # container white list and limits, before decord
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        total = len(reader)
        indices = segment_middles(total, min(num_frames, total))
        raw = reader.get_batch(list(indices)).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise RejectedInput("decode", f"{path}: {str(error).splitlines()[0]}") from error
    framing = frame_to(*raw.shape[1:3], size, patch_size, "crop")
    scaled = (
        Image.fromarray(p).resize((framing.width, framing.height), Image.Resampling.BICUBIC)
        for p in raw
    )
    return np.stack([framing.cut(np.asarray(picture)) for picture in scaled]), indices, total


def _read_with_av(path: Path, num_frames: int, size: int, patch_size: int):
    # twice as many even frames plus one: every second one is the middle of a segment
    video = decode_video(path, 2 * num_frames + 1, size, patch_size)
    if len(video.frames) < 2 * num_frames + 1:
        indices = segment_middles(len(video.frames), min(num_frames, len(video.frames)))
        return video.frames[indices], indices, len(video.frames)
    return video.frames[1::2], np.arange(1, 2 * num_frames + 1, 2), 2 * num_frames + 1
