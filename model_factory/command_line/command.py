"""The frame of every command: errors become a text and an exit code here, and nowhere else.

    def main(argv: list[str] | None = None) -> int:
        return run_command(parse=build_parser().parse_args, work=_draw, argv=argv)

    a user's mistake, or the machine's fault    `error: ...`, the exit code of its kind
    Ctrl-C                                      one line, 130
    the reader of a pipe ended (`| head`)       nothing, 141
    anything else                               a traceback, and that it is a fault of ours: 1

A mistake is a ValueError or an OSError; a class of ours with a more specific kind names it by an
attribute `outcome`, a key of EXIT_CODES. UNIVIT_TRACEBACK=1 shows the traceback of every error.
This module lies in the lowest layer and needs the standard library alone, so that `--help` stays
quick.
"""

import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from .plain_text import printable

EXIT_CODES = {
    "done": 0,
    "error": 1,  # a user's mistake, or a fault of ours; 2 is argparse's, for its own messages
    "preempted": 3,  # stopped by a signal, after a checkpoint was saved
    "stopped": 3,  # stopped by a signal where there was nothing to save; the same code on purpose
    "data budget": 4,
    "non-finite": 5,
    "bad checkpoint": 6,
    "other configuration": 7,
    "storage": 8,
    "peer lost": 9,
    "out of memory": 10,
    "launcher gone": 11,
}
# errors of a file system itself, not of one path on it
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
# those of them that only a write raises: the path at fault is then the command's output
WRITE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
OUR_PACKAGES = ("model_factory", "data_pipeline", "training", "eval_encoder")
TRACEBACK = "UNIVIT_TRACEBACK"
# attributes of parsed arguments that name where a command writes; the first one given counts
WRITTEN = ("record", "output", "output_dir", "save_report", "answers")

# the process that started this one, asked before a command imports torch, which takes seconds
PARENT = os.getppid()

Args = TypeVar("Args")


def run_command(
    parse: Callable[[Sequence[str] | None], Args],
    work: Callable[[Args], int | None],
    argv: Sequence[str] | None = None,
    should_print: Callable[[str], bool] = lambda text: True,
) -> int:
    """Parse, work, and return the exit code; `work` returns one too, None stands for 0.

    should_print: whether the text of an error is printed; a rank whose cause another rank has
    reported answers False. SystemExit passes through: argparse has shown its help or its message, a
    worker has chosen its code.
    """
    args = None
    try:
        args = parse(argv)
        code = work(args) or EXIT_CODES["done"]
        _flush_output()
        return code
    except SystemExit:
        raise
    except BrokenPipeError as error:
        if not _is_pipe_closed():
            return _report(error, args=args, should_print=should_print)
        _discard_output()
        return signal_code(signal.SIGPIPE)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return signal_code(signal.SIGINT)
    except BaseException as error:
        return _report(error, args=args, should_print=should_print)


def signal_code(number: int) -> int:
    """Exit code of a command that a signal ended, as shells count."""
    return 128 + number


def outcome_of(error: BaseException) -> str | None:
    """Kind of an error, a key of EXIT_CODES; None for a fault of ours, which needs a traceback."""
    declared = getattr(error, "outcome", None)
    if isinstance(declared, str) and declared in EXIT_CODES:
        return declared
    # torch's own class is recognised by its name, as this module does not import torch; its
    # allocator of host memory raises a plain RuntimeError
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    if isinstance(error, RuntimeError) and "can't allocate" in str(error):
        return "out of memory"
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return "storage"
    # only optional libraries can be missing: the others come with the project's installation
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return None if error.name.partition(".")[0] in OUR_PACKAGES else "error"
    is_mistake = isinstance(error, (ValueError, OSError))
    # safetensors raises this for every damaged file; pathlib before Python 3.13 a RuntimeError for
    # links in a loop
    is_mistake |= type(error).__name__ == "SafetensorError"
    is_mistake |= isinstance(error, RuntimeError) and str(error).startswith("Symlink loop")
    return "error" if is_mistake else None


def message_of(error: BaseException, written: Path | None = None) -> str:
    """Text of an error for the user: every character visible, our own line breaks kept.

    Errors of the operating system become "PATH: what happened". For an error of a write that names
    no path it is `written`; without that, only standard output is left.
    """
    if isinstance(error, FileExistsError) and os.path.isfile(error.filename or ""):
        return f"{printable(os.fsdecode(error.filename))}: is a file, and a folder is needed there"
    if isinstance(error, ModuleNotFoundError):
        return printable(f"{error}: install the package that brings it")
    if isinstance(error, OSError) and error.strerror:
        # a file name may also be the number of a descriptor
        names = (error.filename, error.filename2)
        given = [name for name in names if isinstance(name, (str, bytes, os.PathLike))]
        paths = [os.fsdecode(name) for name in given]
        if not paths and error.errno in WRITE_FAULTS:
            paths = ["standard output" if written is None else str(written)]
        return ": ".join(printable(part) for part in (*paths, error.strerror))
    if isinstance(error, OSError):  # a library's, which break their lines for a terminal
        return printable(" ".join(str(error).split()))
    # not splitlines, which also breaks at other characters that a file's name may have
    lines = [printable(line) for line in str(error).split("\n")]
    text = "\n".join(lines).rstrip()
    return text or type(error).__name__


def _report(error: BaseException, args: object, should_print: Callable[[str], bool]) -> int:
    """Print the error that ended a command; returns the exit code."""
    try:
        _flush_output()
    except OSError as full:
        _discard_output()
        # a print that met it has no path to name
        if isinstance(error, OSError) and error.filename is None:
            error = full
    outcome = outcome_of(error)
    written = _written(args)
    if outcome is None:
        text = _own_fault(error, written)
    else:
        text = f"error: {message_of(error, written)}"
        if os.environ.get(TRACEBACK):
            text = f"{_trace(error)}\n{text}"
    if should_print(text):
        print(text, file=sys.stderr)
    return EXIT_CODES[outcome or "error"]


def _own_fault(error: BaseException, written: Path | None) -> str:
    record = "" if written is None else f"; what is on record lies in {printable(written)}"
    return (
        f"{_trace(error)}\nerror: {type(error).__name__}: {message_of(error)}: a fault of univit's "
        f"own, not of what it was given. Please report it with the lines above{record}"
    )


def _trace(error: BaseException) -> str:
    parts = traceback.format_exception(type(error), error, error.__traceback__)
    lines = "".join(parts).split("\n")
    return "\n".join(printable(line) for line in lines).rstrip()


def _written(args: object) -> Path | None:
    """Path that a command writes to, as far as its arguments name one."""
    for name in WRITTEN:
        value = getattr(args, name, None)
        if value is not None:
            return Path(value)
    return None


def _is_pipe_closed() -> bool:
    """Whether the standard output is a pipe that was closed at its other end. A BrokenPipeError
    alone does not show it, as other pipes, a child's for example, break as well."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # a test's standard output has no descriptor
        return False


def _flush_output() -> None:
    """Raise for a closed pipe or a full disk now, not when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _discard_output() -> None:
    """Drop what is still buffered, or the interpreter would print an error about it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
