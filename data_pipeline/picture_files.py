"""Pictures that commands draw, written whole or not at all."""

import io
from pathlib import Path

from model_factory.files import write_atomically

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".gif": "GIF", ".webp": "WEBP"}


def write_picture(path: Path, image, **options) -> None:
    """Write a Pillow image in the format that its suffix names, with Pillow's options of saving.

    The file appears whole: a disk that is full leaves no half of a picture under its name.
    """
    stream = io.BytesIO()
    image.save(stream, FORMATS[path.suffix.lower()], **options)
    write_atomically(path, stream.getvalue())
