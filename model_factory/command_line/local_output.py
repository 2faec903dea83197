"""Outputs are files of this machine: a URL given as one is refused before anything is written.

`Path("s3://bucket/run")` is a folder called `s3:` in the working directory, which fills up while
everything seems to go well. Needs nothing heavy: command lines use it as the type of their flags.
"""

import argparse
import re
from pathlib import Path

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.S)


class NotLocal(argparse.ArgumentTypeError, ValueError):
    """An output that is a URL; argparse shows the message of the first base as it is."""


def local_output(text: str) -> str:
    """The same text; NotLocal says what to do when it is a URL."""
    url = URL.fullmatch(str(text))
    if url is None:
        return text
    if url[1].lower() == "file":
        path = "/" + url[2].partition("/")[2]  # what stands before the slash is a host
        advice = f"write {path}"
    else:
        advice = (
            "name a folder of this machine and copy it there afterwards, or mount the bucket and "
            "name the mounted folder"
        )
    raise NotLocal(f"{text} is a URL, and outputs are written to local files only: {advice}")


def output_path(text: str) -> Path:
    """Path of an output; NotLocal as above. Either function is the type of a flag of argparse."""
    return Path(local_output(text))
