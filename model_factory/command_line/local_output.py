"""Type of flags for outputs, which are local paths: a URL is refused before anything is written.

`Path("s3://bucket/run")` would be a folder called `s3:` in the working directory, into which a
command writes without an error. Needs the standard library alone.
"""

import argparse
import re
from pathlib import Path

# Also with one slash, which is what becomes of two in a path that was joined or normalised.
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(/?)(.*)", re.S)


class NotLocal(argparse.ArgumentTypeError, ValueError):
    """An output that is a URL. The first base makes argparse print the message unchanged."""


def local_output(text: str) -> str:
    """The same text; raises NotLocal, with advice, for a URL."""
    url = URL.fullmatch(str(text))
    if url is None:
        return text
    if url[1].lower() == "file":
        # a host may stand behind two slashes
        path = "/" + (url[3].partition("/")[2] if url[2] else url[3])
        advice = f"write {path}"
    else:
        advice = (
            "name a folder of this machine and copy it there afterwards, or mount the bucket and "
            "name the mounted folder"
        )
    raise NotLocal(f"{text} is a URL, and outputs are written to local files only: {advice}")


def output_path(text: str) -> Path:
    """Path of an output; raises NotLocal for a URL."""
    return Path(local_output(text))
