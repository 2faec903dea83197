"""The output folder of a run: claimed by one run at a time, and explaining itself.

    OUTPUT/run.lock      who writes here now; the operating system frees it when that process ends
    OUTPUT/config.json   the whole configuration, written before anything else happens
    OUTPUT/run.json      arguments, git revision, versions, what last bits depend on, starts so far
    OUTPUT/exit.json     how the last start ended: exit code, its name, and what to do

torchrun itself ends with 1 whatever its workers end with, so the code is in exit.json too.
"""

import fcntl
import importlib.util
import json
import logging
import os
import socket
import subprocess
from pathlib import Path

from model_factory.command_line.command import EXIT_CODES
from model_factory.files import DamagedFile, read_json, write_json

from .arithmetic import arithmetic, versions
from .checkpoint.folder import StorageError
from .config.schema import TrainConfig
from .distributed import Ranks, on_main

LOG = logging.getLogger("univit")
LAUNCHER_GONE = (
    "the launcher was killed, so its ranks ended without a save: start again with the same "
    "command, the run goes on from its last checkpoint"
)
REPEATING = ("data budget", "non-finite", "bad checkpoint", "other configuration")


class FolderInUse(ValueError):
    """Another run writes to this folder."""


class RunFolder:
    """One start of a run in its folder."""

    def __init__(self, config: TrainConfig, ranks: Ranks):
        self.path = Path(config.output)
        self._config, self._ranks = config, ranks
        self._lock, self._claimed = None, False

    def claim(self, arguments: list[str]) -> None:
        """Check that every rank can write here, take the lock, leave config.json and run.json.

        Raises StorageError, or FolderInUse with the other run's host and process.
        """
        self._probe()
        if self._config.wandb_project and importlib.util.find_spec("wandb") is None:
            raise ValueError("wandb_project is set, but wandb is not there: pip install wandb")
        on_main(self._ranks, self._enter)
        self._claimed = True
        if self._ranks.launcher is not None:
            self._ranks.launcher.last_words = lambda: self.leave("launcher gone", LAUNCHER_GONE)
        depends_on = arithmetic(self._ranks)
        if not self._ranks.is_main:
            return
        write_json(self.path / "config.json", json.loads(self._config.to_json()))
        facts = {
            "argv": arguments,
            "git_revision": git_revision(),
            "versions": versions(),
            "world_size": self._ranks.world_size,
            "arithmetic": depends_on,
            "starts": read_run_file(self.path / "run.json").get("starts", 0) + 1,
        }
        write_json(self.path / "run.json", facts)

    def leave(self, outcome: str, message: str, trace: str | None = None) -> int:
        """Write exit.json and return the exit code; a folder that was not claimed is left alone.
        What may follow from another rank's end is only said where nobody has said why."""
        if outcome == "peer lost" and self._ranks.launcher and self._ranks.launcher.is_gone:
            outcome, message = "launcher gone", LAUNCHER_GONE
        code = EXIT_CODES[outcome]
        record = self.path / "exit.json"
        told = outcome in ("peer lost", "stopped", "launcher gone") and record.exists()
        if self._claimed and self.path.is_dir() and not told:
            facts = {"code": code, "outcome": outcome, "message": message, "traceback": trace}
            try:
                write_json(record, facts)
            except OSError:  # the disk may be what ended the run; the code still says so
                pass
        return code

    def _probe(self) -> None:
        probe = self.path / f".probe-{self._ranks.rank:05d}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"univit")
            probe.unlink()
        except OSError as error:
            raise StorageError(
                f"--output {self.path} cannot be written to by rank {self._ranks.rank} on "
                f"{socket.gethostname()}: {error.strerror}; give a folder that can, with free space"
            ) from error

    def _enter(self) -> None:
        """Take the lock and the last start's record away; a launcher's restart after an end that
        will repeat itself goes no further."""
        self._take_lock()
        last = read_run_file(self.path / "exit.json")
        if self._ranks.restarted and last.get("outcome") in REPEATING:
            raise ValueError(f"not started again: the last start ended: {last.get('message')}")
        (self.path / "exit.json").unlink(missing_ok=True)

    def _take_lock(self) -> None:
        path = self.path / "run.lock"
        self._lock = open(path, "a+")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise FolderInUse(
                f"{self.path} is in use by {holder} ({error.strerror}): stop that run, or give "
                "another --output"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()


def read_run_file(path: Path) -> dict:
    """config.json, run.json or exit.json of a run. They are there for people and for the report, so
    a damaged one ends no run: it is logged, and as good as none."""
    try:
        return read_json(path, {})
    except FileNotFoundError:
        return {}
    except (OSError, DamagedFile) as error:
        LOG.warning("%s; what it says is not used", error)
        return {}


def git_revision() -> str | None:
    """Commit of the running code, with "-dirty" where files differ from it; None outside a checkout
    or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
