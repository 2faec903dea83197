"""SIGTERM, SIGINT and SIGUSR1 as a wish: the step is finished, the state saved, then the run ends.

Inside `deferred()` the first signal only sets a flag, which all ranks learn of with the next
batch. Everywhere else it raises Preempted at once: what happens there (making data, clustering,
exports) goes on by itself when it is started again. A second signal ends the process at once, but
not one that comes within SAME_WISH_S: schedulers signal workers and launcher alike, and the
launcher passes it on.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SAME_WISH_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preempted(BaseException):
    """The run was asked to stop; not an Exception, so that nothing takes it for a fault."""


class StopSignals:
    """Handlers of this process; `requested` is the number of the first signal, or None."""

    def __init__(self):
        self.requested: int | None = None
        self._since = 0.0
        self._deferred = False

    def install(self) -> None:
        """Take the signals over; only the main thread can."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, a first signal waits for whoever reads `requested`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.requested is not None:
            if now - self._since > SAME_WISH_S:
                os._exit(128 + number)
            return
        self.requested, self._since = number, now
        if not self._deferred:
            raise Preempted(f"stopped by {signal.Signals(number).name}")
