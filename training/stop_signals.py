"""SIGTERM, SIGINT and SIGUSR1 as a request: finish the step, save the state, then end the run.

Inside `deferred()` the first signal only sets a flag, which all ranks learn of with the next
batch. Everywhere else it raises Preempted at once: what happens there (making data, clustering,
exports) goes on by itself when it is started again. A second signal ends the process at once, even
where it hangs in a collective.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import Preempted

# Signals within so many seconds of the first are the same request: schedulers signal workers and
# launcher alike, and the launcher passes its signal on to the workers.
SAME_REQUEST_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Handlers of this process; `requested` is the number of the first signal, or None."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._deferred = False

    def install(self) -> None:
        """Install the handlers; only the main thread can."""
        # the interpreter writes each signal's number into this socket at once, from C code,
        # whatever the main thread is waiting for
        receiving, sending = socket.socketpair()
        sending.setblocking(False)
        signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
        self._sockets = (receiving, sending)  # open for as long as the handlers are installed
        threading.Thread(target=self._listen, args=(receiving,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _listen(self, receiving: socket.socket) -> None:
        """End the process at a second signal.

        This runs in a thread, since handlers in Python wait until a call into a library returns,
        and a collective that hangs does not return.
        """
        first: float | None = None
        while True:
            for number in receiving.recv(64):
                if number not in SIGNALS:
                    continue
                now = time.monotonic()
                if first is None:
                    first = now
                if now - first > SAME_REQUEST_S:
                    os._exit(128 + number)  # the code that shells report for a signal

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, a first signal waits for the loop to read `requested`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def hold(self) -> None:
        """From here on a first signal interrupts nothing; a second one still ends the process."""
        self._deferred = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            return
        self.requested = number
        if not self._deferred:
            raise Preempted(f"stopped by {signal.Signals(number).name}")
