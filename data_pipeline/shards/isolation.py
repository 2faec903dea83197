"""A child process that builds samples, so that no input can hang or kill the packer.

Decoders do crash and loop on damaged files. The child has limits of memory and processor time; the
parent waits a bounded wall time, then kills it, rejects the input as `timeout` or `crash`, and
starts another child for the next one. Requests and answers are JSON and raw bytes: nothing that a
broken child sends is ever executed. Starting a child costs about 0.2 s.
"""

import json
import multiprocessing
import os
import resource
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..errors import RejectedInput
from .inputs import Input, local_copy
from .sample_builder import SampleConfig, build_sample
from .schema import SampleInfo

MEMORY_LIMIT = 8 << 30
CPU_PER_WALL = 4  # processor seconds per second of the wall limit: some decoders run threads


class SampleWorker:
    """Builds samples in a child process; use one per thread, `close` it at the end."""

    def __init__(self, config: SampleConfig, wall_seconds: float):
        self._config = config
        self._wall_seconds = wall_seconds
        self._process: Any = None

    def build(self, item: Input) -> tuple[dict[str, bytes], SampleInfo]:
        """As build_sample, with the extra reasons `timeout`, `crash`, `memory` and
        `internal` (a mistake of ours, whose traceback is on the console)."""
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._pipe.send_bytes(json.dumps([item.place, item.source]).encode())
            if not self._pipe.poll(self._wall_seconds):
                self._kill()
                raise RejectedInput(
                    "timeout", f"{item.place} took longer than {self._wall_seconds:.0f} s"
                )
            answer = json.loads(self._pipe.recv_bytes())
            members = {name: self._pipe.recv_bytes() for name in answer.get("members", ())}
        except (EOFError, ConnectionError, OSError) as error:
            self._kill()
            raise RejectedInput("crash", f"{item.place} killed the decoder process") from error
        if "reason" in answer:
            raise RejectedInput(answer["reason"], answer["detail"])
        return members, SampleInfo.from_bytes(members["json"], item.source)

    def close(self) -> None:
        """End the child process."""
        if self._process is not None:
            self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child_end, self._config, self._wall_seconds), daemon=True
        )
        self._process.start()
        child_end.close()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process = None


class SamplePool:
    """Several SampleWorkers behind one ordered map; a context manager that ends their processes."""

    def __init__(self, config: SampleConfig, num_workers: int, wall_seconds: float):
        self._workers = [SampleWorker(config, wall_seconds) for _ in range(num_workers)]
        self._free: SimpleQueue[SampleWorker] = SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)

    def build_all(self, inputs: Iterable[Input]):
        """For each input, in order: (members, info), or a dict source, reason, detail when
        rejected.
        """
        return self._threads.map(self._build, inputs)

    def _build(self, item: Input):
        worker = self._free.get()
        try:
            return worker.build(item)
        except RejectedInput as rejection:
            # the record names inputs as the user did, not by this machine's folders
            return {
                "source": item.source,
                "reason": rejection.reason,
                "detail": rejection.detail.replace(item.place, item.source),
            }
        finally:
            self._free.put(worker)

    def __enter__(self) -> "SamplePool":
        self._threads = ThreadPoolExecutor(len(self._workers))
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


def limit_cpu(wall_seconds: float) -> None:
    """Let this process use its share of processor time from now on; the system kills it after."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    soft = int(used + CPU_PER_WALL * wall_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _serve(pipe, config: SampleConfig, wall_seconds: float) -> None:
    """Child: answer requests until the parent goes away."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    os.nice(5)
    while True:
        try:
            place, source = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        path = Path(place)
        limit_cpu(wall_seconds)
        try:
            with local_copy(place, config.limits) as path:
                members, _ = build_sample(path, source, config)
        except RejectedInput as rejection:
            _refuse(pipe, rejection.reason, rejection.detail.replace(str(path), place))
            continue
        except MemoryError:
            _refuse(pipe, "memory", f"{place} needs more than {MEMORY_LIMIT >> 30} GB")
            continue
        except Exception as error:  # our own mistake: named as such, and seen on the console
            traceback.print_exc()
            _refuse(pipe, "internal", f"{place}: {type(error).__name__}: {error}")
            continue
        pipe.send_bytes(json.dumps({"members": list(members)}).encode())
        for data in members.values():
            pipe.send_bytes(data)


def _refuse(pipe, reason: str, detail: str) -> None:
    pipe.send_bytes(json.dumps({"reason": reason, "detail": detail}).encode())
