"""Files of a benchmark -> pixels, read in child processes that no file can hang or kill.

    parent   PixelReader.read(PixelRequest)       pictures, or a RejectedInput with its reason
    child    python -m eval_encoder.probe.reader  read_pixels, one request at a time

Videos are read by the packer's own reader (data_pipeline/codec), so a probe sees the pictures that
packing sees. decord and torchcodec are there for comparisons: decord gives other frames than asked
for in many containers (docs/evaluation.md), and conceals damage.

Whole frames lie in equal segments of the clip, (n - 1) / S frames long, as published: 8 frames of
64 are 3, 11, 19, ... This file needs no torch: a child starts in 0.2 s.
"""

import functools
import importlib.util
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.codec.decode import decode_video
from data_pipeline.codec.decompose import decompose_video
from data_pipeline.codec.framing import frame_to
from data_pipeline.codec.guard import WALL_SECONDS, Answer, GuardedPool, serve
from data_pipeline.codec.open_video import InputLimits, open_image, open_video
from data_pipeline.codec.patches import choose_patches
from data_pipeline.codec.saliency import SaliencyConfig
from data_pipeline.codec.timeline import read_timeline
from data_pipeline.errors import RejectedInput

MODULE = "eval_encoder.probe.reader"
KINDS = ("image", "picture", "frames", "patches")
READERS = ("av", "decord", "torchcodec")


@dataclass(frozen=True)
class PixelRequest:
    """What is wanted of a file.

    kind      image: the square of one picture; picture: all of it; frames: whole frames of a clip;
              patches: a decomposed clip
    place     of the square along the long side, 0 to 1
    within    frames: the place of each in its segment, 0 to 1
    decoder   frames: av, decord or torchcodec, with so many threads
    num_frames, gop, num_patches, camera, centre_prior   patches: as in packing
    limits    what the file may be at most
    """

    path: str
    kind: str
    size: int
    patch_size: int
    place: float = 0.5
    within: tuple[float, ...] = ()
    decoder: str = "av"
    decoder_threads: int = 1
    num_frames: int = 64
    gop: int = 16
    num_patches: int = 0
    camera: str = "median"
    centre_prior: float = 0.0
    limits: InputLimits = InputLimits()

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("decoder", READERS)):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")


@dataclass(frozen=True)
class Pixels:
    """Pictures uint8 [T, H, W, 3] of a file with `total` frames.

    numbers     int64 [T], of frames: which of the file's frames they are
    positions   int64 [K, 3], of patches: frame, row and column of those that are chosen
    times       int64 [T], of patches: temporal positions of the frames
    """

    pictures: np.ndarray
    total: int = 1
    numbers: np.ndarray | None = None
    positions: np.ndarray | None = None
    times: np.ndarray | None = None


class PixelReader:
    """Child processes that read files; `read` may be called from as many threads."""

    def __init__(self, num_workers: int, wall_seconds: float = WALL_SECONDS):
        """wall_seconds: limit of one file."""
        self._pool = GuardedPool(
            module=MODULE, settings={}, num_workers=num_workers, wall_seconds=wall_seconds
        )

    def read(self, request: PixelRequest) -> Pixels:
        """Raises RejectedInput for a file that cannot be read, or not within its time."""
        header, parts = self._pool.ask(asdict(request), request.path)
        arrays = {
            name: np.frombuffer(data, kind).reshape(shape).copy()
            for (name, kind, shape), data in zip(header["arrays"], parts, strict=True)
        }
        return Pixels(total=header["total"], **arrays)

    def picture(self, path: Path, limits: InputLimits | None = None) -> np.ndarray:
        """One picture, uint8 [H, W, 3]. Raises RejectedInput as `read`."""
        limits = limits or InputLimits()
        request = PixelRequest(str(path), kind="picture", size=0, patch_size=0, limits=limits)
        return self.read(request).pictures[0]

    def close(self) -> None:
        """End the child processes."""
        self._pool.close()


def shared_reader() -> PixelReader:
    """A reader with one child for all of this process. A fork of it gets one of its own, since two
    processes cannot talk to one child."""
    return _reader_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _reader_of(process_id: int) -> PixelReader:
    return PixelReader(num_workers=1)


def check_decoder(name: str) -> None:
    """Raise ValueError for a decoder that is not installed."""
    if name != "av" and importlib.util.find_spec(name) is None:
        raise ValueError(f"--decoder {name} is not installed: pip install it, or take av")


def segment_frames(total: int, within: tuple[float, ...]) -> np.ndarray:
    """Frames of a clip of `total` frames at the places `within` its equal segments, int64
    [len(within)]; those of a short clip repeat."""
    count = len(within)
    return ((np.arange(count) + np.array(within)) * (total - 1) / count).astype(np.int64)


