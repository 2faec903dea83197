"""Folders and files that run code if anything of them is executed; it leaves a mark."""

import json
import os
from pathlib import Path

import torch

CODE = """import pathlib
pathlib.Path({mark!r}).touch()
from transformers import *
class Config(PretrainedConfig): model_type = "hostile"
class Model(PreTrainedModel): config_class = Config
class Tokenizer(PreTrainedTokenizer): pass
class Processor(CLIPImageProcessor): pass
"""
CLASSES = {
    "AutoConfig": "hostile.Config",
    "AutoModel": "hostile.Model",
    "AutoModelForCausalLM": "hostile.Model",
    "AutoTokenizer": [None, "hostile.Tokenizer"],
    "AutoImageProcessor": "hostile.Processor",
    "AutoProcessor": "hostile.Processor",
}


class _Pickled:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def write_pickle(path: Path, mark: Path, weights: dict) -> None:
    """Weights, and beside them what makes the mark when it is unpickled."""
    torch.save({**weights, "more": _Pickled(mark)}, path)


def add_code(folder: Path, described: str, mark: Path) -> None:
    """hostile.py, and its classes as the auto_map of a description."""
    (folder / "hostile.py").write_text(CODE.format(mark=str(mark)))
    change_json(folder / described, auto_map=CLASSES)


def change_json(path: Path, **fields) -> None:
    """Set fields of a JSON file."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **fields}))


def flip(path: Path, bit: int) -> bytes:
    """Turn one bit of a file over; returns what it was."""
    written = path.read_bytes()
    flipped = bytearray(written)
    flipped[bit // 8 % len(written)] ^= 1 << bit % 8
    path.write_bytes(flipped)
    return written
