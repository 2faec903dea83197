"""A picture is judged by its header before a decoder allocates what it claims."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import CorruptShard
from data_pipeline.shards.jpeg import MAX_PIXELS, check_jpeg, read_jpeg_header
from data_pipeline.shards.schema import check_positions, decode_jpeg

SIZE = (24, 40)  # rows, columns: not a square, so that exchanged axes show


def jpeg(mode: str = "RGB", size: tuple[int, int] = SIZE, **options) -> bytes:
    rows, columns = size
    picture = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def patched(data: bytes, offset: int, value: bytes) -> bytes:
    """Other bytes in the frame header, counted from its marker."""
    place = data.index(b"\xff\xc0") + offset
    return data[:place] + value + data[place + len(value) :]


def with_thumbnail() -> bytes:
    """A picture whose EXIF data holds another JPEG, of another size."""
    inner = b"Exif\0\0" + jpeg(size=(8, 8))
    segment = b"\xff\xe1" + (len(inner) + 2).to_bytes(2, "big") + inner
    data = jpeg()
    return data[:2] + segment + data[2:]


def many_scans() -> bytes:
    data = jpeg(progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 100 + data[-2:]


@pytest.mark.parametrize(
    ("data", "components"),
    [
        (jpeg(), 3),
        (jpeg("L"), 1),
        (jpeg(progressive=True), 3),
        (jpeg(subsampling="4:2:0", optimize=True, comment=b"\xff\xd8\xff\xc0"), 3),
        (with_thumbnail(), 3),
    ],
    ids=["plain", "grey", "progressive", "other tables", "thumbnail"],
)
def test_the_header_is_that_of_the_picture_which_decoders_decode(data, components):
    header = read_jpeg_header(data, "x")
    assert ((header.height, header.width), header.components) == (SIZE, components)
    assert decode_jpeg(data, SIZE, "x").shape == (*SIZE, 3)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (jpeg("CMYK"), "4 components of 8 bits"),
        (patched(jpeg(), 4, b"\x0c"), "3 components of 12 bits"),
        (patched(jpeg(), 1, b"\xc9"), "frame of kind 0xc9"),
        (patched(jpeg(), 1, b"\xc3"), "frame of kind 0xc3"),
        (patched(jpeg(), 9, b"\x02"), "broken frame header"),
        (jpeg()[:2] + jpeg(), "segment of kind 0xd8|begins no segment"),
        (jpeg()[:2] + jpeg()[jpeg().index(b"\xff\xc0") :][:19] + jpeg()[2:], "two frame headers"),
        (jpeg()[:2] + jpeg()[jpeg().index(b"\xff\xda") :], "without a frame header"),
        (jpeg()[:2] + b"\0" + jpeg()[2:], "begins no segment"),
        (many_scans(), "more than 64 scans"),
        (b"\x89PNG", "is no JPEG"),
        (b"", "is no JPEG"),
    ],
    ids=[
        "CMYK",
        "12 bits",
        "arithmetic",
        "lossless",
        "components",
        "two starts",
        "two headers",
        "no header",
        "gap",
        "scans",
        "PNG",
        "empty",
    ],
)
def test_what_the_packer_never_writes_is_refused(data, said):
    with pytest.raises(CorruptShard, match=said):
        check_jpeg(data, SIZE, "x")


def test_any_cut_and_any_changed_byte_of_a_header_ends_in_a_header_or_a_name():
    data = jpeg()
    scan = data.index(b"\xff\xda")
    for length in range(scan + 2):
        with pytest.raises(CorruptShard, match="x is"):
            read_jpeg_header(data[:length], "x")
    rng = np.random.default_rng(0)
    for place in range(scan):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        try:
            assert read_jpeg_header(bytes(damaged), "x").components in (1, 3)
        except CorruptShard as error:
            assert str(error).startswith("x is")


def test_a_picture_of_another_size_or_too_large_a_one_is_refused():
    check_jpeg(jpeg(), SIZE, "x")
    with pytest.raises(CorruptShard, match="picture of 24x40, its metadata says 40x24"):
        check_jpeg(jpeg(), SIZE[::-1], "x")
    side = 65500
    huge = patched(jpeg(), 5, side.to_bytes(2, "big") * 2)
    with pytest.raises(CorruptShard, match=f"65500x65500, more than {MAX_PIXELS} pixels"):
        check_jpeg(huge, (side, side), "x")


def test_places_of_patches_are_different_ones_inside_of_the_clip():
    grid = (3, 5)
    good = np.array([(0, 2, 4), (63, 2, 4), (63, 0, 0)], np.uint16)
    check_positions(good, 3, grid, "x")
    for place, said in (
        ((0, 3, 0), r"\(0, 3, 0\), the sample has \(64, 3, 5\)"),
        ((0, 0, 5), r"\(0, 0, 5\)"),
        ((64, 0, 0), r"\(64, 0, 0\)"),
        ((65535, 0, 0), "65535"),
        ((0, 2, 4), "two patches stand at one place"),
    ):
        with pytest.raises(CorruptShard, match=f"x: .*{said}"):
            check_positions(np.vstack([good[:2], [place]]).astype(np.uint16), 3, grid, "x")
    with pytest.raises(CorruptShard, match=r"x: positions \(3, 3\) for 4 patches"):
        check_positions(good, 4, grid, "x")
