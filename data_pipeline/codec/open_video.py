"""Opening untrusted files: a white list of containers, local files only, limits before decoding.

Playlists, network protocols and container formats outside the list never reach a demuxer (an
ffconcat text named .mp4 would otherwise read other local files). Sizes are checked on headers, so a
decompression bomb is refused before it unpacks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RejectedInput

if TYPE_CHECKING:
    import av
    import numpy as np

# demuxers of libavformat that may be probed, by FFmpeg's names
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
# containers whose duration ends at the last timestamp; that of others is the length of the video
DURATION_FROM_ZERO = ("matroska", "asf", "flv")
VIDEO_SUFFIXES = frozenset(
    ".mp4 .mov .m4v .mkv .webm .avi .ts .mts .m2ts .mpg .mpeg .vob .flv .ogv .wmv .3gp".split()
)
# .heic, .heif and .hif are listed although none is readable: `open_image` then rejects them with a
# remedy, where an unknown suffix would be left out of a folder.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .avif .heic .heif .hif".split()
)
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# Brands in the `ftyp` box (ISO/IEC 23008-12 annex B; AVIF 1.2 section 6). mif1 and msf1 mean only
# "image" and "sequence" and stand in AVIF files too: the AVIF brands decide.
AVIF_BRANDS = frozenset({b"avif", b"avis"})
HEIF_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
)
BRAND_BYTES = 256  # of the file's head: room for some sixty brands, more than any file has


@dataclass(frozen=True)
class InputLimits:
    """Upper limits of one input; a file beyond them is rejected as `too_large`."""

    max_bytes: int = 8 << 30
    max_pixels: int = 7680 * 4320  # one 8K UHD frame
    max_side: int = 16384
    max_seconds: float = 4 * 3600.0
    max_frames: int = 1_000_000

    def forbid(self, width: int, height: int) -> bool:
        """Whether a frame or image of this size is too large."""
        return width * height > self.max_pixels or max(width, height) > self.max_side


def is_video(path: Path) -> bool:
    """Whether the file has the suffix of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def is_image(path: Path) -> bool:
    """Whether the file has the suffix of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def check_file(path: Path, limits: InputLimits) -> None:
    """Reject anything but a regular, non-empty file within the size limit."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RejectedInput("missing", f"{path}: {error.strerror}") from error
    if not path.is_file():
        raise RejectedInput("not_a_file", f"{path} is not a regular file")
    if size == 0:
        raise RejectedInput("empty", f"{path} has no bytes")
    if size > limits.max_bytes:
        raise RejectedInput(
            "too_large", f"{path} has {size} bytes, the limit is {limits.max_bytes}"
        )


def open_video(
    path: Path,
    limits: InputLimits,
    follow_edits: bool = True,
) -> "tuple[av.container.InputContainer, av.VideoStream]":
    """Open a local video file; returns (container, stream), the caller closes the container.

    Without `follow_edits` an edit list is ignored, and timestamps are those of the media. Raises
    RejectedInput with reason container, no_video, decode (no frame size) or too_large.
    """
    check_file(path, limits)
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    if not follow_edits:
        options["ignore_editlist"] = "1"
    container = _open(path, options)
    try:
        if follow_edits and _has_endless_edit(container):
            container.close()
            # then libavformat only moves the timestamps, and what is before zero is left out here
            container = _open(path, options | {"advanced_editlist": "0"})
        return container, _checked_stream(path, container=container, limits=limits)
    except RejectedInput:
        container.close()
        raise


def _open(path: Path, options: dict[str, str]) -> "av.container.InputContainer":
    import av

    try:
        # `file:` and an absolute path: a name such as `concat:a|b` is never taken for a protocol
        return av.open(f"file:{path.resolve()}", options=options)
    except av.FFmpegError as error:
        raise RejectedInput("container", f"{path} does not open: {error.strerror}") from error


def _has_endless_edit(container: "av.container.InputContainer") -> bool:
    """Whether the edit list of an MP4 or MOV has one segment of duration 0, which stands for all
    that follows: fragmented files have it, and what is written from them keeps it. libavformat
    understands it in fragments, and elsewhere shows nothing.
    """
    stream = _best_stream(container)
    return (
        "mp4" in container.format.name
        and stream is not None
        and stream.frames > 0  # none are counted in a fragmented file
        and stream.duration == 0
    )


