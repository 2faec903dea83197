"""What a JPEG member's header says, read before any decoder sees the bytes.

A decoder allocates what the header states: 2 MB of file may claim 65500 x 65500 pixels. Members
are written by the packer, so whatever is not the plain file that it writes is damaged or hostile.
The walk is strict, because decoders disagree about what is not: no bytes between segments, one
frame header, and it stands before the first scan. Cost: 10 us a picture.

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
# Scans of a progressive file: libjpeg writes 10. Each is a pass over the picture, and takes a few
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
    place = 2
    while True:
        marker, length = _segment(data, place, name)
        if marker == SOS:
            break
        if marker in (BASELINE, EXTENDED, PROGRESSIVE):
            if header is not None:
                raise CorruptShard(f"{name} is a JPEG with two frame headers")
            header = _frame_header(data[place + 4 : place + 2 + length], name)
            is_progressive = marker == PROGRESSIVE
        elif marker not in PLAIN_SEGMENTS:
            kind = "frame" if marker in OTHER_FRAMES else "segment"
            raise CorruptShard(f"{name} is a JPEG with a {kind} of kind {marker:#x}")
        place += 2 + length
    if header is None:
        raise CorruptShard(f"{name} is a JPEG without a frame header")
    # in entropy-coded data 0xff is followed by 0 or a restart mark
    if is_progressive and data.count(b"\xff\xda", place) > MAX_SCANS:
        raise CorruptShard(f"{name} is a JPEG of more than {MAX_SCANS} scans")
    return header


def check_jpeg(data: bytes, size: tuple[int, int], name: str) -> None:
    """CorruptShard unless a picture has `size` (rows, columns) by its header, and bearably many
    pixels."""
    header = read_jpeg_header(data, name)
    if (header.height, header.width) != size:
        raise CorruptShard(
            f"{name} is a picture of {header.height}x{header.width}, its metadata says "
            f"{size[0]}x{size[1]}"
        )
    if header.height * header.width > MAX_PIXELS:
        raise CorruptShard(
            f"{name} is a picture of {header.height}x{header.width}, more than {MAX_PIXELS} pixels"
        )


def _segment(data: bytes, place: int, name: str) -> tuple[int, int]:
    """(marker, length of what follows it) of the segment at a place."""
    head = data[place : place + 4]
    length = int.from_bytes(head[2:], "big")
    if len(head) < 4 or head[0] != 0xFF or length < 2 or place + 2 + length > len(data):
        raise CorruptShard(f"{name} is no whole JPEG: byte {place} begins no segment")
    return head[1], length


def _frame_header(body: bytes, name: str) -> JpegHeader:
    """Precision, rows, columns, components, and three bytes for each of them."""
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise CorruptShard(f"{name} is a JPEG with a broken frame header")
    precision = body[0]
    components = body[5]
    if precision != 8 or components not in (1, 3):
        raise CorruptShard(
            f"{name} is a JPEG of {components} components of {precision} bits, expected 1 or 3 of 8"
        )
    height = int.from_bytes(body[1:3], "big")
    width = int.from_bytes(body[3:5], "big")
    return JpegHeader(height, width, components)
