"""JSON files of ours that describe and bind others; every error names the file and the way on."""

from collections.abc import Mapping
from pathlib import Path

from model_factory.files import DamagedFile, parse_json, parse_sealed_json

from .errors import CorruptShard

Fields = Mapping[str, type | tuple[type, ...]]


def read_record(path: Path, fields: Fields, again: str) -> dict:
    """The object that files.write_json wrote, with `fields` of these types.

    FileNotFoundError where there is none; CorruptShard names a damaged one and says what to do:
    `again`.
    """
    return parse_sealed_record(path.read_bytes(), name=str(path), fields=fields, again=again)


def parse_sealed_record(data: bytes, name: str, fields: Fields, again: str) -> dict:
    """The same of bytes that were read already."""
    try:
        return parse_sealed_json(data, name=name, fields=fields)
    except DamagedFile as error:
        raise CorruptShard(f"{error}: {again}") from error


def parse_record(data: bytes, name: str, max_bytes: int) -> dict:
    """A JSON object without a digest of its own, whose bytes something else binds, such as the crc
    of a shard's member. CorruptShard names what is hostile or damaged."""
    try:
        return parse_json(data, name=name, max_bytes=max_bytes)
    except DamagedFile as error:
        raise CorruptShard(str(error)) from error
