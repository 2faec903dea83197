"""Files of a benchmark -> pixels, read in child processes that no file can hang or kill.

    parent   PixelReader.read(PixelRequest)       frames, or a RejectedInput with its reason
    child    python -m eval_encoder.clip_reader  read_pixels, one request at a time
    parent   recolour                             other colours, for drawn versions of a clip

Videos are read by the packer's own reader (data_pipeline/codec), so a probe sees the frames that
packing sees. decord and torchcodec are there for comparisons: decord gives other frames than asked
for in many containers (docs/evaluation.md), and conceals damage.

Whole frames lie in equal segments of the clip, (n - 1) / S frames long, as published: 8 frames of
64 are 3, 11, 19, ... This file needs no torch: a child starts in 0.2 s.

Shape legend: T frames, K patches.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from data_pipeline.codec.decode import decode_video
from data_pipeline.codec.framing import Framing, crop_of
from data_pipeline.codec.guard import WALL_SECONDS, Answer, GuardedPool, serve
from data_pipeline.codec.open_video import InputLimits, open_image, open_video
from data_pipeline.codec.patches import SelectionConfig, choose_patches, decompose
from data_pipeline.codec.timeline import read_timeline, segment_frames
from data_pipeline.errors import RejectedInput

MODULE = "eval_encoder.clip_reader"

# Of drawn versions. Probabilities are as published. How strong the changes are is not published:
# factors lie within 1 +- STRENGTH, and hues move by at most HUE_TURN of the circle.
LIKELY = 0.8
RARE = 0.1
STRENGTH = 0.4
HUE_TURN = 0.1


@dataclass(frozen=True)
class PixelRequest:
    """A request for the pixels of a file.

    kind      image: the square crop of an image; picture: all of it; frames: whole frames of a
              clip; patches: a decomposed clip and the patches that are selected of it
    framing   which frames, and which square of them; limits of the file
    decoder   frames: av, decord or torchcodec, with decoder_threads threads
    gop, num_patches, selection   patches: as in packing
    """

    path: str
    kind: str
    framing: Framing
    decoder: str = "av"
    decoder_threads: int = 1
    gop: int = 16
    num_patches: int = 0
    selection: SelectionConfig = field(default_factory=SelectionConfig)


@dataclass(frozen=True)
class Pixels:
    """Frames uint8 [T, H, W, 3] of a file with `total` frames; an image has one.

    numbers     int64 [T], of kind `frames`: which of the file's frames they are
    positions   int64 [K, 3], of kind `patches`: frame, row and column of the selected patches
    times       int64 [T], of kind `patches`: temporal positions of the frames
    """

    frames: np.ndarray
    total: int = 1
    numbers: np.ndarray | None = None
    positions: np.ndarray | None = None
    times: np.ndarray | None = None


class PixelReader:
    """Child processes that read files; `read` may be called from as many threads."""

    def __init__(self, num_workers: int, wall_seconds: float = WALL_SECONDS) -> None:
        """wall_seconds: limit of one file."""
        self._pool = GuardedPool(
            module=MODULE, settings={}, num_workers=num_workers, wall_seconds=wall_seconds
        )

    def read(self, request: PixelRequest) -> Pixels:
        """Raises RejectedInput for a file that cannot be read, or not within its time."""
        header, parts = self._pool.ask(asdict(request), request.path)
        # copied: an array over received bytes is read-only, of which torch warns
        arrays = {
            name: np.frombuffer(data, kind).reshape(shape).copy()
            for (name, kind, shape), data in zip(header["arrays"], parts, strict=True)
        }
        return Pixels(total=header["total"], **arrays)

    def picture(self, path: Path, limits: InputLimits | None = None) -> np.ndarray:
        """A whole image, uint8 [H, W, 3]. Raises RejectedInput as `read`."""
        framing = Framing(limits=limits or InputLimits())
        request = PixelRequest(str(path), kind="picture", framing=framing)
        return self.read(request).frames[0]

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


def read_pixels(request: PixelRequest) -> Pixels:
    """Read a file in this process; the limits of time and memory are the child's.

    Raises RejectedInput.
    """
    limits = request.framing.limits
    if request.kind in ("image", "picture"):
        frames = open_image(Path(request.path), limits)[None]
        if request.kind == "image":
            frames = _framed(frames, request.framing)
        return Pixels(frames)
    if request.kind == "patches":
        return _read_patches(request)
    # a file that other decoders would show otherwise is read by av, whatever was asked for
    if request.decoder == "av" or not _is_plain(Path(request.path), limits):
        return _read_with_av(request)
    if request.decoder == "decord":
        return _read_with_decord(request)
    return _read_with_torchcodec(request)


def _read_patches(request: PixelRequest) -> Pixels:
    scored = decompose(
        Path(request.path), request.framing, gop=request.gop, config=request.selection
    )
    clip = scored.clip
    selection = choose_patches(
        scored, name=request.path, budget=request.num_patches, config=request.selection
    )
    return Pixels(
        frames=clip.frames,
        total=clip.num_source_frames,
        positions=selection.positions.astype(np.int64),
        times=clip.times.astype(np.int64),
    )


def _read_with_av(request: PixelRequest) -> Pixels:
    video = decode_video(Path(request.path), request.framing, thorough=False)
    total = video.num_source_frames
    numbers = segment_frames(total, request.framing.within)
    # the reader gives each frame once, a short clip has some of them in several segments
    frames = video.frames[np.searchsorted(video.indices, numbers)]
    return Pixels(frames, total=total, numbers=numbers)


def _read_with_decord(request: PixelRequest) -> Pixels:
    import decord

    try:
        reader = decord.VideoReader(
            request.path, ctx=decord.cpu(0), num_threads=request.decoder_threads
        )
        numbers = segment_frames(len(reader), request.framing.within)
        frames = reader.get_batch(list(numbers)).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise _rejected(request, error) from error
    return Pixels(_framed(frames, request.framing), total=len(reader), numbers=numbers)


def _read_with_torchcodec(request: PixelRequest) -> Pixels:
    from torchcodec.decoders import VideoDecoder

    try:
        reader = VideoDecoder(
            request.path, dimension_order="NHWC", num_ffmpeg_threads=request.decoder_threads
        )
        numbers = segment_frames(len(reader), request.framing.within)
        frames = reader.get_frames_at(numbers.tolist()).data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        raise _rejected(request, error) from error
    return Pixels(_framed(frames, request.framing), total=len(reader), numbers=numbers)


def _rejected(request: PixelRequest, error: Exception) -> RejectedInput:
    first_line = str(error).splitlines()[0]
    return RejectedInput("decode", f"{request.path}: {first_line}")


def _is_plain(path: Path, limits: InputLimits) -> bool:
    """Whether frames are shown as they are stored: upright, square pixels, not interlaced. Other
    decoders ignore all three. Raises RejectedInput for a container that is damaged or too large.
    """
    import av

    read_timeline(path, limits)
    container, stream = open_video(path, limits)
    try:
        first = next(container.decode(stream))
        # read before the container is closed, which frees the stream
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1
    except (av.FFmpegError, StopIteration) as error:
        raise RejectedInput("decode", f"{path}: no frame can be decoded: {error}") from error
    finally:
        container.close()
    return first.rotation == 0 and aspect == 1 and not first.interlaced_frame


def _framed(frames: np.ndarray, framing: Framing) -> np.ndarray:
    """The square crop of each frame, uint8 [T, H, W, 3] -> [T, size, size, 3]."""
    crop = crop_of(height=frames.shape[1], width=frames.shape[2], framing=framing)
    return np.stack([crop.scale(frame) for frame in frames])


def recolour(frames: np.ndarray, draw: np.random.Generator, parts: Collection[str]) -> np.ndarray:
    """Other colours for a drawn version of a clip: the published list, each part switchable.

    brightness   brightness and contrast, together
    saturation
    hue
    channels     red and blue exchanged

    uint8 [T, H, W, 3] -> the same shape. One draw holds for all frames. Every part takes its
    numbers from `draw` whether it is switched on or not, so parts do not change each other. There
    is no flip and no moved crop: published training has none. Cost: about a millisecond per frame
    of 224 pixels.
    """
    # of brightness, saturation, hue and channels
    chance = draw.random(4)
    factor = draw.uniform(1 - STRENGTH, 1 + STRENGTH, 3)  # of brightness, contrast and saturation
    turn = draw.uniform(-HUE_TURN, HUE_TURN)
    # All frames one below the other: contrast turns about the mean of the whole clip.
    sheet = Image.fromarray(frames.reshape(-1, frames.shape[2], 3))
    if "brightness" in parts and chance[0] < LIKELY:
        sheet = ImageEnhance.Brightness(sheet).enhance(factor[0])
        sheet = ImageEnhance.Contrast(sheet).enhance(factor[1])
    if "saturation" in parts and chance[1] < LIKELY:
        sheet = ImageEnhance.Color(sheet).enhance(factor[2])
    if "hue" in parts and chance[2] < LIKELY:
        hue, saturation, value = sheet.convert("HSV").split()
        # 8-bit hues are a circle: what leaves it at one end enters at the other
        turned = [int(round(level + 255 * turn)) for level in range(256)]
        hue = hue.point([level % 256 for level in turned])
        sheet = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    pixels = np.asarray(sheet).reshape(frames.shape)
    if "channels" in parts and chance[3] < RARE:
        pixels = pixels[..., ::-1]
    # neither a read-only array nor negative strides, of which torch makes no tensor
    return pixels.copy()


def _prepare(settings: dict) -> Callable[[dict], Answer]:
    """Child: the function that answers requests."""

    def answer(values: dict) -> Answer:
        # JSON has neither dataclasses nor tuples
        framing = values.pop("framing")
        framing["limits"] = InputLimits(**framing["limits"])
        framing["within"] = tuple(framing["within"])
        selection = SelectionConfig.from_dict(values.pop("selection"))
        request = PixelRequest(framing=Framing(**framing), selection=selection, **values)
        pixels = read_pixels(request)
        arrays = {
            name: value for name, value in vars(pixels).items() if isinstance(value, np.ndarray)
        }
        # arrays travel as raw bytes; their types and shapes go into the header
        shapes = [[name, value.dtype.str, value.shape] for name, value in arrays.items()]
        parts = [value.tobytes() for value in arrays.values()]
        return {"total": pixels.total, "arrays": shapes}, parts

    return answer


if __name__ == "__main__":
    serve(_prepare)
