"""The copy of a run's numbers for TensorBoard. It is a picture of the record, so its faults are
told once and never end a run.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path


class Board:
    """TensorBoard's writer of one run; silent until it is opened and after its first fault."""

    def __init__(self, folder: Path, step: int, logger: logging.Logger):
        self._folder = folder
        self._step = step
        self._logger = logger
        self._writer = None
        self._hook = None

    def open(self) -> None:
        """Start writing; what an earlier start wrote beyond `step` is hidden."""
        # the library writes in a thread, and keeps an error for the next call: no traceback of it
        self._hook = threading.excepthook
        threading.excepthook = self._heard

        def start(_) -> None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._step + 1)

        self._attempt(start)

    def show(self, draw: Callable) -> None:
        """Call draw(writer), where there is one."""
        if self._writer is not None:
            self._attempt(draw)

    def close(self) -> None:
        """Write what is waiting and stop."""
        if self._writer is not None:
            self._attempt(lambda writer: writer.close())
        if self._hook is not None:
            threading.excepthook = self._hook

    def _attempt(self, work: Callable) -> None:
        try:
            work(self._writer)
        # OSError: a full disk, a folder that was removed
        except OSError as error:
            self._writer = None
            if not self._folder.parent.is_dir():
                return  # the whole output is gone, which ends the run and is said there
            self._logger.warning(
                "TensorBoard gets no more of this run: %s: %s; metrics.jsonl has every step",
                self._folder,
                error.strerror or error,
            )

    def _heard(self, arguments) -> None:
        if not issubclass(arguments.exc_type, OSError):
            self._hook(arguments)
