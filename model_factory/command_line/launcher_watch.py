"""Watch that ends a rank whose launcher is gone. A launcher that is killed outright cannot stop its
ranks: they would go on, hold the lock of their folder, and meet the next start's ranks there.

A thread polls the parent of this process. When it is another than at the start, the thread ends the
process at once, also inside a collective or a long step: nothing is saved, the newest checkpoint
stands, and the operating system frees the lock.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .command import EXIT_CODES, PARENT

# set for their ranks by torchrun and by DeepSpeed's launcher
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
POLL_S = 1.0  # a poll is one system call


class LauncherWatch:
    """The watch; `last_words` is called before the process ends, to log why."""

    def __init__(self) -> None:
        self.last_words: Callable[[], object] | None = None
        self._over = threading.Event()

    @property
    def is_gone(self) -> bool:
        """Whether a launcher started this process and has ended since."""
        has_launcher = any(name in os.environ for name in LAUNCHERS)
        return has_launcher and os.getppid() != PARENT

    def poll(self) -> None:
        """Poll until `stop` is called; ends the process where the launcher ends first."""
        while not self._over.wait(POLL_S):
            if self.is_gone:
                with suppress(Exception):  # a full disk must not keep the process alive
                    if self.last_words is not None:
                        self.last_words()
                # not sys.exit, which would end this thread alone
                os._exit(EXIT_CODES["launcher gone"])

    def stop(self) -> None:
        """End the polling."""
        self._over.set()


@contextmanager
def watched_launcher() -> Iterator[LauncherWatch]:
    """While the context is open, this process ends when the launcher that started it does. Without
    a launcher it has no effect. Also a decorator."""
    watch = LauncherWatch()
    threading.Thread(target=watch.poll, name="launcher watch", daemon=True).start()
    try:
        yield watch
    finally:
        watch.stop()
