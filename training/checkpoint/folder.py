"""The folder of a run's checkpoints: what counts as one, and whether its bytes are as saved.

    OUTPUT/checkpoints/
      step_00000200/
        *.safetensors     tensors, one file per rank that saved
        state.json        step, data position, configuration fingerprint, versions
        manifest.json     size and sha256 of every file; written last, with a digest of its own
      .step_00000400.tmp/ a save in progress; a leftover is deleted at the next start
      superseded_step_*/  commits beyond the step that a run was started from again
    OUTPUT/start.json     step that this job's start went on from, once commits beyond it are aside

A save is committed by one directory rename after everything is on disk. Only step numbers order
commits; clocks and file times are never asked. Cost of verifying: reading and hashing every byte,
several files at a time.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from model_factory.files import (
    DIGEST_KEY,
    DamagedFile,
    check_fields,
    file_sha256,
    parse_json,
    parse_sealed_json,
    read_json,
    stays_below,
    sync,
    write_json,
)

from ..errors import StorageError

FOLDER_NAME = "checkpoints"  # in a run's output folder
HASHING_THREADS = 8  # files that are read and hashed at a time
PREFIX = "step_"
COMMIT = re.compile(r"step_\d{8,}")
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
START_NAME = "start.json"
# 1: neither the manifest nor the state had a digest of its own
VERSION = 2
SHA256 = re.compile(r"[0-9a-f]{64}")
# what a start reads before anything else; other fields may be absent in older checkpoints
STATE_FIELDS = {"step": int, "data": dict, "fingerprint": dict}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Commit:
    """A verified checkpoint: its folder and its state.json."""

    path: Path
    state: dict


@dataclass(frozen=True)
class CheckpointFolder:
    """Commits of one run. Only rank 0 changes them, and passes on which one a start goes on
    from."""

    path: Path
    keep: int = 1
    keep_every: int = 0

    def prepare(self) -> None:
        """Make the folder, remove what a killed save left."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(leftover)

    def final(self, step: int) -> Path:
        """Folder of the commit of a step."""
        return self.path / f"{PREFIX}{step:08d}"

    def temporary(self, step: int) -> Path:
        """Folder in which it is written before it is a commit."""
        return self.path / f".{PREFIX}{step:08d}.tmp"

    def commits(self) -> list[Path]:
        """Committed checkpoints, newest step first."""
        found = self.path.glob(f"{PREFIX}*")
        paths = [path for path in found if COMMIT.fullmatch(path.name)]
        return sorted(paths, key=step_of, reverse=True)

    def commit(self, step: int) -> Path:
        """Make a finished save a commit, by one rename."""
        os.rename(self.temporary(step), self.final(step))
        sync(self.path)  # a rename is on disk only once its folder is
        return self.final(step)

    def prune(self) -> None:
        """Remove all but the newest `keep` commits and those of every `keep_every`-th step."""
        for old in self.commits()[self.keep :]:
            if not self.keep_every or step_of(old) % self.keep_every:
                # renamed first: a kill while files are removed must not leave half a commit
                leaving = self.temporary(step_of(old))
                os.rename(old, leaving)
                shutil.rmtree(leaving)

    def discard(self, step: int) -> None:
        """Remove a save that failed."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def set_aside_beyond(self, step: int) -> list[Path]:
        """Rename commits beyond a start, which a run that began anew would otherwise take for its
        own newest. Returns their new names."""
        renamed = []
        for path in self.commits():
            if step_of(path) > step:
                aside = path.with_name(f"superseded_{path.name}")
                number = 1
                while aside.exists():
                    number += 1
                    aside = path.with_name(f"superseded_{path.name}_{number}")
                os.rename(path, aside)
                renamed.append(aside)
        return renamed

    def note_start(self, step: int) -> None:
        """Record that commits beyond `step` are set aside, so that later ones are this job's."""
        write_json(self.path.parent / START_NAME, {"step": step})

    def forget_start(self) -> None:
        """Remove what an earlier job recorded."""
        (self.path.parent / START_NAME).unlink(missing_ok=True)

    def has_saved(self) -> bool:
        """Whether this job has committed since its start, restarts included."""
        try:
            start = read_json(self.path.parent / START_NAME, {"step": int})["step"]
        except (FileNotFoundError, DamagedFile):
            return False
        return any(step_of(path) > start for path in self.commits())

    def free_bytes(self) -> int:
        """Free space on its file system."""
        return shutil.disk_usage(self.path).free


def step_of(path: Path) -> int:
    """Step of a commit, by its name."""
    return int(path.name.removeprefix(PREFIX))


def write_state(directory: Path, state: Mapping) -> None:
    """Write state.json, with its own digest."""
    write_json(directory / STATE_NAME, state)


