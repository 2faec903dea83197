"""A process that has imported what our commands need, and forks one for every command that a test
starts: most of what a small command costs is importing torch and transformers.

A forked process is a real one: it has a session, arguments, environment, working folder, output and
exit code of its own, is killed like any other, and ends as an interpreter ends. What it does not
have is a fresh import: variables that libraries read while they are imported, and what a command
imports, are looked at with `conftest.run` and `conftest.torchrun`, which start Python anew.

The server never has a second thread, or a fork could find a lock taken by nobody. It ends with the
process that owns it (the whole run of pytest), and takes with it what it started.
Clients are in tests/forked.py; python tests/fork_server.py SOCKET OWNER_PID
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass

# What commands import. DALI, FAISS and PyAV start no thread before they are used; a module that is
# not installed is left out, and missed where it is needed.
PRELOADED = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "matplotlib.pyplot",
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.trainer",
    "deepspeed",
    "av",
    "faiss",
    "nvidia.dali.fn",
    "nvidia.dali.types",
    "training.trainer",
    "training.rounds",
    "training.record.report",
    "data_pipeline.datasets",
    "data_pipeline.commands",
    "data_pipeline.clustering.pipeline",
    "data_pipeline.loading.dali_pipeline",
    "model_factory.vit_preview_v0",
    "model_factory.vit_preview_v0_packing_hf",
)
OURS = ("training.", "data_pipeline.", "model_factory.")
LARGEST_REQUEST = 1 << 20
LOOK_S = 0.05  # as often as torchrun looks at its ranks
GRACE_S = 30.0  # between SIGTERM and SIGKILL to the ranks that are left, as torchrun gives them


@dataclass
class Job:
    """One command: `argv` as Python takes it (-m NAME, -c TEXT or a file, and arguments); with
    `ranks`, that many of it under a launcher."""

    argv: list[str]
    environment: dict[str, str]
    folder: str
    ranks: int = 0


class Server:
    """Takes requests, forks, and tells each client when its process has ended and how."""

    def __init__(self, address: str, owner: int):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.owner = os.pidfd_open(owner)
        self.selector = selectors.DefaultSelector()
        self.clients: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> its process, who asked
        self.listener.bind(address)
        self.listener.listen(64)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.owner, selectors.EVENT_READ)

    def serve(self) -> Job | None:
        """In the server: None, once the owner is gone. In a forked process: what it is to do."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == self.owner:
                    self._end_all()
                    return None
                if key.fileobj == self.listener:
                    job = self._accept()
                    if job is not None:
                        return job
                elif key.fileobj in self.clients:
                    self._tell_end(key.fileobj)
                else:
                    self._lose_client(key.fileobj)

    def _accept(self) -> Job | None:
        """Read one request and fork; the job in the new process, None in the server."""
        client, _ = self.listener.accept()
        request, files, _, _ = socket.recv_fds(client, LARGEST_REQUEST, 3)
        if not request:  # only looked whether somebody answers
            client.close()
            return None
        job = Job(**json.loads(request))
        pid = os.fork()
        if pid == 0:
            client.close()
            self._close()
            become(job, files)
            return job
        for file in files:
            os.close(file)
        client.send(json.dumps({"pid": pid}).encode())
        pidfd = os.pidfd_open(pid)
        self.clients[pidfd] = pid, client
        self.selector.register(pidfd, selectors.EVENT_READ)
        self.selector.register(client, selectors.EVENT_READ)
        return None

    def _lose_client(self, client: socket.socket) -> None:
        """Nobody waits for a process any more: it goes, as with the terminal that it came from."""
        if client.fileno() < 0:  # its process has just ended, and was told so
            return
        self.selector.unregister(client)
        for pid, waiting in self.clients.values():
            if waiting is client:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

    def _tell_end(self, pidfd: int) -> None:
        pid, client = self.clients.pop(pidfd)
        self.selector.unregister(pidfd)
        os.close(pidfd)
        with contextlib.suppress(KeyError):  # lost before
            self.selector.unregister(client)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError), client:
            client.send(json.dumps({"returncode": os.waitstatus_to_exitcode(status)}).encode())

    def _end_all(self) -> None:
        for pid, _ in self.clients.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        address = self.listener.getsockname()
        os.unlink(address)
        os.rmdir(os.path.dirname(address))

    def _close(self) -> None:
        """In a forked process: leave the server's descriptors alone to the server."""
        for pidfd, (_, client) in self.clients.items():
            os.close(pidfd)
            client.close()
        self.selector.close()
        self.listener.close()
        os.close(self.owner)


