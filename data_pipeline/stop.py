"""SIGINT and SIGTERM as an exception, so that a command leaves its processes and locks behind
in order and prints one line."""

import contextlib
import os
import signal
from collections.abc import Iterator

from model_factory.command_line.command import signal_code

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked this process to end; not an Exception, so that nothing takes it for a fault of
    an input. `exit_code` is 128 plus the signal's number, as shells count.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = signal_code(number)


def leave_to_parent() -> None:
    """In a worker process: a Ctrl-C, which the terminal sends to all, is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped in the main thread at the first signal; a second one ends the process at once,
    so that nothing that hangs can hold it. A signal that the parent wants ignored stays ignored.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        # not sys.exit(), which would wait for whatever does not end
        if received:
            os._exit(signal_code(number))
        received.append(number)
        raise Stopped(number)

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    # nohup and background jobs of a shell ignore SIGINT: they shall go on doing so
    handlers = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
