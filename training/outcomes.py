"""What ended a run, by the names of EXIT_CODES, and what its user may do."""

from pathlib import Path

from model_factory.command_line import command

from .distributed import is_peer_loss
from .stop_signals import Preempted

ADVICE = {
    "out of memory": (
        "less memory is needed with a smaller --list_batch_size or --target_num, with "
        "--gradient_checkpoint 1, and with --fsdp"
    ),
    "peer lost": (
        "another rank is gone or hangs: see its own message, then start again with the same "
        "command, the run goes on from its last checkpoint"
    ),
}
DISK_ADVICE = "free space or look at the file system"


def outcome_of(error: BaseException, written: Path | None = None) -> tuple[str | None, str]:
    """(outcome, message) of what was raised; (None, "") for what is a fault of ours and should show
    its traceback. `written` is where a write goes that met an error without a path.
    """
    cause = error.__context__
    if isinstance(error, Preempted) and cause is not None and is_peer_loss(cause):
        # the launcher stops those that are left; it came while the loss was being handled
        return outcome_of(cause, written)
    outcome = command.outcome_of(error)
    if outcome != "out of memory" and is_peer_loss(error):
        outcome = "peer lost"
    if outcome is None:
        return None, ""
    message = command.message_of(error, written)
    if outcome in ADVICE:
        return outcome, f"{type(error).__name__}: {message}; {ADVICE[outcome]}"
    if outcome == "storage" and isinstance(error, OSError):
        return outcome, f"{message}; {DISK_ADVICE}"
    return outcome, message