def write_manifest(directory: Path, names: Iterable[str]) -> None:
    """Hash the files that a save wrote, as they are on disk; the manifest makes the folder a
    checkpoint.

    Raises StorageError where anything else lies in the folder: a foreign file of tensors would be
    loaded with the rest.
    """
    files = [directory / name for name in sorted(names)]
    on_disk = {entry.name for entry in directory.iterdir()}
    foreign = sorted(on_disk - {file.name for file in files})
    if foreign:
        raise StorageError(f"{', '.join(foreign)} in {directory}: not written by this save")
    # the rename that commits must not reach the disk before the files do
    for file in files:
        sync(file)
    entries = {
        file.name: {"size": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, _map(file_sha256, files), strict=True)
    }
    write_json(directory / MANIFEST_NAME, {"version": VERSION, "files": entries})


def read_manifest(path: Path) -> dict[str, dict]:
    """{name: {"size", "sha256"}} of the files of a commit.

    Raises OSError where it cannot be read, DamagedFile for one that no save has written.
    """
    content = _read_object(path, MANIFEST_NAME)
    # one of version 1 has exactly one key: no changed byte makes a newer one look like it
    if set(content) not in ({"files"}, {"files", "version"}):
        raise DamagedFile(f"{MANIFEST_NAME} does not describe a checkpoint")
    if content.get("version", VERSION) != VERSION:
        raise DamagedFile(
            f"{MANIFEST_NAME} has version {content['version']!r:.80}, this code reads {VERSION}: "
            "use the code that saved it"
        )
    check_fields(content, fields={"files": dict}, name=MANIFEST_NAME)
    files = content["files"]
    entries_fit = all(_is_entry(name, entry) for name, entry in files.items())
    if STATE_NAME not in files or not entries_fit:
        raise DamagedFile(f"{MANIFEST_NAME} does not describe a checkpoint")
    return files


def read_state(path: Path) -> dict:
    """state.json of a commit. Raises OSError, or DamagedFile where a field that every start needs
    is absent."""
    state = _read_object(path, STATE_NAME)
    check_fields(state, fields=STATE_FIELDS, name=STATE_NAME)
    return state


def _read_object(path: Path, name: str) -> dict:
    """A JSON object of a commit; from version 2 on it has a digest, which is checked."""
    data = (path / name).read_bytes()
    content = parse_json(data, name)
    if DIGEST_KEY in content or "version" in content:
        return parse_sealed_json(data, name=name, fields={})
    return content


def _is_entry(name: str, entry: object) -> bool:
    """Whether an item of a manifest names a file of the folder itself, its size and its sha256."""
    is_plain = stays_below(name) and "/" not in name and name != MANIFEST_NAME
    if not (is_plain and isinstance(entry, dict) and set(entry) == {"size", "sha256"}):
        return False
    size = entry["size"]
    digest = entry["sha256"]
    is_size = type(size) is int and size >= 0  # the very type: True is an int for isinstance
    is_digest = isinstance(digest, str) and SHA256.fullmatch(digest) is not None
    return is_size and is_digest


def verify_checkpoint(path: Path) -> list[str]:
    """Problems of a checkpoint, unreadable files included; an empty list means that its files are
    those of its manifest and every byte is as it was saved."""
    try:
        listed = read_manifest(path)
        on_disk = set(os.listdir(path)) - {MANIFEST_NAME}
    except (FileNotFoundError, NotADirectoryError):
        return [f"no {MANIFEST_NAME}: not a committed checkpoint"]
    except OSError as error:
        return [f"{MANIFEST_NAME} cannot be read ({error.strerror})"]
    except DamagedFile as error:
        return [str(error)]
    names = sorted(listed)
    results = _map(lambda name: _problem_of(path / name, listed[name]), names)
    problems = [problem for problem in results if problem]
    # the library that loads tensors reads every file there, so a foreign one replaces weights
    problems += [
        f"{name} is not of this checkpoint: move it out of the folder"
        for name in sorted(on_disk - listed.keys())
    ]
    if not problems:
        try:
            read_state(path)
        except (OSError, DamagedFile) as error:
            problems.append(str(error))
    return problems


def _problem_of(file: Path, entry: dict) -> str | None:
    """The problem of one file of a checkpoint; None: it is as saved."""
    try:
        # the size first: a file that was cut need not be read
        if not file.is_file() or file.stat().st_size != entry["size"]:
            return f"{file.name} is missing or has another size"
        if file_sha256(file) != entry["sha256"]:
            return f"{file.name} changed since it was saved (sha256 differs)"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    return None


def _map(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """function(item) of each item, several at a time: hashing leaves the interpreter's lock."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(function, items))
