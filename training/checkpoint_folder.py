"""The folder of a run's checkpoints: what counts as one, and whether its bytes are as saved.

    OUTPUT/checkpoints/
      step_00000200/
        *.safetensors     tensors, one file per rank that saved
        state.json        step, data position, configuration fingerprint, versions
        manifest.json     size and sha256 of every file; written last
      .step_00000400.tmp/ a save in progress; a leftover is deleted at the next start
      superseded_step_*/  commits beyond the step that a run was started from again

A save is committed by one directory rename after everything is on disk. Only step numbers order
commits; clocks and file times are never asked. Cost of verifying: reading and hashing every byte,
several files at a time.
"""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model_factory.files import file_sha256, sync, write_atomically

from .fault_points import reach

HASHING_THREADS = 8
PREFIX = "step_"
COMMIT = re.compile(r"step_\d{8,}")


class StorageError(ValueError):
    """A folder that cannot be written to, or a disk that stays full."""

    outcome = "storage"


class CheckpointFolder:
    """Commits of one run. Only rank 0 uses it; others hear what it decides."""

    def __init__(self, path: Path, keep: int, keep_every: int):
        self.path, self._keep, self._keep_every = path, keep, keep_every

    def prepare(self) -> None:
        """Make the folder, remove what a killed save left."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob(f".{PREFIX}*.tmp"):
            shutil.rmtree(leftover)

    def final(self, step: int) -> Path:
        """Where the commit of a step lives."""
        return self.path / f"{PREFIX}{step:08d}"

    def temporary(self, step: int) -> Path:
        """Where it is written before it is one."""
        return self.path / f".{PREFIX}{step:08d}.tmp"

    def commits(self) -> list[Path]:
        """Committed checkpoints, newest step first."""
        found = [path for path in self.path.glob(f"{PREFIX}*") if COMMIT.fullmatch(path.name)]
        return sorted(found, key=step_of, reverse=True)

    def commit(self, step: int) -> Path:
        """Make a finished save a commit, by one rename."""
        os.rename(self.temporary(step), self.final(step))
        sync(self.path)
        return self.final(step)

    def prune(self) -> None:
        """Remove all but the newest `keep` commits and those of every `keep_every`-th step."""
        for old in self.commits()[self._keep :]:
            if not self._keep_every or step_of(old) % self._keep_every:
                going = self.temporary(step_of(old))  # never half a commit under its name
                os.rename(old, going)
                reach("checkpoint.prune", step_of(old))
                shutil.rmtree(going)

    def discard(self, step: int) -> None:
        """Remove a save that failed."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def set_aside_beyond(self, step: int) -> list[Path]:
        """Rename commits beyond a start: they are another run's future and would otherwise outlive,
        and outrank, the new ones. Returns their new names."""
        renamed = []
        for path in self.commits():
            if step_of(path) > step:
                aside, number = path.with_name(f"superseded_{path.name}"), 1
                while aside.exists():
                    number += 1
                    aside = path.with_name(f"superseded_{path.name}_{number}")
                os.rename(path, aside)
                renamed.append(aside)
        return renamed

    def free_bytes(self) -> int:
        """Free space on its file system."""
        return shutil.disk_usage(self.path).free


def step_of(path: Path) -> int:
    """Step of a commit, by its name."""
    return int(path.name.removeprefix(PREFIX))


def write_manifest(directory: Path) -> None:
    """Hash every file as it is on disk; the manifest makes the folder a checkpoint."""
    files = sorted(directory.iterdir())
    for file in files:
        sync(file)
    entries = {
        file.name: {"size": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, _hashes(files), strict=True)
    }
    write_atomically(directory / "manifest.json", json.dumps({"files": entries}, indent=1).encode())


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint; an empty list means every byte is as it was saved."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return ["no manifest.json: not a committed checkpoint"]
    try:
        entries = json.loads(manifest.read_bytes())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return ["manifest.json is unreadable"]
    if "state.json" not in expected or any(Path(name).name != name for name in expected):
        return ["manifest.json does not describe a checkpoint"]
    present, problems = [], []
    for name, (size, _) in expected.items():
        if (path / name).is_file() and (path / name).stat().st_size == size:
            present.append(path / name)
        else:
            problems.append(f"{name} is missing or has another size")
    for file, digest in zip(present, _hashes(present), strict=True):
        if digest != expected[file.name][1]:
            problems.append(f"{file.name} changed since it was saved (sha256 differs)")
    return problems


def _hashes(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(file_sha256, files))
