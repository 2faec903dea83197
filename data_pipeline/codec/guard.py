"""Child processes that read files, so that no input can hang or kill their parent.

Decoders do crash and loop on damaged files. A child has limits of memory and processor time; the
parent waits a bounded wall time, then kills it, rejects the input as `timeout` or `crash`, and
starts another child for the next one. Requests and answers are JSON and raw bytes: nothing that a
broken child sends is ever executed. Starting a child costs about 0.2 s.

A child runs a module (`python -m MODULE`) whose `main` calls `serve`:

    parent   GuardedPool("package.module", settings, ...).ask(request, name) -> header, parts
    child    serve(prepare): answer = prepare(settings); answer(request) -> header, parts

No child outlives its parent, however that ends: it leaves when its standard input is closed. It is
in a session of its own, so Ctrl-C reaches the parent alone.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue

from model_factory.command_line.command import WRITE_FAULTS

from ..errors import RejectedInput

WALL_SECONDS = 300.0  # of one input by default: an hour of 360x640 decodes in one minute
MEMORY_LIMIT = 8 << 30  # bytes of address space
CPU_PER_WALL = 4  # processor seconds per second of the wall limit: some decoders run threads
PACKAGES = Path(__file__).resolve().parents[2]  # folder of the packages that a child imports
READY = b"ready"

Answer = tuple[dict, list[bytes]]  # a header for JSON, and binary parts


@dataclass(frozen=True)
class _Child:
    """A started child: requests and answers go through `pipe`; it leaves when `stdin` is closed."""

    process: subprocess.Popen
    pipe: Connection

    def release(self) -> None:
        """Close this process's ends of the pipes."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.pipe.close()

    def end(self) -> None:
        """Kill the child and wait for its end."""
        self.process.kill()
        self.process.wait()
        self.release()


