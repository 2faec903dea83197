"""The loader: the streams of all heads, prepared ahead, so that training waits only when data is
slower than training.

One thread per loader runs the streams in turn; decoding uses DALI's threads. There are no worker
processes, so none can be killed, orphaned or reached by a signal before the trainer is. What waits
in memory is bounded by bytes. A read that hangs cannot be interrupted, but it is noticed: after a
time without a batch the trainer gets an error that names what the loader was doing, and the file.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from ..errors import DataTimeout
from ..random import counter_rng
from .packing import PackBuffers, PackedBatch, pack_views
from .views import View

MAX_AHEAD = 16  # steps that may wait, however small they are
CLOSE_SECONDS = 5.0  # a thread inside a hanging read is left behind after so long


class Stream(Protocol):
    """Endless packed batches of one head."""

    @property
    def activity(self) -> str:
        """What the stream is doing, for whoever waits for it."""

    def __next__(self) -> PackedBatch: ...

    def close(self) -> None: ...


class MixtureLoader:
    """{head name: PackedBatch} per step. `close` it, or use it as a context manager."""

    def __init__(
        self,
        streams: dict[str, Stream],
        prefetch_bytes: int = 1 << 30,
        warn_s: float = 30.0,
        timeout_s: float = 120.0,
        logger: logging.Logger | None = None,
    ):
        """prefetch_bytes: memory of the batches that may wait; one step's may always. Beside them
        DALI holds decoded batches of each head: those of its queue, and the one that is packed.
        """
        self.wait_s = 0.0  # what the consumer waited in all
        self._streams = streams
        self._prefetch_bytes = prefetch_bytes
        self._warn_s = warn_s
        self._timeout_s = timeout_s
        self._logger = logger
        # (batches or the error that ended the thread, bytes)
        self._ready: deque[tuple[dict[str, PackedBatch] | BaseException, int]] = deque()
        self._waiting_bytes = 0
        self._stopped = False
        self._changed = threading.Condition()  # guards the three above
        self._position: dict[str, dict[str, int]] = {}
        self._current = next(iter(streams), "")  # the head that the thread works on
        self._failure: BaseException | None = None
        # daemon: one that is left behind in a hanging read must not keep the process alive
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()

    def __next__(self) -> dict[str, PackedBatch]:
        """Raises what went wrong in a stream, or DataTimeout."""
        if self._failure is not None:
            raise self._failure
        started = time.monotonic()
        item = self._take(started)
        self.wait_s += time.monotonic() - started
        if isinstance(item, BaseException):
            self._failure = item  # the thread has ended: whoever asks again gets the same error
            raise item
        # counted when they are handed out: batches that were read ahead are read again on resume
        for name, batch in item.items():
            self._position[name] = {"epoch": batch.epoch, "next_batch": batch.index + 1}
        return item

    def state_dict(self) -> dict[str, dict[str, int]]:
        """{head: epoch and next batch} after the batches handed out so far; empty before any."""
        return dict(self._position)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        # a thread in a hanging read still uses its files
        if not self._thread.is_alive():
            for stream in self._streams.values():
                stream.close()

    def __enter__(self) -> "MixtureLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _produce(self) -> None:
        try:
            while not self._stopped:
                batches = {}
                for name, stream in self._streams.items():
                    self._current = name
                    batches[name] = next(stream).pinned()
                size = sum(batch.num_bytes() for batch in batches.values())
                self._offer(batches, size)
        except BaseException as error:  # handed to the trainer, which raises it
            self._offer(error, 0)

    def _offer(self, item: dict[str, PackedBatch] | BaseException, size: int) -> None:
        def may_go_on() -> bool:
            # one step's batches may always wait, whatever their size
            if self._stopped or not self._ready:
                return True
            fits = self._waiting_bytes + size <= self._prefetch_bytes
            return fits and len(self._ready) < MAX_AHEAD

        with self._changed:
            self._changed.wait_for(may_go_on)
            self._ready.append((item, size))
            self._waiting_bytes += size
            self._changed.notify_all()

    def _take(self, started: float) -> dict[str, PackedBatch] | BaseException:
        with self._changed:
            first_wait_s = min(self._warn_s, self._timeout_s)
            if not self._changed.wait_for(lambda: self._ready, first_wait_s):
                if self._logger is not None and self._warn_s < self._timeout_s:
                    waited = time.monotonic() - started
                    self._logger.warning("waiting for data for %.0f s: %s", waited, self._doing())
                self._changed.wait_for(lambda: self._ready, self._timeout_s - self._warn_s)
            if not self._ready:
                raise DataTimeout(
                    f"no batch for {time.monotonic() - started:.0f} s, head {self._doing()}: check "
                    "that storage, or raise data_timeout_s"
                )
            item, size = self._ready.popleft()
            self._waiting_bytes -= size
            self._changed.notify_all()
        return item

    def _doing(self) -> str:
        return f"{self._current}: {self._streams[self._current].activity}"


@dataclass
class SyntheticStream:
    """The stream's contract without files: noise around one pattern per class, for smoke runs and
    the throughput ceiling.

    Batch i is a pure function of (seed, rank, i); the first label names the pattern.
    """

    batch_size: int
    tokens: int  # of an item
    patch_size: int
    num_classes: int
    num_labels: int
    seed: int
    rank: int
    frames_per_token: int = 1
    activity: ClassVar[str] = "making noise"

    def __post_init__(self) -> None:
        self._next = 0
        self._buffers = PackBuffers(torch.device("cpu"))
        self._patch_shape = (3, self.frames_per_token * self.patch_size, self.patch_size)
        shape = [self.batch_size, self.tokens, self.patch_size]
        if self.frames_per_token > 1:
            # single frames are described as before there were tubes
            shape.append(self.frames_per_token)
        labels = f"{self.num_classes} {self.num_labels}"
        self.plan_sha256 = f"noise {tuple(shape)} {labels} {self.seed}"

    def seek(self, epoch: int, next_batch: int) -> None:
        """Go on with this batch; noise has one epoch."""
        self._next = next_batch

    def __next__(self) -> PackedBatch:
        rng = counter_rng(self.seed, "synthetic", self.rank, self._next)
        shape = self._patch_shape
        # any positions inside the time base and a grid of eight columns
        token = torch.arange(self.tokens)
        positions = torch.stack([token % 64, token // 8, token % 8], dim=-1)
        labels = rng.integers(0, self.num_classes, (self.batch_size, self.num_labels))
        views = []
        for label in labels[:, 0]:
            # pattern and noise stay inside 0..255 together
            pattern = counter_rng(self.seed, "pattern", int(label)).integers(64, 192, shape)
            pixels = pattern + rng.integers(-64, 64, (self.tokens, *shape))
            patches = torch.from_numpy(pixels.astype("uint8"))
            views.append(View((patches,), positions=positions, grid=(1, 1, self.tokens)))
        batch = pack_views(
            views,
            sample_ids=torch.arange(self.batch_size) + self.batch_size * self.rank,
            labels=torch.from_numpy(labels),
            weights=torch.ones(self.batch_size),
            buffers=self._buffers,
            index=self._next,
        )
        self._next += 1
        return batch

    def count_bad(self, epoch: int, bad: list[int], reasons: dict[int, str] | None = None) -> int:
        """Noise is never bad."""
        return 0

    def close(self) -> None:
        """Nothing to close."""
