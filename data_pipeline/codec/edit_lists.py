"""Edit lists of MP4 and MOV: which part of the media is shown, and when.

libavformat follows a list of one segment exactly, also behind empty ones. Of several segments it
gives wrong times where there are B-frames, and wrong pictures where an empty one lies between.
"""

from pathlib import Path

from .open_video import InputLimits, open_video


def has_several_segments(path: Path, limits: InputLimits) -> bool:
    """Whether a file's edit list shows several parts of its media; costs two passes over the index.

    One part is moved in time as a whole, so that all its packets move by the same distance.
    """
    media = dict(_stamps_by_byte(path, limits, follow_edits=False))
    moved = {
        stamp - media[byte]
        for byte, stamp in _stamps_by_byte(path, limits, follow_edits=True)
        if byte in media
    }
    return len(moved) > 1


def _stamps_by_byte(path: Path, limits: InputLimits, follow_edits: bool) -> list[tuple[int, int]]:
    """(first byte in the file, presentation stamp) of every packet that is to be shown."""
    container, stream = open_video(path, limits, follow_edits=follow_edits)
    try:
        return [
            (packet.pos, packet.pts)
            for packet in container.demux(stream)
            if packet.size and packet.pts is not None and not packet.is_discard
        ]
    finally:
        container.close()
