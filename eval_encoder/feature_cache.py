"""Features kept between epochs and between probes, fp16.

    memory   up to a number of bytes per process and list, for looks that come again
    folder   by option, for every look: FOLDER/KEY/ab/DIGEST.npy and FOLDER/KEY/key.json

KEY hashes what makes features: the encoder's weights, the input settings, tokens or pooled. DIGEST
hashes the clip (its place, size and time of change, or its place in a packed set) and the look. So
another encoder, sampling or file is never answered by old features, while other lists, heads and
seeds of heads share them. Files are written beside and renamed, so several processes may fill one
folder. Cost: a file of tokens * width * 2 bytes per look.

An entry ends with the sha256 of its name and its bytes, which NumPy's own reader passes over. One
that differs, or cannot be read, is named in the log and made again; one that cannot be written is
named too, and its features are computed whenever they are needed. Neither ends a run.
"""

import hashlib
import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch

from model_factory.files import write_atomically

from .probe.clips import Look

LOG = logging.getLogger("univit")
ENTRY_FORMAT = 2  # goes up whenever the bytes of an entry change; 1 had no digest
HEADER_BYTES = 1024  # NumPy writes 128 for arrays of numbers
DIGEST_BYTES = hashlib.sha256().digest_size


class FeatureCache:
    """Features [L, C] fp16 by look."""

    def __init__(self, folder: Path | None, key: dict, memory_bytes: int, identity):
        """key: what all features have in common; identity(look) -> text that changes with what is
        seen."""
        text = json.dumps({**key, "entry": ENTRY_FORMAT}, sort_keys=True, default=str)
        self._folder, self._identity = None, identity
        self._memory: dict[Look, torch.Tensor] = {}
        self._room = memory_bytes
        self._told = False  # whether the log has it that an entry cannot be stored
        if folder is not None:
            self._folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
            self._folder.mkdir(parents=True, exist_ok=True)
            _describe(self._folder / "key.json", text.encode())

    def get(self, look: Look, comes_again: bool) -> torch.Tensor | None:
        """Stored features, or None: there are none, or what is there is not as it was written."""
        if look in self._memory:
            return self._memory[look]
        path = self._path(look)
        features = None if path is None else _read(path)
        if features is not None and comes_again:
            self._keep(look, features)
        return features

    def put(self, look: Look, features: torch.Tensor, comes_again: bool) -> None:
        """Keep features: in memory if they come again and there is room, and in the folder, unless
        that cannot be written to, which is logged."""
        if comes_again:
            self._keep(look, features)
        path = self._path(look)
        if path is not None:
            try:
                _write(path, features)
            except OSError as error:
                if not self._told:  # a full disk would say so of every clip
                    LOG.warning("%s cannot be stored (%s); said once", path, error.strerror)
                self._told = True

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


def _describe(path: Path, text: bytes) -> None:
    """Write what a folder's key was made of, for people; nothing reads it."""
    try:
        if not os.path.lexists(path):
            write_atomically(path, text)
        elif path.read_bytes() != text:
            LOG.warning("%s changed since it was written: written again", path)
            write_atomically(path, text)
    except OSError as error:
        LOG.warning("%s cannot be read or written: %s", path, error)


def _read(path: Path) -> torch.Tensor | None:
    """Features of an entry; None where there is none, or one that is not as it was written. That
    one is removed, so that whoever looks next knows that it has to be made."""
    try:
        data = np.fromfile(path, np.uint8)
        written = data[:-DIGEST_BYTES]
        digest = data[-DIGEST_BYTES:]
        if _digest(path, written) == digest.tobytes():
            return torch.from_numpy(_array(written))
        problem = "it changed since it was written"
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = error.strerror or str(error)
    LOG.warning("stored features %s are made again: %s", path, problem)
    return None


def _write(path: Path, features: torch.Tensor) -> None:
    """Write an entry whole or not at all. It is not synced: what a power failure cuts is found by
    its digest."""
    buffer = io.BytesIO()
    np.save(buffer, features.contiguous().numpy(), allow_pickle=False)
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as stream:
            stream.write(buffer.getbuffer())
            stream.write(_digest(path, buffer.getbuffer()))
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _array(written: np.ndarray) -> np.ndarray:
    """The array in the bytes of an .npy file, without a copy: a clip has megabytes."""
    stream = io.BytesIO(written[:HEADER_BYTES].tobytes())
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return written[stream.tell() :].view(dtype).reshape(shape)


def _digest(path: Path, data: memoryview | np.ndarray) -> bytes:
    """sha256 of KEY/ab/DIGEST.npy and the entry's bytes: one in the place of another is found."""
    digest = hashlib.sha256("/".join(path.parts[-3:]).encode())
    digest.update(data)
    return digest.digest()


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
