"""The output folder of a run: claimed by one run at a time, and explaining itself.

    OUTPUT/run.lock      who writes here now; the operating system frees it when that process ends
    OUTPUT/config.json   the whole configuration, written before anything else happens
    OUTPUT/run.json      arguments, git revision, versions, what last bits depend on, starts so far
    OUTPUT/exit.json     how the last start ended: exit code, its name, and what to do

torchrun itself ends with 1 whatever its workers end with, so the code is in exit.json too.
"""

import fcntl
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import socket
import subprocess
from io import TextIOWrapper
from pathlib import Path

import torch

from model_factory.command_line import command
from model_factory.command_line.command import EXIT_CODES
from model_factory.files import DamagedFile, read_json, write_json

from .config.schema import TrainConfig
from .distributed import Ranks, all_gather_json, is_peer_loss, on_main
from .errors import FolderInUse, Preempted, StorageError

LOG = logging.getLogger("univit")
LAUNCHER_GONE = (
    "the launcher was killed, so its ranks ended without a save: start again with the same "
    "command, the run goes on from its last checkpoint"
)
# outcomes that come again when the same command is started again
REPEATING = ("data budget", "non-finite", "bad checkpoint", "other configuration")
# outcomes that may follow from the end of another rank, which then has written why
SECONDARY = ("peer lost", "stopped", "launcher gone")
ADVICE = {
    "out of memory": (
        "less memory is needed with a smaller --list_batch_size or --target_num, with "
        "--gradient_checkpoint 1, and with --fsdp"
    ),
    "peer lost": (
        "another rank is gone or hangs: see its own message, then start again with the same "
        "command, the run goes on from its last checkpoint"
    ),
}
DISK_ADVICE = "free space or look at the file system"

PACKAGES = ("torch", "numpy", "transformers", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
# each chooses other kernels on the same machine: of torch, oneDNN (two names), MKL, cuBLAS
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
)


class RunFolder:
    """One start of a run in its folder."""

    def __init__(self, config: TrainConfig, ranks: Ranks):
        self.path = Path(config.output)
        self._config = config
        self._ranks = ranks
        self._lock: TextIOWrapper | None = None
        self._claimed = False

    def claim(self, arguments: list[str]) -> None:
        """Check that every rank can write here, take the lock, write config.json and run.json.

        Called by all ranks. Raises StorageError, or FolderInUse with the other run's host and
        process.
        """
        self._check_writable()
        if self._config.wandb_project and importlib.util.find_spec("wandb") is None:
            raise ValueError("wandb_project is set, but wandb is not there: pip install wandb")
        on_main(self._ranks, self._enter)
        self._claimed = True
        if self._ranks.launcher is not None:
            self._ranks.launcher.last_words = lambda: self.leave("launcher gone", LAUNCHER_GONE)
        depends_on = arithmetic(self._ranks)  # a collective, so before rank 0 goes on alone
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
        """Write exit.json and return the exit code; a folder that was not claimed stays as it is.

        Secondary outcomes (this rank failed because a peer died) are written only where no rank has
        written a cause.
        """
        launcher = self._ranks.launcher
        if outcome == "peer lost" and launcher is not None and launcher.is_gone:
            outcome = "launcher gone"
            message = LAUNCHER_GONE
        code = EXIT_CODES[outcome]
        record = self.path / "exit.json"
        has_cause = outcome in SECONDARY and record.exists()
        if self._claimed and self.path.is_dir() and not has_cause:
            facts = {"code": code, "outcome": outcome, "message": message, "traceback": trace}
            try:
                write_json(record, facts)
            except OSError:  # the disk may be what ended the run; the exit code still reports it
                pass
        return code

    def _check_writable(self) -> None:
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
        """Take the lock and remove the last start's exit.json; a launcher's restart after an end
        that would repeat itself goes no further."""
        self._take_lock()
        last = read_run_file(self.path / "exit.json")
        if self._ranks.restarted and last.get("outcome") in REPEATING:
            raise ValueError(f"not started again: the last start ended: {last.get('message')}")
        (self.path / "exit.json").unlink(missing_ok=True)

    def _take_lock(self) -> None:
        path = self.path / "run.lock"
        # not emptied until the lock is ours, and open from then on: closing it would free the lock
        lock = open(path, "a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise FolderInUse(
                f"{self.path} is in use by {holder} ({error.strerror}): stop that run, or give "
                "another --output"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock


def outcome_of(error: BaseException, written: Path | None = None) -> tuple[str | None, str]:
    """(outcome, message) of an error; (None, "") for a bug of ours, to be shown by its traceback.

    written: the folder that this process writes to, to name where an error has no path.
    """
    cause = error.__context__
    if isinstance(error, Preempted) and cause is not None and is_peer_loss(cause):
        # the launcher stops the ranks that are left; its signal came while the loss was handled
        return outcome_of(cause, written)
    outcome = command.outcome_of(error)
    if outcome != "out of memory" and is_peer_loss(error):
        outcome = "peer lost"
    if outcome is None:
        return None, ""
    message = command.message_of(error, written)
    if outcome in ADVICE:
        text = f"{type(error).__name__}: {message}"
        return outcome, f"{text}; {ADVICE[outcome]}"
    if outcome == "storage" and isinstance(error, OSError):
        return outcome, f"{message}; {DISK_ADVICE}"
    return outcome, message


def read_run_file(path: Path) -> dict:
    """config.json, run.json or exit.json of a run; {} for one that is missing or damaged.

    People and the report read them, and no training follows from them, so a damaged one ends no
    run: it is logged.
    """
    try:
        return read_json(path, {})
    except FileNotFoundError:
        return {}
    except (OSError, DamagedFile) as error:
        LOG.warning("%s; what it says is not used", error)
        return {}


def arithmetic(ranks: Ranks) -> dict[str, object]:
    """What the last bits of a run depend on besides its configuration and data, by name.

    The same command gives the same bits where all of this is the same; elsewhere sums are taken in
    another order or by other instructions, and results agree within rounding only. The facts are
    the same on every rank: where ranks differ, the list of their values in rank order, each once.
    Called by all ranks.
    """
    everywhere = all_gather_json(_own_arithmetic(ranks))
    merged = {}
    for name in everywhere[0]:
        values = list(dict.fromkeys(facts[name] for facts in everywhere))
        merged[name] = values[0] if len(values) == 1 else values
    return merged


def _own_arithmetic(ranks: Ranks) -> dict[str, object]:
    installed = versions()
    facts: dict[str, object] = {
        "device": ranks.device.type,
        "processor": _processor(),
        # the instruction set that torch dispatches to, which is not always the processor's best
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world_size": ranks.world_size,
    }
    if ranks.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(ranks.device)
    facts |= {name: installed.get(name) for name in PACKAGES}
    return facts | {name: os.environ.get(name) for name in VARIABLES}


def _processor() -> str:
    """Model of the processor as Linux names it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python, platform and the installed packages that decide numbers."""
    installed = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def git_revision() -> str | None:
    """Commit of the running code, with "-dirty" where files differ from it; None outside a checkout
    or without git."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    words += ["--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
