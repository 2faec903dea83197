"""Errors of libraries that parse a user's file or folder, turned into one error that names it.

A library that reads a model, a tokenizer or an array reports a damaged file by errors of many
types, most of them without the file's name: KeyError, EOFError, SafetensorError,
UnicodeDecodeError. Code that calls a library on a user's file wraps just that call. Needs the
standard library alone.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..files import DamagedFile
from .command import OUR_PACKAGES, outcome_of

Params = ParamSpec("Params")
Result = TypeVar("Result")


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Raise DamagedFile, a ValueError, with the path and the message, for an error of a library.

    Errors with more detail pass unchanged: our own messages, those that name the path, errors of
    the operating system with a path, a library that is not installed, and a lack of memory.
    """
    try:
        yield
    except Exception as error:
        is_message = isinstance(error, (ValueError, OSError))
        knows_better = (
            isinstance(error, ImportError)
            or outcome_of(error) not in (None, "error")
            or (isinstance(error, OSError) and error.filename is not None)
            or (is_message and (str(path) in str(error) or _is_ours(error)))
        )
        if knows_better:
            raise
        # the first sentence names the fault; libraries go on with general advice
        one_line = " ".join(str(error).split())
        message = one_line.partition(". ")[0]
        raise DamagedFile(
            f"{path} cannot be read ({type(error).__name__}: {message}): it is damaged, or of "
            "another kind than what was asked for"
        ) from error


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised an error, not a library that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in OUR_PACKAGES


def names_place(
    parameter: str,
) -> Callable[[Callable[Params, Result]], Callable[Params, Result]]:
    """Decorator: errors of a function that reads the file or folder in `parameter` name it."""

    def decorate(function: Callable[Params, Result]) -> Callable[Params, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def named(*args: Params.args, **kwargs: Params.kwargs) -> Result:
            path = signature.bind(*args, **kwargs).arguments[parameter]
            with reading(Path(str(path))):
                return function(*args, **kwargs)

        return named

    return decorate
