"""SIGTERM, SIGINT and SIGUSR1 as a wish: the step is finished, the state saved, then the run ends.

Inside `deferred()` the first signal only sets a flag, which all ranks learn of with the next
batch. Everywhere else it raises Preempted at once: what happens there (making data, clustering,
exports) goes on by itself when it is started again. A second signal ends the process at once, even
where it hangs in a collective, but not one that comes within SAME_WISH_S: schedulers signal workers
and launcher alike, and the launcher passes it on.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SAME_WISH_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preempted(BaseException):
    """The run was asked to stop; not an Exception, so that nothing takes it for a fault. `saved`:
    all that was done is in a checkpoint."""

    def __init__(self, message: str, saved: bool = False):
        super().__init__(message)
        self.saved = saved

    @property
    def outcome(self) -> str:
        """Key of EXIT_CODES."""
        return "preempted" if self.saved else "stopped"


class StopSignals:
    """Handlers of this process; `requested` is the number of the first signal, or None."""

    def __init__(self):
        self.requested: int | None = None
        self._deferred = False

    def install(self) -> None:
        """Take the signals over; only the main thread can."""
        heard, told = socket.socketpair()
        told.setblocking(False)
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        self._sockets = (heard, told)
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _listen(self, heard: socket.socket) -> None:
        """End the process at a second signal. In a thread, as handlers in Python wait until a call
        into a library returns, and a hanging collective does not."""
        first = None
        while True:
            for number in heard.recv(64):
                if number not in SIGNALS:
                    continue
                now = time.monotonic()
                first = now if first is None else first
                if now - first > SAME_WISH_S:
                    os._exit(128 + number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, a first signal waits for whoever reads `requested`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def hold(self) -> None:
        """From here on a first signal interrupts nothing; a second one still ends the process."""
        self._deferred = True

    def _handle(self, number: int, frame) -> None:
        if self.requested is not None:
            return
        self.requested = number
        if not self._deferred:
            raise Preempted(f"stopped by {signal.Signals(number).name}")
