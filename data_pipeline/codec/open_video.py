"""Opening files from strangers: a container white list, local files only,
limits before any decoding.

Playlists, network protocols and container formats outside the list never reach a demuxer (an
ffconcat text named .mp4 would otherwise read other local files). Sizes are checked on headers, so a
bomb is refused before it unpacks.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import RejectedInput

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
# containers whose duration ends at the last stamp; that of others is the length of what they show
DURATION_FROM_ZERO = ("matroska", "asf", "flv")
VIDEO_SUFFIXES = frozenset(
    ".mp4 .mov .m4v .mkv .webm .avi .ts .mts .m2ts .mpg .mpeg .vob .flv .ogv .wmv .3gp".split()
)
# .heic, .heif and .hif are refused when opened: by name, so that nobody misses them unawares.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .avif .heic .heif .hif".split()
)
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# Brands in the `ftyp` box (ISO/IEC 23008-12 annex B; AVIF 1.2 section 6). mif1 and msf1 say only
# "picture" and "sequence", which AVIF files say too: the AVIF brands decide.
AVIF_BRANDS = frozenset({b"avif", b"avis"})
HEIF_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
)


@dataclass(frozen=True)
class InputLimits:
    """What an input may be at most; beyond it the file is rejected as `too_large`."""

    max_bytes: int = 8 << 30
    max_pixels: int = 7680 * 4320
    max_side: int = 16384
    max_seconds: float = 4 * 3600.0
    max_frames: int = 1_000_000

    def forbid(self, width: int, height: int) -> bool:
        """Whether a picture of this size is too large."""
        return width * height > self.max_pixels or max(width, height) > self.max_side


def is_video(path: Path) -> bool:
    """Whether the file's name says video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def is_image(path: Path) -> bool:
    """Whether the file's name says image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def check_file(path: Path, limits: InputLimits) -> None:
    """Reject what is no regular, non-empty file of bearable size."""
    try:
        status = path.stat()
    except OSError as error:
        raise RejectedInput("missing", f"{path}: {error.strerror}") from error
    if not path.is_file():
        raise RejectedInput("not_a_file", f"{path} is not a regular file")
    if status.st_size == 0:
        raise RejectedInput("empty", f"{path} has no bytes")
    if status.st_size > limits.max_bytes:
        raise RejectedInput(
            "too_large", f"{path} has {status.st_size} bytes, the limit is {limits.max_bytes}"
        )


def open_video(path: Path, limits: InputLimits, follow_edits: bool = True):
    """Open a local video file; returns (container, stream), the caller closes the container.
    Without `follow_edits` an edit list is ignored, and stamps are those of the media.

    Raises RejectedInput with reason container, no_video or too_large.
    """
    import av

    check_file(path, limits)
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    if not follow_edits:
        options["ignore_editlist"] = "1"
    try:
        container = av.open(f"file:{path.resolve()}", options=options)
    except av.FFmpegError as error:
        raise RejectedInput("container", f"{path} does not open: {error.strerror}") from error
    stream = _best_stream(container)
    if stream is None:
        container.close()
        raise RejectedInput("no_video", f"{path} has no video stream that can be decoded")
    context = stream.codec_context
    seconds = announced_seconds(container)
    if context.width <= 0 or context.height <= 0:
        container.close()
        raise RejectedInput("decode", f"{path}: its video stream has no picture size")
    if limits.forbid(context.width, context.height) or seconds > limits.max_seconds:
        container.close()
        raise RejectedInput(
            "too_large",
            f"{path} is {context.width}x{context.height}, {seconds:.0f} s; the limits are "
            f"{limits.max_pixels} pixels, {limits.max_side} a side and {limits.max_seconds:.0f} s",
        )
    return container, stream


def announced_seconds(container) -> float:
    """Duration that a container announces, from its first picture on; 0 where it has none."""
    import av

    announced = (container.duration or 0) / av.time_base
    start = (container.start_time or 0) / av.time_base
    from_zero = any(name in container.format.name for name in DURATION_FROM_ZERO)
    return announced - start if from_zero and 0 < start < announced else announced


def _best_stream(container):
    """The stream of the largest picture, FFmpeg's choice among equals; a song's cover is none, nor
    is a stream in a codec that this FFmpeg does not know."""
    from av.stream import Disposition

    streams = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    chosen = container.streams.best("video")
    areas = [(s.codec_context.width * s.codec_context.height, s is chosen) for s in streams]
    return streams[areas.index(max(areas))] if streams else None


def open_image(path: Path, limits: InputLimits) -> np.ndarray:
    """Read one picture as uint8 RGB [H, W, 3]: EXIF rotation applied, alpha laid on white,
    first frame of animations.

    Raises RejectedInput with reason image or too_large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    check_file(path, limits)
    try:
        _refuse_unreadable_kind(path)
        with Image.open(path, formats=_readable_formats()) as picture:
            if limits.forbid(picture.width, picture.height):
                raise RejectedInput(
                    "too_large", f"{path} is {picture.width}x{picture.height} pixels"
                )
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):  # 16-bit gray: Pillow would clip instead of scaling
                wide = np.asarray(picture, dtype=np.uint32)
                return np.repeat(((wide + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
            if picture.mode in ("I", "F"):  # no agreed range: Pillow would clip
                raise RejectedInput(
                    "image", f"{path} has {picture.mode} pixels (32 bit): convert it to 8 or 16 bit"
                )
            if "A" in picture.mode or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                paper = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(paper, picture)
            return np.asarray(picture.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise RejectedInput("too_large", f"{path}: {error}") from error
    except (
        UnidentifiedImageError,
        OSError,
        RuntimeError,  # libavif's word for damage
        SyntaxError,
        ValueError,
    ) as error:
        if isinstance(error, RejectedInput):
            raise
        raise RejectedInput("image", f"{path} is not a readable picture: {error}") from error


def _readable_formats() -> list[str]:
    """IMAGE_FORMATS as far as the installed Pillow knows them: AVIF came with release 11.3."""
    from PIL import Image

    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _refuse_unreadable_kind(path: Path) -> None:
    """Reject HEIC, whatever the file is called, and AVIF where Pillow has no decoder for it."""
    from PIL import features

    brands = _container_brands(path)
    if brands & AVIF_BRANDS:
        if not features.check("avif"):
            raise RejectedInput(
                "image",
                f"{path} is AVIF, which this Pillow does not read: "
                "pip install 'pillow>=11.3', or convert it to PNG",
            )
    elif brands & HEIF_BRANDS:
        raise RejectedInput(
            "image",
            f"{path} is HEIC (HEIF), which is not read here: convert it to JPEG or PNG first, "
            "e.g. with heif-convert",
        )


def _container_brands(path: Path) -> set[bytes]:
    """Major and compatible brands of a file that begins with an `ftyp` box; none of any other."""
    with open(path, "rb") as stream:
        head = stream.read(256)  # some twenty brands are more than any file has
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    starts = [8, *range(16, end - 3, 4)]  # at 12 stands the minor version
    return {head[start : start + 4] for start in starts}