def read_pixels(request: PixelRequest) -> Pixels:
    """Read a file in this process; the limits of time and memory are the child's.

    Raises RejectedInput.
    """
    if request.kind in ("image", "picture"):
        pictures = open_image(Path(request.path), request.limits)[None]
        return Pixels(_framed(pictures, request) if request.kind == "image" else pictures)
    if request.kind == "patches":
        return _read_patches(request)
    read = {"av": _read_with_av, "decord": _read_with_decord, "torchcodec": _read_with_torchcodec}
    is_ours = request.decoder == "av" or not _is_plain(Path(request.path), request.limits)
    return read["av" if is_ours else request.decoder](request)


def _read_patches(request: PixelRequest) -> Pixels:
    clip = decompose_video(
        Path(request.path),
        num_frames=request.num_frames,
        size=request.size,
        patch_size=request.patch_size,
        gop=request.gop,
        limits=request.limits,
        place=request.place,
    )
    selection = choose_patches(
        clip,
        patch_size=request.patch_size,
        budget=request.num_patches,
        saliency=SaliencyConfig(camera=request.camera, centre_prior=request.centre_prior),
    )
    return Pixels(
        pictures=clip.frames,
        total=clip.num_source_frames,
        positions=selection.positions.astype(np.int64),
        times=clip.times.astype(np.int64),
    )


def _read_with_av(request: PixelRequest) -> Pixels:
    def wanted(total: int) -> np.ndarray:
        return np.unique(segment_frames(total, request.within))

    video = decode_video(
        Path(request.path),
        num_frames=wanted,
        size=request.size,
        patch_size=request.patch_size,
        limits=request.limits,
        place=request.place,
        thorough=False,
    )
    total = video.num_source_frames
    numbers = segment_frames(total, request.within)
    return Pixels(video.frames[np.searchsorted(wanted(total), numbers)], total, numbers)


def _read_with_decord(request: PixelRequest) -> Pixels:
    import decord

    try:
        reader = decord.VideoReader(
            request.path, ctx=decord.cpu(0), num_threads=request.decoder_threads
        )
        total = len(reader)
        numbers = segment_frames(total, request.within)
        raw = reader.get_batch(list(numbers)).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise RejectedInput("decode", f"{request.path}: {str(error).splitlines()[0]}") from error
    return Pixels(_framed(raw, request), total, numbers)


def _read_with_torchcodec(request: PixelRequest) -> Pixels:
    from torchcodec.decoders import VideoDecoder

    try:
        reader = VideoDecoder(
            request.path, dimension_order="NHWC", num_ffmpeg_threads=request.decoder_threads
        )
        total = len(reader)
        numbers = segment_frames(total, request.within)
        raw = reader.get_frames_at(numbers.tolist()).data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        raise RejectedInput("decode", f"{request.path}: {str(error).splitlines()[0]}") from error
    return Pixels(_framed(raw, request), total, numbers)


def _is_plain(path: Path, limits: InputLimits) -> bool:
    """Whether frames are shown as they are stored: upright, square pixels, not interlaced; other
    decoders ignore all three. Checks the container, its limits and its end by the way.
    """
    import av

    read_timeline(path, limits)
    container, stream = open_video(path, limits)
    try:
        first = next(container.decode(stream))
    except (av.FFmpegError, StopIteration) as error:
        raise RejectedInput("decode", f"{path}: no frame can be decoded: {error}") from error
    finally:
        container.close()
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1
    return first.rotation == 0 and aspect == 1 and not first.interlaced_frame


def _framed(pictures: np.ndarray, request: PixelRequest) -> np.ndarray:
    """The square of each picture, uint8 [T, H, W, 3] -> [T, size, size, 3]."""
    framing = frame_to(
        height=pictures.shape[1],
        width=pictures.shape[2],
        size=request.size,
        patch_size=request.patch_size,
        fit="crop",
        place=request.place,
    )
    return np.stack([framing.scale(picture) for picture in pictures])


def _prepare(settings: dict):
    """Child: the function that answers requests."""

    def answer(values: dict) -> Answer:
        within = tuple(values.pop("within"))
        limits = InputLimits(**values.pop("limits"))
        pixels = read_pixels(PixelRequest(within=within, limits=limits, **values))
        arrays = {k: value for k, value in vars(pixels).items() if isinstance(value, np.ndarray)}
        shapes = [[name, value.dtype.str, value.shape] for name, value in arrays.items()]
        parts = [value.tobytes() for value in arrays.values()]
        return {"total": pixels.total, "arrays": shapes}, parts

    return answer


if __name__ == "__main__":
    serve(_prepare)