def _checked_stream(
    path: Path,
    container: "av.container.InputContainer",
    limits: InputLimits,
) -> "av.VideoStream":
    """The best video stream of a container, if its header keeps to the limits."""
    stream = _best_stream(container)
    if stream is None:
        raise RejectedInput("no_video", f"{path} has no video stream that can be decoded")
    width = stream.codec_context.width
    height = stream.codec_context.height
    seconds = announced_seconds(container)
    if width <= 0 or height <= 0:
        raise RejectedInput("decode", f"{path}: its video stream has no picture size")
    if limits.forbid(width, height) or seconds > limits.max_seconds:
        raise RejectedInput(
            "too_large",
            f"{path} is {width}x{height}, {seconds:.0f} s; the limits are "
            f"{limits.max_pixels} pixels, {limits.max_side} a side and {limits.max_seconds:.0f} s",
        )
    return stream


def announced_seconds(container: "av.container.InputContainer") -> float:
    """Duration that a container announces, from its first frame on; 0 where it has none."""
    import av

    announced = (container.duration or 0) / av.time_base
    start = (container.start_time or 0) / av.time_base
    from_zero = any(name in container.format.name for name in DURATION_FROM_ZERO)
    return announced - start if from_zero and 0 < start < announced else announced


def _best_stream(container: "av.container.InputContainer") -> "av.VideoStream | None":
    """The stream with the largest frames, FFmpeg's choice among equals; neither the cover image of
    a song nor a stream in a codec that this FFmpeg does not know."""
    from av.stream import Disposition

    default = container.streams.best("video")
    best = None
    best_rank = (-1, False)
    for stream in container.streams.video:
        context = stream.codec_context
        if context is None or stream.disposition & Disposition.attached_pic:
            continue
        rank = (context.width * context.height, stream is default)
        if rank > best_rank:
            best = stream
            best_rank = rank
    return best


def open_image(path: Path, limits: InputLimits) -> "np.ndarray":
    """Read one image as uint8 RGB [H, W, 3]: EXIF rotation applied, alpha laid on white, the first
    frame of an animation.

    Raises RejectedInput with reason image or too_large.
    """
    import numpy as np
    from PIL import Image, ImageOps

    check_file(path, limits)
    try:
        _refuse_unreadable_kind(path)
        Image.init()
        # AVIF came with Pillow 11.3, and Image.open raises for a format that it does not know
        formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
        with Image.open(path, formats=formats) as opened:
            if limits.forbid(opened.width, opened.height):
                raise RejectedInput("too_large", f"{path} is {opened.width}x{opened.height} pixels")
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip instead of scaling
                wide = np.asarray(image, dtype=np.uint32)
                grey = ((wide + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded
                return np.repeat(grey[..., None], 3, axis=2)
            if image.mode in ("I", "F"):  # no agreed range: Pillow would clip
                raise RejectedInput(
                    "image", f"{path} has {image.mode} pixels (32 bit): convert it to 8 or 16 bit"
                )
            if "A" in image.mode or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return np.asarray(image.convert("RGB"))
    except RejectedInput:
        raise
    except Image.DecompressionBombError as error:
        raise RejectedInput("too_large", f"{path}: {error}") from error
    # libavif raises RuntimeError for damage; Pillow's UnidentifiedImageError is an OSError
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:
        raise RejectedInput("image", f"{path} is not a readable picture: {error}") from error


def _refuse_unreadable_kind(path: Path) -> None:
    """Reject HEIC, whatever the file is called, and AVIF where Pillow has no decoder for it.

    Both begin with an `ftyp` box: its size, its type, the major brand, a minor version, then the
    compatible brands, four bytes each.
    """
    from PIL import features

    with open(path, "rb") as stream:
        head = stream.read(BRAND_BYTES)
    if head[4:8] != b"ftyp":
        return
    end = min(int.from_bytes(head[:4], "big"), len(head))
    starts = (8, *range(16, end - 3, 4))  # bytes 12 to 15 are the minor version
    brands = {head[start : start + 4] for start in starts}
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
