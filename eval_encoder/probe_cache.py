"""Features kept between epochs and between probes, fp16.

    memory   up to a number of bytes per process and list, for looks that come again
    folder   by option, for every look: FOLDER/KEY/ab/DIGEST.npy and FOLDER/KEY/key.json

KEY hashes what makes features: the encoder's weights, the input settings, tokens or pooled. DIGEST
hashes the clip (its place, size and time of change, or its place in a packed set) and the look. So
another encoder, sampling or file is never answered by old features, while other lists, heads and
seeds of heads share them. Files are written beside and renamed, so several processes may fill one
folder; a file that cannot be read is made again. Cost: a file of tokens * width * 2 bytes per look.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

from model_factory.files import write_atomically

from .probe_video import Look


class FeatureCache:
    """Features [L, C] fp16 by look."""

    def __init__(self, folder: Path | None, key: dict, memory_bytes: int, identity):
        """key: what all features have in common; identity(look) -> text that changes with what is
        seen."""
        text = json.dumps(key, sort_keys=True, default=str)
        self._folder, self._identity = None, identity
        self._memory: dict[Look, torch.Tensor] = {}
        self._room = memory_bytes
        if folder is not None:
            self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / "key.json").is_file():
                write_atomically(self._folder / "key.json", text.encode())

    def get(self, look: Look, comes_again: bool) -> torch.Tensor | None:
        """Stored features, or None."""
        if look in self._memory:
            return self._memory[look]
        path = self._path(look)
        if path is None or not path.is_file():
            return None
        try:
            features = torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, EOFError):  # not ours, or cut by a full disk: made again
            return None
        if comes_again:
            self._keep(look, features)
        return features

    def put(self, look: Look, features: torch.Tensor, comes_again: bool) -> None:
        """Keep features: in the folder always, in memory if they come again and there is room."""
        if comes_again:
            self._keep(look, features)
        path = self._path(look)
        if path is not None:
            path.parent.mkdir(exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}.tmp")
            with open(beside, "wb") as stream:
                np.save(stream, features.numpy(), allow_pickle=False)
            os.replace(beside, path)

    def has(self, look: Look) -> bool:
        """Whether `get` has an answer, without reading it."""
        path = self._path(look)
        return look in self._memory or (path is not None and path.is_file())

    def _keep(self, look: Look, features: torch.Tensor) -> None:
        size = features.numel() * features.element_size()
        if size <= self._room:
            self._memory[look] = features
            self._room -= size

    def _path(self, look: Look) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(self._identity(look).encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest[2:34]}.npy"


def weights_sha256(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """Hash of a text and of named tensors, bit for bit."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_identity(path: Path) -> str:
    """Place, size and time of change of a file."""
    try:
        stat = os.stat(path)
    except OSError:
        return f"{path.resolve()} absent"
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
