"""What libraries print by themselves, kept out of the output of commands.

A command calls `quiet_libraries` before anything imports transformers, which reads the variable
when it is imported. A library's errors stay.
"""

import logging
import os


def quiet_libraries(uses_deepspeed: bool = False) -> None:
    """Switch off the progress bars of transformers and the hub (a model of one file is a bar of one
    step), and, unless it is used, what DeepSpeed reports: accelerate imports it whenever a model is
    saved, only to ask whether the model is one of its engines. A variable that is set stays."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # a filter, since DeepSpeed sets its logger's level and handler when it is imported
    log = logging.getLogger("DeepSpeed")
    if uses_deepspeed:
        log.removeFilter(_is_error)
    else:
        log.addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
