"""Commands of ours in processes forked from one that has imported everything (fork_server.py).

    forked(*command)                  as conftest.run, without the seconds that imports take
    start_forked(*command)            as subprocess.Popen
    forked_ranks(n, *command)         as conftest.torchrun, without its restarts
    start_forked_ranks(n, *command)   the same, started
    forked_torchrun(*flags, *command) torchrun's own agent with forked ranks, for its restarts
    path_with_python(folder)          PATH for our shell scripts

One server serves a whole run of pytest, all its workers; the first test that needs it starts it.
With more than one thread per process (shells/test_arithmetic.sh) libraries start threads when they
are imported, and a process with threads cannot be forked: then Python is started anew each time.
"""

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 900.0
# Variables that a forked process can have of its own. Others may be read by libraries when they are
# imported, and the server has done that: conftest.run is for them.
FREE = ("FAULT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FREE += ("WANDB_MODE", "UNIVIT_TRACEBACK", "UNIVIT_NUM_THREADS")

CAN_FORK = os.environ.get("UNIVIT_NUM_THREADS", "1") == "1"

_shared_folder: Path | None = None


def share_through(folder: Path) -> None:
    """Set the folder that all workers of this run see."""
    global _shared_folder
    _shared_folder = folder


def _environment(extra: dict[str, str]) -> dict[str, str]:
    unknown = sorted(set(extra) - set(FREE))
    assert not unknown, f"{unknown} may be read at import: use conftest.run"
    return {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def _server() -> str:
    """Address of this run's server, which is started by whoever comes first."""
    note = _shared_folder / "fork_server"
    with open(_shared_folder / "fork_server.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not note.exists():
            note.write_text(_start_server())
        return note.read_text()


def _start_server() -> str:
    # not below the run's folder: the system takes addresses of about a hundred characters
    folder = Path(tempfile.mkdtemp(prefix="fork-"))
    address = str(folder / "socket")
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    with open(_shared_folder / "fork_server.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fork_server.py"), address, str(owner)],
            env=_environment({}),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    until = time.monotonic() + PATIENCE_S
    while not _answers(address):
        told = (_shared_folder / "fork_server.log").read_text()
        assert server.poll() is None, f"the fork server ended:\n{told}"
        assert time.monotonic() < until, "the fork server did not start"
        time.sleep(0.05)
    return address


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(address)
            return True
        except OSError:
            return False


class Forked:
    """A process of the fork server, with what tests use of subprocess.Popen. It is killed when its
    starter ends before it."""

    def __init__(
        self,
        argv: list[str],
        environment: dict[str, str],
        files: Sequence[int],
        ranks: int = 0,
        folder: Path = ROOT,
    ):
        self.args = argv
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(_server())
        job = {"argv": argv, "environment": environment, "folder": str(folder), "ranks": ranks}
        socket.send_fds(self._connection, [json.dumps(job).encode()], files)
        self.pid: int = self._receive()["pid"]

    def _receive(self) -> dict:
        answer = self._connection.recv(1 << 16)
        assert answer, "the fork server is gone"
        return json.loads(answer)

    def wait(self, timeout: float | None = PATIENCE_S) -> int:
        """Exit code, negative for a signal; subprocess.TimeoutExpired after a while."""
        if self.returncode is None:
            readable, _, _ = select.select([self._connection], [], [], timeout)
            if not readable:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._receive()["returncode"]
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Exit code, or None while the process works."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Signal the process, if it is still there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _anew(argv, environment: dict[str, str], ranks: int, **options) -> subprocess.Popen:
    """The same command, or ranks of it, in new processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words = [*(launcher if ranks else []), *(str(word) for word in argv)]
    return subprocess.Popen(
        [sys.executable, *words], env=_environment(environment), cwd=ROOT, **options
    )


def _start(argv, files, environment: dict[str, str], ranks: int = 0) -> Forked:
    return Forked([str(word) for word in argv], _environment(environment), files, ranks)


def _start_quietly(argv, environment: dict[str, str], ranks: int = 0) -> Forked:
    if not CAN_FORK:
        quiet = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
        return _anew(argv, environment, ranks, start_new_session=True, **quiet)
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        return _start(argv, [nowhere] * 3, environment, ranks)
    finally:
        os.close(nowhere)


def _finish(argv, check: bool, environment: dict[str, str], ranks: int = 0):
    """Start a command and wait for its end; files take its output, so nobody need read it."""
    with (
        open(os.devnull) as nothing,
        tempfile.TemporaryFile("w+", errors="replace") as out,
        tempfile.TemporaryFile("w+", errors="replace") as err,
    ):
        if CAN_FORK:
            process = _start(argv, [f.fileno() for f in (nothing, out, err)], environment, ranks)
        else:
            process = _anew(argv, environment, ranks, stdin=nothing, stdout=out, stderr=err)
        try:
            process.wait(timeout=PATIENCE_S)
        except BaseException:
            process.kill()
            raise
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(
            process.args, process.returncode, stdout=out.read(), stderr=err.read()
        )
    if check and done.returncode:
        raise AssertionError(f"{argv} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def start_forked(*command: str | Path, **environment: str) -> Forked:
    """Start a command of ours, its output unread."""
    return _start_quietly(command, environment)


def start_forked_ranks(num_ranks: int, *command: str | Path, **environment: str) -> Forked:
    """Start a launcher with its ranks, to be killed with conftest.kill_group."""
    return _start_quietly(command, environment, num_ranks)


def forked(
    *command: str | Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command of ours to its end, output captured; a failure shows it."""
    return _finish(command, check, environment)


def forked_ranks(
    num_ranks: int, *command: str | Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command of ours on ranks of a real gloo group, output captured."""
    return _finish(command, check, environment, num_ranks)


class ForkingRun:
    """Stands in for the module `subprocess` where the product starts Python: its `run` forks."""

    @staticmethod
    def run(command: Sequence[str], capture_output: bool, text: bool):
        """As subprocess.run, of `sys.executable` and what follows."""
        assert command[0] == sys.executable and capture_output and text
        return forked(*command[1:], check=False)


# torchrun's own agent, whose ranks are forked by the server instead of being started by it
AGENT = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import forked
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.run import main

def start(handler, args, env):
    # PYTHON_EXEC may name a script that goes before the ranks' own
    words = args[1:] if args[0] == sys.executable else args
    return forked.Forked(list(words), env, (0, 1, 2))


forked.share_through(Path({folder!r}))
SubprocessHandler._popen = start
main(sys.argv[1:])
"""


def forked_torchrun(
    *command: str | Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Run torchrun with flags of its own (its restarts), and our command as its ranks."""
    agent = ["-c", _agent()] if CAN_FORK else ["-m", "torch.distributed.run"]
    return _finish([*agent, *command], check, environment)


def _agent() -> str:
    return AGENT.format(tests=str(ROOT / "tests"), folder=str(_shared_folder))


# `python` and `torchrun` as a script of ours sees them
STAND_IN = """#!{python} -S
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import forked

forked.share_through(Path({folder!r}))
process = forked.Forked([*{first}, *sys.argv[1:]], dict(os.environ), (0, 1, 2), folder=Path.cwd())
signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
code = process.wait(timeout=None)
sys.exit(code if code >= 0 else 128 - code)
"""


def path_with_python(folder: Path) -> str:
    """PATH for a shell script, on which a `python` and a `torchrun` come first that fork. They pass
    SIGTERM on; killed, they take with them what they started."""
    if not CAN_FORK:
        return f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    _server()  # from here: one that a script's process started would end with that process
    folder.mkdir(exist_ok=True)
    first = {"python": [], "torchrun": ["-c", _agent()]}
    for name, words in first.items():
        text = STAND_IN.format(
            python=sys.executable,
            tests=str(ROOT / "tests"),
            folder=str(_shared_folder),
            first=words,
        )
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def rank_processes(process: Forked) -> list:
    """The ranks of a launcher that `start_forked_ranks` started, in order."""
    import psutil

    ranks = psutil.Process(process.pid).children()
    return sorted(ranks, key=lambda rank: (rank.create_time(), rank.pid))
