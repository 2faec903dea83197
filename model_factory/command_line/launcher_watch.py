"""Ends a rank whose launcher is gone. A launcher that is killed outright cannot stop its ranks:
they would work on for nobody, hold the lock of their folder, and meet the next start's ranks there.

A thread looks whose child this process is. It ends the process at once, also inside a collective or
a long step: nothing is saved, the newest checkpoint stands, the operating system frees the lock.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .command import EXIT_CODES, PARENT

# set for their ranks by torchrun and by DeepSpeed's launcher
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
LOOK_S = 1.0  # a look is one system call


class LauncherWatch:
    """What is left to be said when the launcher is gone: `last_words` is called before the end."""

    def __init__(self):
        self.last_words: Callable[[], object] | None = None
        self._over = threading.Event()

    @property
    def is_gone(self) -> bool:
        """Whether a launcher started this process and has ended since."""
        return any(name in os.environ for name in LAUNCHERS) and os.getppid() != PARENT

    def look_until_over(self) -> None:
        """Look every LOOK_S seconds; does not return where the launcher goes first."""
        while not self._over.wait(LOOK_S):
            if self.is_gone:
                with suppress(Exception):  # a full disk must not keep the process alive
                    if self.last_words is not None:
                        self.last_words()
                os._exit(EXIT_CODES["launcher gone"])

    def stop(self) -> None:
        """No more looks."""
        self._over.set()


@contextmanager
def watched_launcher() -> Iterator[LauncherWatch]:
    """While inside, this process ends when the launcher that started it does; without a launcher
    nothing ever happens. Also a decorator."""
    watch = LauncherWatch()
    threading.Thread(target=watch.look_until_over, name="launcher watch", daemon=True).start()
    try:
        yield watch
    finally:
        watch.stop()