class GuardedProcess:
    """One child process at a time, started when it is first needed. For one thread."""

    def __init__(self, module: str, settings: dict, wall_seconds: float):
        self._module = module
        self._opening = json.dumps({"settings": settings, "wall_seconds": wall_seconds}).encode()
        self._wall_seconds = wall_seconds
        self.child: _Child | None = None
        _GUARDED.add(self)

    def ask(self, request: dict, name: str) -> Answer:
        """The child's answer to a request about the input `name`: a header and parts.

        Raises RejectedInput: what the child raised, or `timeout`, `crash`, `memory`, `internal` (a
        mistake of ours, with its line in the source). Raises RuntimeError when no child starts,
        OSError with the path when a disk has no room for what the child writes.
        """
        if self.child is None or self.child.process.poll() is not None:
            self.close()
            self.child = self._start()
        child = self.child
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            child.process.kill()

        # a timer instead of waiting for a message: the child may stall in the middle of one
        timer = threading.Timer(self._wall_seconds, give_up)
        timer.start()
        try:
            child.pipe.send_bytes(json.dumps({"name": name, "request": request}).encode())
            answer = json.loads(child.pipe.recv_bytes())
            parts = [child.pipe.recv_bytes() for _ in range(answer["num_parts"])]
        except BaseException as error:
            # whatever happened, an answer may be left in the pipe: the next one must not get it
            self.close()
            if is_late.is_set():
                detail = f"{name} took longer than {self._wall_seconds:g} s"
                raise RejectedInput("timeout", detail) from error
            if isinstance(error, (EOFError, OSError, ValueError, KeyError, TypeError)):
                raise RejectedInput("crash", f"{name} killed the decoder process") from error
            raise
        finally:
            timer.cancel()
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["path"])
        if "reason" in answer:
            raise RejectedInput(answer["reason"], answer["detail"])
        return answer["header"], parts

    def close(self) -> None:
        """End the child process; a thread that waits for its answer gets a `crash`."""
        child = self.child  # another thread may start the next one before this one is gone
        self.child = None
        if child is not None:
            child.end()

    def _start(self) -> _Child:
        pipe, child_end = Pipe()
        # the child imports what the parent imports, wherever the parent was started
        paths = [str(PACKAGES), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(child_end.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[child_end.fileno()],
            env=environment,
            start_new_session=True,
        )
        child = _Child(process, pipe)
        child_end.close()
        try:
            pipe.send_bytes(self._opening)
            if pipe.recv_bytes() == READY:
                return child
        except (EOFError, OSError):
            pass
        child.end()
        raise RuntimeError(
            f"`python -m {self._module}`, which reads files, does not start: its own message "
            "is above"
        )


# all that exist in this process, for its forks to release
_GUARDED: weakref.WeakSet[GuardedProcess] = weakref.WeakSet()


def _release_all() -> None:
    """A fork holds copies of its parent's pipes, which would keep the children alive."""
    for guarded in list(_GUARDED):
        child = guarded.child
        guarded.child = None
        if child is not None:
            child.release()


os.register_at_fork(after_in_child=_release_all)


class GuardedPool:
    """Several guarded processes; `ask` may be called from as many threads, and others wait."""

    def __init__(self, module: str, settings: dict, num_workers: int, wall_seconds: float):
        self._workers = [GuardedProcess(module, settings, wall_seconds) for _ in range(num_workers)]
        self._free: SimpleQueue[GuardedProcess] = SimpleQueue()
        self._is_closed = False
        for worker in self._workers:
            self._free.put(worker)

    def ask(self, request: dict, name: str) -> Answer:
        """As GuardedProcess.ask, by the next process that is free."""
        worker = self._free.get()
        try:
            if self._is_closed:  # no child is started after `close` has ended them
                raise RejectedInput("crash", f"{name} was not read: its reader was closed")
            return worker.ask(request, name)
        finally:
            self._free.put(worker)

    def close(self) -> None:
        """End all processes, also in the middle of a request."""
        self._is_closed = True
        for worker in self._workers:
            worker.close()


def serve(prepare: Callable[[dict], Callable[[dict], Answer]]) -> None:
    """Child: answer requests until the parent goes away.

    `prepare` turns the parent's settings into the function that answers. What that raises is sent
    to the parent and ends no child.
    """
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    pipe = Connection(int(sys.argv[1]))
    opening = json.loads(pipe.recv_bytes())
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    answer = prepare(opening["settings"])
    pipe.send_bytes(READY)
    while True:
        try:
            message = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        limit_cpu(opening["wall_seconds"])
        reply, parts = _reply(answer, request=message["request"], name=message["name"])
        pipe.send_bytes(json.dumps({**reply, "num_parts": len(parts)}).encode())
        for part in parts:
            pipe.send_bytes(part)


def limit_cpu(wall_seconds: float) -> None:
    """Limit the processor time of this process from now on; the system kills it after."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])  # user and system time
    soft = int(used + CPU_PER_WALL * wall_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _reply(answer: Callable[[dict], Answer], request: dict, name: str) -> Answer:
    try:
        header, parts = answer(request)
        return {"header": header}, parts
    except RejectedInput as rejection:
        return {"reason": rejection.reason, "detail": rejection.detail}, []
    except MemoryError:
        detail = f"{name} needs more than {MEMORY_LIMIT >> 30} GB"
        return {"reason": "memory", "detail": detail}, []
    except Exception as error:  # our own mistake: named as such, with the line that made it
        # a disk without room is no fault of the input, which would be rejected for good
        if isinstance(error, OSError) and error.errno in WRITE_FAULTS:
            where = error.filename or tempfile.gettempdir()
            return {"errno": error.errno, "path": str(where)}, []
        line = traceback.extract_tb(error.__traceback__)[-1]
        source = f"{Path(line.filename).name}:{line.lineno}"
        detail = f"{name}: {type(error).__name__}: {error} ({source})"
        return {"reason": "internal", "detail": detail}, []


def _leave_with_parent() -> None:
    """End this process when its standard input is closed, in the middle of whatever it does."""
    os.read(sys.stdin.fileno(), 1)  # not by Python's buffer, whose lock would crash a normal exit
    os._exit(1)
