"""Files and folders that libraries parse: what they raise becomes one error that names the place.

A library that reads a model, a tokenizer or an array tells of a damaged file in its own ways, most
of them without its name: KeyError, EOFError, SafetensorError, UnicodeDecodeError. Whoever calls one
on what a user gave wraps just that call. Needs the standard library alone.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..files import DamagedFile
from .command import OUR_PACKAGES, outcome_of

Read = TypeVar("Read", bound=Callable)


@contextmanager
def reading(place: object) -> Iterator[None]:
    """Raise DamagedFile, a ValueError, with the place and what was said, for what a library raises.

    Errors that know better pass: our own messages, those that name the place, errors of the
    operating system with a path, a library that is not installed, and want of memory.
    """
    try:
        yield
    except Exception as error:
        is_message = isinstance(error, (ValueError, OSError))
        knows_better = (
            isinstance(error, ImportError)
            or outcome_of(error) not in (None, "error")
            or (isinstance(error, OSError) and error.filename is not None)
            or (is_message and (str(place) in str(error) or _is_ours(error)))
        )
        if knows_better:
            raise
        # the first sentence says what is wrong, the rest of such texts what else could be tried
        said = " ".join(str(error).split()).partition(". ")[0]
        raise DamagedFile(
            f"{place} cannot be read ({type(error).__name__}: {said}): it is damaged, or of "
            "another kind than what was asked for"
        ) from error


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised by a line of ours, not by a library that the line calls."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in OUR_PACKAGES


def names_place(parameter: str) -> Callable[[Read], Read]:
    """Decorator of a function that reads the file or folder which `parameter` names."""

    def decorate(function: Read) -> Read:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def named(*args, **kwargs):
            place = signature.bind(*args, **kwargs).arguments[parameter]
            with reading(Path(str(place))):
                return function(*args, **kwargs)

        return named

    return decorate