def become(job: Job, files: list[int]) -> None:
    """Take a command's place: session, output, folder, environment, arguments."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job.folder)
    os.environ.clear()
    os.environ.update(job.environment)
    _learn_parent()


def _learn_parent() -> None:
    """model_factory asked who its parent is when it was imported, in the server."""
    for name in ("model_factory.command_line.command", "model_factory.command_line.launcher_watch"):
        sys.modules[name].PARENT = os.getppid()


def execute(argv: list[str]) -> None:
    """Do what `python ARGV` does, up to its end, and end."""
    code = 0
    try:
        run_as_main(argv)
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    # What an interpreter does at its end, less the taking down of modules: that writes to all the
    # memory shared with the server, half a second of it.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit((code or 0) & 0xFF)


def run_as_main(argv: list[str]) -> None:
    """Run a module, a text or a file as `__main__`."""
    if argv[0] == "-u":  # torchrun asks for it
        argv = argv[1:]
    kind, *rest = argv
    if kind == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]  # the name becomes the file's
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(module, None)  # preloaded or not, it runs as __main__
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        text, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path.insert(0, "")
        scope = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(text, "<string>", "exec"), scope)
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


def launch(job: Job) -> bool:
    """Fork the ranks of a job and watch over them as torchrun does without restarts. True in a
    rank; the launcher itself exits here."""
    meeting_point = socket.create_server(("127.0.0.1", 0))
    pids = []
    for rank in range(job.ranks):
        pid = os.fork()
        if pid == 0:
            port = meeting_point.getsockname()[1]
            meeting_point.close()
            os.setsid()
            os.environ.update(rank_variables(rank, job.ranks, port))
            _learn_parent()
            return True
        pids.append(pid)
    # threads, so after all forks
    import torch.distributed as dist

    store = dist.TCPStore(
        host_name="127.0.0.1",
        port=meeting_point.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=meeting_point.detach(),
    )
    code = watch(pids)
    del store
    os._exit(code)


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun --standalone tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "ROLE_RANK": str(rank),
        "ROLE_NAME": "default",
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "ROLE_WORLD_SIZE": str(world_size),
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": f"forked-{port}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


def watch(pids: list[int]) -> int:
    """Wait for ranks: 0 once all are done, 1 where one failed or the launcher is asked to stop,
    after the others were stopped too."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    left = set(pids)
    failed = False
    while left and not failed and not asked:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            left.discard(ended)
            failed = status != 0
        else:
            time.sleep(LOOK_S)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            os.killpg(pid, number)
        until = time.monotonic() + GRACE_S
        while left and time.monotonic() < until:
            ended, _ = os.waitpid(-1, os.WNOHANG)
            left.discard(ended)
            if not ended:
                time.sleep(LOOK_S)
    return int(failed or bool(asked))


def compile_nothing() -> None:
    """Without its own collectives in shared memory, which it compiles for a minute where it first
    runs on a CPU, DeepSpeed takes gloo's."""
    if "deepspeed" in sys.modules:
        sys.modules["deepspeed.ops"].__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    """Import, serve; in a forked process, do what it was forked for."""
    address, owner = sys.argv[1], int(sys.argv[2])
    del sys.path[0]  # this folder: a forked process has its own first place
    sys.path.insert(0, os.getcwd())
    # commands set it before they import transformers
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            # a library may be absent; a module of ours has another name by now
            if name.startswith(OURS):
                raise
    del sys.path[0]
    compile_nothing()
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        sys.exit(f"importing {', '.join(PRELOADED)} started {len(threads) - 1} threads")
    gc.collect()
    gc.freeze()  # what is never collected is never copied
    job = Server(address, owner).serve()
    if job is not None and (job.ranks == 0 or launch(job)):
        execute(job.argv)


if __name__ == "__main__":
    main()
