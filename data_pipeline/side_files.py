"""Files that commands write beside shards: arrays, JSON records that bind them, drawn images.

Each is written whole or not at all. Every error of reading names the file; those of read_array and
read_record end with the remedy.

NumPy evaluates the header of a .npy file as Python, which is not safe in threads (CPython 3.11
counts the depth of syntax trees for all threads together), and trusts whatever size it states.
Here a header has the form that np.save gives it, its dtype is the expected one, and its bytes are
all there. read_foreign_array alone leaves a header to NumPy: a user's file may have any form.
"""

import hashlib
import io
import math
import os
import re
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model_factory.files import (
    DamagedFile,
    naming,
    parse_json,
    parse_sealed_json,
    write_atomically,
)

from .errors import CorruptShard, DataPipelineError

if TYPE_CHECKING:
    from PIL import Image

Fields = Mapping[str, type | tuple[type, ...]]
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".gif": "GIF", ".webp": "WEBP"}
NPY_MAGIC = b"\x93NUMPY\x01\x00"  # with version 1.0, which np.save writes for plain arrays
# 18 digits fit an int64, and Python refuses to read thousands of them
NPY_SHAPE = rb"(?:\d{1,18}(?:, \d{1,18})*,?)?"
NPY_HEADER = re.compile(
    rb"\{'descr': '([^']{1,8})', 'fortran_order': (True|False), "
    rb"'shape': \((" + NPY_SHAPE + rb")\), \} *\n"
)
ZIP_MAGIC = b"PK"  # of an .npz file, which is a zip archive
# What np.load raises for headers that are no header: of the tokenizer that it calls for those of
# Python 2, of sizes beyond an int64, and of sizes that no memory holds.
FOREIGN_ERRORS = (
    ValueError,
    EOFError,
    OverflowError,
    MemoryError,
    RecursionError,
    TypeError,
    tokenize.TokenError,
)


def array_bytes(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, atomically."""
    write_atomically(path, array_bytes(array))


def parse_array(data: bytes | bytearray, dtype: type, name: str) -> np.ndarray:
    """The array of a .npy file's bytes, which it shares; CorruptShard for another dtype, and for
    bytes that are no array of the stated size. `name` is what messages call it."""
    # 6 bytes of magic, 2 of the version, 2 that hold the length of the header, the header, the data
    length = int.from_bytes(data[8:10], "little")
    header = None
    if data.startswith(NPY_MAGIC):
        header = NPY_HEADER.fullmatch(data[10 : 10 + length])
    if header is None:
        raise CorruptShard(f"{name} is no .npy array of version 1.0")
    descr, order, sizes = header.groups()
    shape = tuple(int(size) for size in sizes.split(b",") if size)
    wanted = np.dtype(dtype)
    if descr != wanted.str.encode():
        found = descr.decode(errors="backslashreplace")
        raise CorruptShard(f"{name} holds {found} {shape}, expected {wanted}")
    # before anything of the stated size is made
    num_bytes = math.prod(shape) * wanted.itemsize
    if len(data) != 10 + length + num_bytes:
        raise CorruptShard(f"{name} has not the bytes of a {wanted.str} {shape}")
    flat = np.frombuffer(data, wanted, offset=10 + length)
    try:
        return flat.reshape(shape, order="F" if order == b"True" else "C")
    except ValueError as error:  # more dimensions than NumPy has, or sizes beside a 0 that overflow
        raise CorruptShard(f"{name} is no array: {error}") from error


def check_array(array: np.ndarray, shape: tuple[int | None, ...], name: str) -> None:
    """CorruptShard for another shape (None: any size above 0) and for numbers that are not
    finite."""
    fits = len(array.shape) == len(shape) and all(
        size == wanted or (wanted is None and size > 0)
        for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise CorruptShard(f"{name} has shape {list(array.shape)}, expected [{sizes}]")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CorruptShard(f"{name} holds numbers that are not finite")


def read_array(
    path: Path, sha256: str, dtype: type, shape: tuple[int | None, ...], again: str
) -> np.ndarray:
    """The array of a .npy file of ours, bound by the sha256 in the record beside it.

    Hash and array come from one reading, so that nothing can change in between. CorruptShard names
    a file that is absent, changed, or holds something else, and ends with the remedy `again`.
    """
    try:
        with naming(path), open(path, "rb") as stream:
            # a bytearray: an array that shares it can be written to
            data = bytearray(os.fstat(stream.fileno()).st_size)
            stream.readinto(data)
    except FileNotFoundError:
        raise CorruptShard(f"{path} is missing: {again}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptShard(
            f"{path} changed since it was written: it is not the file that its record binds; "
            f"{again}"
        )
    try:
        array = parse_array(data, dtype=dtype, name=str(path))
        check_array(array, shape=shape, name=str(path))
    except CorruptShard as error:
        raise CorruptShard(f"{error}: {again}") from None
    return array


def read_foreign_array(path: Path) -> np.ndarray:
    """The array of a .npy file that a user wrote, of any dtype and shape; DataPipelineError names
    a file that holds anything else."""
    with open(path, "rb") as stream:
        is_archive = stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if is_archive:
        raise DataPipelineError(f"{path} holds several arrays (npz): save one of them as .npy")
    try:
        return np.load(path, allow_pickle=False)
    except FOREIGN_ERRORS as error:
        raise DataPipelineError(f"{path} is no array of numbers: {error}") from error


def read_record(path: Path, fields: Fields, again: str) -> dict:
    """The object that files.write_json wrote, with `fields` of these types.

    FileNotFoundError where there is none; CorruptShard names a damaged one and ends with the remedy
    `again`.
    """
    data = path.read_bytes()
    try:
        return parse_sealed_json(data, name=str(path), fields=fields)
    except DamagedFile as error:
        raise CorruptShard(f"{error}: {again}") from error


def parse_record(data: bytes, name: str, max_bytes: int) -> dict:
    """A JSON object without a digest of its own, whose bytes something else binds, such as the crc
    of a shard's member. CorruptShard names what is hostile or damaged."""
    try:
        return parse_json(data, name=name, max_bytes=max_bytes)
    except DamagedFile as error:
        raise CorruptShard(str(error)) from error


def write_picture(path: Path, image: "Image.Image", **options: Any) -> None:
    """Write a Pillow image in the format that its suffix names, with Pillow's options of saving."""
    # into memory first: the file is then written whole or not at all
    stream = io.BytesIO()
    image.save(stream, IMAGE_FORMATS[path.suffix.lower()], **options)
    write_atomically(path, stream.getvalue())
