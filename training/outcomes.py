"""What ended a run, by the names of run_folder.EXIT_CODES, and what its user may do."""

import errno

import torch

from data_pipeline.errors import BudgetExceeded, DataTimeout

from .checkpoint_folder import BadCheckpoint, StorageError
from .distributed import is_peer_loss
from .resume import ConfigMismatch
from .stop_signals import Preempted
from .train_step import NonFiniteLoss

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
OUTCOMES = {
    BudgetExceeded: "data budget",
    NonFiniteLoss: "non-finite",
    BadCheckpoint: "bad checkpoint",
    ConfigMismatch: "other configuration",
    DataTimeout: "storage",
    StorageError: "storage",
    ValueError: "error",
}


def outcome_of(error: BaseException) -> tuple[str | None, str]:
    """(outcome, message) of what was raised; (None, "") for what is a fault of ours and should show
    its traceback."""
    said = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate" in said:
        return "out of memory", (
            f"{type(error).__name__}: {said}; less memory is needed with a smaller "
            "--list_batch_size or --target_num, with --gradient_checkpoint 1, and with --fsdp"
        )
    if is_peer_loss(error):
        return "peer lost", (
            f"{type(error).__name__}: {said}; another rank is gone or hangs: see its own message, "
            "then start again with the same command, the run goes on from its last checkpoint"
        )
    if isinstance(error, Preempted):
        if error.__context__ is not None and is_peer_loss(error.__context__):
            # the launcher stops those that are left; it came while the loss was being handled
            return outcome_of(error.__context__)
        return "preempted" if error.saved else "stopped", said
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return "storage", f"{type(error).__name__}: {said}; free space or look at the file system"
    for kind, outcome in OUTCOMES.items():
        if isinstance(error, kind):
            return outcome, said
    return None, ""
