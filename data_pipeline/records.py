"""JSON files of ours that describe and bind others; every error names the file."""

import json
from pathlib import Path

from .errors import CorruptShard


def read_record(path: Path, *keys: str) -> dict:
    """The object in a JSON file, which must have `keys`; CorruptShard names the file when it is
    damaged. FileNotFoundError where there is none."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptShard(f"{path} is damaged ({error}): remove it and make it again") from error
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing or not isinstance(record, dict):
        raise CorruptShard(f"{path} lacks {', '.join(missing)}: remove it and make it again")
    return record
