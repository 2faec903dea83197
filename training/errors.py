"""Errors of a training that its user can do something about.

`outcome` is a key of model_factory.command_line.command.EXIT_CODES; without one an error is a
mistake in what was asked for. This module imports nothing, so that every other one can import it.
"""


class FolderInUse(ValueError):
    """Another run writes to this folder."""


class StorageError(ValueError):
    """A folder that cannot be written to, or a disk that stays full."""

    outcome = "storage"


class BadCheckpoint(ValueError):
    """A checkpoint that is damaged, missing or not of this run; the message names it and says what
    to do."""

    outcome = "bad checkpoint"


class ConfigMismatch(ValueError):
    """A checkpoint of another configuration or dataset."""

    outcome = "other configuration"


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is NaN or infinite; no weight was updated with it."""

    outcome = "non-finite"


class PeerFailed(RuntimeError):
    """Another rank stopped while this one waited for it."""

    outcome = "peer lost"


class Preempted(BaseException):
    """The run was asked to stop.

    It is no Exception, so that no handler of faults takes it for one. `saved`: a checkpoint holds
    all that was done.
    """

    def __init__(self, message: str, saved: bool = False):
        super().__init__(message)
        self.saved = saved

    @property
    def outcome(self) -> str:
        """Key of EXIT_CODES."""
        return "preempted" if self.saved else "stopped"
