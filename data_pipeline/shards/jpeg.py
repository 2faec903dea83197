"""The header of a JPEG member, read before any decoder sees the bytes.

A decoder allocates what the header states: 2 MB of file may claim 65500 x 65500 pixels. Members
are written by the packer, so whatever is not the plain file that it writes is damaged or hostile.
The parser is strict, because decoders disagree about what is not: no bytes between segments, one
frame header, and it stands before the first scan. Cost: 10 us an image.

Source: ITU-T T.81, annex B.
"""

from dataclasses import dataclass

from ..errors import CorruptShard

SOI = b"\xff\xd8"  # start of image
SOS = 0xDA  # start of scan: entropy-coded data follows
# frame headers of the kinds that decoders share
BASELINE = 0xC0
EXTENDED = 0xC1
PROGRESSIVE = 0xC2
# the other frame headers: lossless, hierarchical, arithmetic coding
OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
# tables, restart interval, comment, application data: what may stand around the frame header
PLAIN_SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
# The largest strip that the packer writes has 65500 rows, the most of a JPEG, of 4088 px: 0.8 GB as
# RGB. A strip of 16 frames of 224 px has a 300th of it.
MAX_PIXELS = 1 << 28
# Scans of a progressive file: libjpeg writes 10. Each is a pass over the image, and takes a few
# bytes of file, so that without a limit a small file takes minutes.
MAX_SCANS = 64


@dataclass(frozen=True)
class JpegHeader:
    """Pixel rows and columns, and colour components (1: grey, 3: YCbCr or RGB)."""

    height: int
    width: int
    components: int


def read_jpeg_header(data: bytes, name: str) -> JpegHeader:
    """The header of an 8-bit baseline or progressive JPEG; CorruptShard names anything else."""
    if data[:2] != SOI:
        raise CorruptShard(f"{name} is no JPEG")
    header = None
    is_progressive = False
    start = 2
    while True:
        # a segment: 0xff, its kind, then its length, which counts its own two bytes
        head = data[start : start + 4]
        end = start + 2 + int.from_bytes(head[2:], "big")
        is_inside = start + 4 <= end <= len(data)
        if len(head) < 4 or head[0] != 0xFF or not is_inside:
            raise CorruptShard(f"{name} is no whole JPEG: byte {start} begins no segment")
        kind = head[1]
        if kind == SOS:
            break
        if kind in (BASELINE, EXTENDED, PROGRESSIVE):
            if header is not None:
                raise CorruptShard(f"{name} is a JPEG with two frame headers")
            header = _frame_header(data[start + 4 : end], name)
            is_progressive = kind == PROGRESSIVE
        elif kind not in PLAIN_SEGMENTS:
            what = "frame" if kind in OTHER_FRAMES else "segment"
            raise CorruptShard(f"{name} is a JPEG with a {what} of kind {kind:#x}")
        start = end
    if header is None:
        raise CorruptShard(f"{name} is a JPEG without a frame header")
    # in entropy-coded data 0xff is followed by 0 or a restart mark
    if is_progressive and data.count(b"\xff\xda", start) > MAX_SCANS:
        raise CorruptShard(f"{name} is a JPEG of more than {MAX_SCANS} scans")
    return header


def check_jpeg(data: bytes, size: tuple[int, int], name: str) -> JpegHeader:
    """The header; CorruptShard unless the image has `size` (rows, columns) by it, and no more
    pixels than the limit."""
    header = read_jpeg_header(data, name)
    stated = f"{name} is a picture of {header.height}x{header.width}"
    if (header.height, header.width) != size:
        raise CorruptShard(f"{stated}, its metadata says {size[0]}x{size[1]}")
    if header.height * header.width > MAX_PIXELS:
        raise CorruptShard(f"{stated}, more than {MAX_PIXELS} pixels")
    return header


def _frame_header(body: bytes, name: str) -> JpegHeader:
    """Precision, rows, columns, components, and three bytes for each of them."""
    # in this order: byte 5, the number of components, may be missing
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise CorruptShard(f"{name} is a JPEG with a broken frame header")
    precision = body[0]
    components = body[5]
    if precision != 8 or components not in (1, 3):
        raise CorruptShard(
            f"{name} is a JPEG of {components} components of {precision} bits, expected 1 or 3 of 8"
        )
    return JpegHeader(
        height=int.from_bytes(body[1:3], "big"),
        width=int.from_bytes(body[3:5], "big"),
        components=components,
    )
