"""Progress bars and notices of libraries, kept out of the output of commands.

A command calls `quiet_libraries` before anything imports transformers, which reads the environment
variable when it is imported. Errors of libraries stay.
"""

import logging
import os


def quiet_libraries(uses_deepspeed: bool = False) -> None:
    """Switch off the progress bars of transformers and the hub, and, unless DeepSpeed is used, what
    DeepSpeed reports: accelerate imports it whenever a model is saved, to test whether the model is
    one of its engines. A variable that is already set stays."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # a filter, since DeepSpeed sets its logger's level and handler when it is imported
    log = logging.getLogger("DeepSpeed")
    if uses_deepspeed:
        log.removeFilter(_is_error)
    else:
        log.addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
