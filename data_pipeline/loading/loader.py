"""The loader: the streams of all heads, prepared ahead, so that training waits only when data is
slower than training.

One thread per loader runs the streams in turn; decoding uses DALI's threads. There are no worker
processes, so none can be killed, orphaned or reached by a signal before the trainer is. What waits
in memory is bounded by bytes. A read that hangs cannot be interrupted, but it is noticed: after a
time without a batch the trainer is told what the loader was doing, and on which file.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator

from ..errors import DataTimeout
from .packing import PackedBatch

MAX_AHEAD = 16  # steps that may wait, however small they are
CLOSE_SECONDS = 5.0  # a thread inside a hanging read is left behind after so long


class MixtureLoader:
    """{head name: PackedBatch} per step. `close` it, or use it as a context manager."""

    def __init__(
        self,
        streams: dict[str, Iterator[PackedBatch]],
        prefetch_bytes: int = 1 << 30,
        warn_s: float = 30.0,
        timeout_s: float = 120.0,
        logger: logging.Logger | None = None,
    ):
        """prefetch_bytes: memory of the batches that may wait; one step's may always. Beside them
        DALI holds three decoded batches of each head.
        """
        self._streams, self._prefetch_bytes = streams, prefetch_bytes
        self._warn_s, self._timeout_s, self._logger = warn_s, timeout_s, logger
        self._ready: deque = deque()  # (batches or an exception, bytes)
        self._waiting_bytes, self._stopped = 0, False
        self._changed = threading.Condition()
        self._position: dict[str, dict] = {}
        self._current = next(iter(streams), "")  # the head that the thread works on
        self._failure: BaseException | None = None
        self.wait_s = 0.0  # what the consumer waited in all
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()

    def __next__(self) -> dict[str, PackedBatch]:
        """Raises what went wrong in a stream, or DataTimeout."""
        started = time.monotonic()
        item = self._failure or self._take(started)
        self.wait_s += time.monotonic() - started
        if isinstance(item, BaseException):
            self._failure = item  # the thread has ended: whoever asks again is told the same
            raise item
        for name, batch in item.items():
            self._position[name] = {"epoch": batch.epoch, "next_batch": batch.index + 1}
        return item

    def state_dict(self) -> dict[str, dict]:
        """{head: epoch and next batch} after the batches handed out so far; empty before any."""
        return dict(self._position)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            for stream in self._streams.values():
                stream.close()

    def __enter__(self) -> "MixtureLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _produce(self) -> None:
        try:
            while not self._stopped:
                batches = {}
                for name, stream in self._streams.items():
                    self._current = name
                    batches[name] = next(stream).pinned()
                self._offer(batches, sum(batch.num_bytes() for batch in batches.values()))
        except BaseException as error:  # handed to the trainer, which raises it
            self._offer(error, 0)

    def _offer(self, item, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room(size))
            self._ready.append((item, size))
            self._waiting_bytes += size
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        if not self._ready:
            return True
        return len(self._ready) < MAX_AHEAD and self._waiting_bytes + size <= self._prefetch_bytes

    def _take(self, started: float):
        warned = False
        with self._changed:
            while not self._ready:
                waited = time.monotonic() - started
                if waited >= self._timeout_s:
                    raise DataTimeout(
                        f"no batch for {waited:.0f} s, head {self._doing()}: check that storage, "
                        "or raise data_timeout_s"
                    )
                if waited >= self._warn_s and not warned and self._logger:
                    warned = True
                    self._logger.warning("waiting for data for %.0f s: %s", waited, self._doing())
                limit = self._timeout_s if warned else min(self._warn_s, self._timeout_s)
                self._changed.wait(max(0.0, limit - waited) + 1e-3)
            item, size = self._ready.popleft()
            self._waiting_bytes -= size
            self._changed.notify_all()
        return item

    def _doing(self) -> str:
        return f"{self._current}: {self._streams[self._current].activity}"
