"""Checks of a model's folder before anything in it is parsed: its bytes are those that were
written, and nothing of it is executed.

    SHA256SUMS            written last by every export of ours (`seal_folder`). Where it lies in a
                          folder, each file that is about to be read must be listed there and equal
    auto_map              names Python files of the folder as the model: refused, except where
                          classes of ours read the folder, which never look at it
    pytorch_model.bin     a pickle: refused in place of safetensors
    adapter_config.json   has transformers add weights to the model, or read another one: refused
    *.index.json          names of shards may not lead out of the folder

README, Python files and files that a user adds are not read, so they may change. An exported folder
contains this file with the modelling code, so it imports the standard library and files.py alone.
"""

import fnmatch
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .files import (
    CHECKSUMS_NAME,
    check_checksums,
    is_plain_name,
    parse_json,
    read_checksums,
    write_checksums,
)

# for transformers; without the second, some versions ask the user whether code may run
LOCAL = {"local_files_only": True, "trust_remote_code": False}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
DESCRIPTIONS = (
    "*config.json",  # of the model, its generation, processors and tokenizer
    "tokenizer*",
    "*tokens*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
CODE = ("*.py",)
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("*model*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def seal_folder(folder: Path, also: Iterable[str] = ()) -> None:
    """Write SHA256SUMS of the files that a reader of the folder reads, of its Python files, and of
    those in `also`. To be called last."""
    names = _present(folder, (*WEIGHTS, *DESCRIPTIONS, *CODE, *also))
    write_checksums(folder, names)


def check_model_folder(
    folder: Path,
    weights: bool = True,
    own_classes: bool = False,
    allows_pickles: bool = False,
    also: Iterable[str] = (),
) -> None:
    """Raise ValueError for a folder with a changed file, or with one that could run code.

    weights         whether weights are about to be read as well, or descriptions only
    own_classes     whether classes of ours read config.json, which never execute its auto_map
    allows_pickles  whether weights may be a .bin that its reader reads as tensors only
    also            further names that are about to be read

    A missing folder or file is left to its reader. Cost: sha256 of the files about to be read, once
    per load, where there is a SHA256SUMS.
    """
    if not folder.is_dir():
        return
    patterns = (*DESCRIPTIONS, *(WEIGHTS if weights else ()), *also)
    present = _present(folder, patterns)
    listed = read_checksums(folder / CHECKSUMS_NAME)
    if listed is not None:
        # a listed file that is absent counts too: its reader would silently use defaults
        expected = [name for name in listed if _fits(name, patterns)]
        check_checksums(folder, {*present, *expected})
    for name in present:
        if name.endswith("config.json"):
            _refuse_code(folder / name, may_have_auto_map=own_classes and name == "config.json")
    if weights:
        _refuse_weights(folder, present=present, allows_pickles=allows_pickles)


def json_object(path: Path) -> dict:
    """Content of a JSON file; ValueError names it when it is damaged or no object."""
    return parse_json(path.read_bytes(), name=str(path))


def model_type_of(folder: str | Path) -> str | None:
    """Model type that a local folder's config.json names; None where there is no such file."""
    path = Path(folder) / "config.json"
    return json_object(path).get("model_type") if path.is_file() else None


def pickled_weights(folder: Path) -> list[Path]:
    """The .bin files that transformers reads where a folder, checked before, has no safetensors."""
    if any((folder / name).is_file() for name in SAFE_WEIGHTS):
        return []
    whole = folder / "pytorch_model.bin"
    index = folder / "pytorch_model.bin.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    shards = parse_json(index.read_bytes(), name=str(index))["weight_map"]
    return [folder / name for name in sorted(set(shards.values()))]


def _present(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Names of the files of a folder that match a pattern, sorted."""
    paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    files = [path for path in paths if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    return sorted(name for name in names if _fits(name, patterns))


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )


def _refuse_code(path: Path, may_have_auto_map: bool) -> None:
    """Raise ValueError for a description that makes transformers run or fetch code."""
    if path.name == "adapter_config.json":
        raise ValueError(
            f"{path}: adapters are not read, as they change the model or name another one: merge "
            "the adapter into the model's weights, or remove the file"
        )
    for key, value in _entries(parse_json(path.read_bytes(), name=str(path))):
        if key == "auto_map" and value and not may_have_auto_map:
            raise ValueError(
                f"{path} names code of its own (auto_map: {value!r:.100}), and nothing of a folder "
                "is executed here: take a model whose type transformers has itself; if it has "
                "this one, give a copy of the folder without auto_map"
            )
        # such as org/name: transformers would fetch that kernel and run it
        if key.endswith("_implementation") and "/" in str(value):
            raise ValueError(
                f"{path} asks for code from elsewhere ({key}: {value!r:.100}): give a copy of the "
                "folder without that line"
            )


def _entries(content: dict) -> Iterator[tuple[str, object]]:
    """All keys and values of an object and of the objects inside it. Not recursive, as a hostile
    file may be nested deeper than Python's stack."""
    waiting: list[object] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _refuse_weights(folder: Path, present: list[str], allows_pickles: bool) -> None:
    """Raise ValueError for shards outside of the folder, and for pickles instead of safetensors."""
    for name in present:
        if name.endswith(".index.json"):
            _check_index(folder / name)
    # transformers prefers safetensors, so pickles beside them are never opened
    pickles = [name for name in sorted(os.listdir(folder)) if _fits(name, PICKLES)]
    if pickles and not allows_pickles and not set(SAFE_WEIGHTS) & set(present):
        raise ValueError(
            f"{folder / pickles[0]} is a pickle, which could run code, and {folder} has no "
            "model.safetensors: take the model's safetensors, or convert the file where you trust "
            "it (load it with transformers, then save_pretrained)"
        )


def _check_index(path: Path) -> None:
    """Raise ValueError for an index that names anything but weights beside it."""
    shards = parse_json(path.read_bytes(), name=str(path)).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{path} has no weight_map: download the folder again")
    # an index of safetensors that named a .bin would have it unpickled
    ending = ".safetensors" if path.name.endswith(".safetensors.index.json") else ".bin"
    for shard in shards.values():
        if not (is_plain_name(shard) and shard.endswith(ending)):
            raise ValueError(
                f"{path} names {shard!r:.100} as a shard: only *{ending} files beside it are read"
            )
