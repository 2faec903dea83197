"""Cache of features of frozen encoders, between epochs and between runs; for both probes.

    memory   up to a number of bytes per process, for items that come again
    folder   by option, for every item: FOLDER/KEY/ab/DIGEST.npy and FOLDER/KEY/key.json

KEY hashes what all features have in common: the encoder's weights, the input settings, tokens or
pooled. DIGEST hashes the identity of one item, such as a look at a clip: path, size and
modification time of its file, or its sample in a packed set, and the crop. Features of another
encoder, sampling or file are never returned, while other lists, heads and seeds of heads share
them. Files are written beside and renamed, so several processes may fill one folder. Cost: a
file of tokens * width * 2 bytes per item.

An entry ends with the sha256 of its name and its bytes, which NumPy's own reader passes over. One
that differs, or cannot be read, is named in the log and made again; one that cannot be written is
named too, and its features are computed whenever they are needed. Neither ends a run.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

from model_factory.files import write_atomically

LOG = logging.getLogger("univit")
ENTRY_FORMAT = 2  # goes up whenever the bytes of an entry change; 1 had no digest
HEADER_BYTES = 1024  # NumPy writes 128 for arrays of numbers
DIGEST_BYTES = hashlib.sha256().digest_size

Item = TypeVar("Item", bound=Hashable)


class FeatureCache(Generic[Item]):
    """Features by item: tensors [L, C] of any dtype that NumPy has, on the CPU."""

    def __init__(
        self,
        folder: Path | None,
        key: Mapping[str, object],
        identity: Callable[[Item], str],
        memory_bytes: int = 0,
    ) -> None:
        """key: what all features have in common; identity: text that changes with what an item's
        features are made of."""
        self._identity = identity
        self._memory: dict[Item, torch.Tensor] = {}
        self._room = memory_bytes
        self._warned = False  # whether the log says that an entry cannot be stored
        self._folder: Path | None = None
        if folder is not None:
            text = json.dumps({**key, "entry": ENTRY_FORMAT}, sort_keys=True, default=str)
            digest = hashlib.sha256(text.encode()).hexdigest()
            # 64 bits: among a million keys two are the same with a chance of 3e-8
            self._folder = folder / digest[:16]
            self._folder.mkdir(parents=True, exist_ok=True)
            _describe(self._folder / "key.json", text.encode())

    def get(self, item: Item, comes_again: bool = False) -> torch.Tensor | None:
        """Stored features; None where there are none, or where they are damaged."""
        if item in self._memory:
            return self._memory[item]
        path = self._path(item)
        features = None if path is None else _read(path)
        if features is not None and comes_again:
            self._remember(item, features)
        return features

    def put(self, item: Item, features: torch.Tensor, comes_again: bool = False) -> None:
        """Store features: in memory if they come again and there is room, and in the folder, unless
        that cannot be written to, which is logged."""
        if comes_again:
            self._remember(item, features)
        path = self._path(item)
        if path is None:
            return
        try:
            _write(path, features)
        except OSError as error:
            if not self._warned:  # a full disk would be logged for every clip
                LOG.warning("%s cannot be stored (%s); logged once", path, error.strerror)
            self._warned = True

    def has(self, item: Item) -> bool:
        """Whether `get` has an answer, without reading it."""
        path = self._path(item)
        return item in self._memory or (path is not None and path.is_file())

    def _remember(self, item: Item, features: torch.Tensor) -> None:
        size = features.numel() * features.element_size()
        if size <= self._room:
            self._memory[item] = features
            self._room -= size

    def _path(self, item: Item) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(self._identity(item).encode()).hexdigest()
        # two hex digits make 256 folders; 32 more leave 136 bits, too many for a collision
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
    """Features of an entry; None where there is none, where it cannot be read, or where it is
    damaged. It is removed if its digest is wrong, so that `has` is right about it from then on."""
    try:
        data = np.fromfile(path, np.uint8)
        written = data[:-DIGEST_BYTES]
        digest = data[-DIGEST_BYTES:]
        if _digest(path, written) == digest.tobytes():
            return torch.from_numpy(_array(written))
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = error.strerror or str(error)
    else:
        problem = "it changed since it was written"
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            problem += f", and cannot be removed ({error.strerror})"
    LOG.warning("stored features %s are made again: %s", path, problem)
    return None


def _write(path: Path, features: torch.Tensor) -> None:
    """Write an entry whole or not at all. It is not synced, unlike by files.write_atomically: an
    entry that a power failure cut is found by its digest."""
    buffer = io.BytesIO()
    np.save(buffer, features.contiguous().numpy(), allow_pickle=False)
    path.parent.mkdir(exist_ok=True)
    # several processes may write the same entry, each beside it under a name of its own
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
    # NumPy evaluates a header, which data_pipeline/side_files.py avoids. Here the digest has shown
    # that the header is ours, and only one thread of a process reads entries.
    stream = io.BytesIO(written[:HEADER_BYTES].tobytes())
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return written[stream.tell() :].view(dtype).reshape(shape)


def _digest(path: Path, data: memoryview | np.ndarray) -> bytes:
    """sha256 of KEY/ab/DIGEST.npy and the entry's bytes, so that a copy of another entry in its
    place is noticed."""
    name = "/".join(path.parts[-3:])
    digest = hashlib.sha256(name.encode())
    digest.update(data)
    return digest.digest()


def weights_sha256(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of a text and of named tensors, bit for bit."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        # as bytes, since NumPy has no bf16
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def file_identity(path: Path) -> str:
    """Resolved path, size and modification time of a file."""
    try:
        stat = os.stat(path)
    except OSError:
        return f"{path.resolve()} absent"
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
