"""How far a packing is, over all its shards: a bar on a terminal, elsewhere a line now and then."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from model_factory.command_line.plain_text import show

from .inputs import Report

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_EVERY_S = 30.0  # a choice: a day of packing is 2880 lines of a log


class PackProgress:
    """Counts inputs; a context manager that shows them until it is left.

    `report` takes one line at a time. Off a terminal a thread reports every `every` seconds, also
    while a long input is in work, so that a log shows whether the run is slow or stuck.
    """

    def __init__(
        self,
        total: int,
        report: Report = show,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        every: float = LINE_EVERY_S,
    ):
        self._total = total
        self._report = report
        self._clock = clock
        self._every = every
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: tqdm | None = None
        self._over = threading.Event()
        # daemon: a process that ends without leaving the context does not wait for it
        self._thread = threading.Thread(target=self._report_often, daemon=True)
        self._packed = 0
        self._skipped = 0
        self._rejected = 0

    def __enter__(self) -> "PackProgress":
        self._start = self._clock()
        if self._terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc="packing", unit="input", leave=False)
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()  # wakes the thread at once, in the middle of its wait
        if self._bar is not None:
            self._bar.close()
        if self._thread.is_alive():
            self._thread.join()

    def packed(self, count: int, rejected: int) -> None:
        """`count` more inputs are done by this run, of which some are rejected."""
        self._packed += count
        self._rejected += rejected
        self._move(count)

    def skipped(self, count: int) -> None:
        """`count` inputs lie in a shard that an earlier run finished."""
        self._skipped += count
        self._move(count)

    def report(self, line: str) -> None:
        """Report a line without breaking the bar."""
        with self._beside_bar():
            self._report(line)

    def warn(self, line: str) -> None:
        """Print a line to standard error without breaking the bar."""
        with self._beside_bar():
            show(line, error=True)

    def line(self) -> str:
        """Where the run is: inputs done, rejected ones, rate, time left."""
        done = self._packed + self._skipped
        share = done / self._total if self._total else 1.0
        text = f"{done} of {self._total} inputs done ({share:.0%}), {self._rejected} rejected"
        seconds = self._clock() - self._start
        if not self._packed or seconds <= 0:
            return text
        # without those of earlier runs, which took no time
        rate = self._packed / seconds
        left = (self._total - done) / rate
        if left < 90:
            span = f"{left:.0f} s"
        elif left < 90 * 60:
            span = f"{left / 60:.0f} min"
        else:
            span = f"{left / 3600:.1f} h"
        return f"{text}, {rate:.2f} inputs/s, {span} left"

    def _beside_bar(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._bar is None else self._bar.external_write_mode()

    def _move(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def _report_often(self) -> None:
        while not self._over.wait(self._every):
            self._report(self.line())
