"""Videos of one's own as the material of a set: surveys of them, and runs of consecutive frames.

Frames come from the packer's own reader (codec/frames.py, codec/framing.py): upright, scaled and
cut to the working square, in presentation order; what the packer rejects is rejected here. Files
are read in child processes (codec/guard.py), so that none of them can hang or kill the command:

    parent   SourcePool.survey(inputs), SourcePool.read(...)
    child    python -m data_pipeline.embedded.sources

Only the first MAX_FRAMES frames of a video are used, so that reading a run of them takes seconds.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_factory.files import file_sha256

from ..codec.frames import open_frames
from ..codec.framing import Framing, crop_of_stream, working_frame
from ..codec.guard import WALL_SECONDS, Answer, GuardedPool, serve
from ..codec.timeline import count_frames, read_timeline
from ..errors import RejectedInput
from ..shards.inputs import Input

MODULE = "data_pipeline.embedded.sources"
MAX_FRAMES = 4096  # more than two minutes at 30 frames per second


@dataclass(frozen=True)
class Source:
    """One video that was surveyed.

    name      as the user named it (Input.source)
    sha256    of the file
    changes   float32 [frames]: mean absolute difference of a frame to the one before it, in grey
              levels; 0 for the first
    """

    location: str
    name: str
    sha256: str
    changes: np.ndarray

    def __len__(self) -> int:
        return len(self.changes)


class SourcePool:
    """Child processes that read videos; a context manager that ends them. `size` is the side of the
    working square in pixels."""

    def __init__(self, size: int, num_workers: int, wall_seconds: float = WALL_SECONDS) -> None:
        self._size = size
        self._pool = GuardedPool(
            MODULE, settings={"size": size}, num_workers=num_workers, wall_seconds=wall_seconds
        )
        # threads only wait for their children, which do the work
        self.threads = ThreadPoolExecutor(num_workers)

    def survey(self, inputs: Sequence[Input]) -> Iterator[Source | RejectedInput]:
        """For each video, in order: what was found, or why it cannot be used."""
        return self.threads.map(self._survey, inputs)

    def _survey(self, item: Input) -> Source | RejectedInput:
        try:
            header, parts = self._pool.ask({"location": item.location}, name=item.location)
        except RejectedInput as rejection:
            return rejection
        changes = np.frombuffer(parts[0], np.float32)
        return Source(item.location, name=item.source, sha256=header["sha256"], changes=changes)

    def read(self, source: Source, first: int, count: int) -> np.ndarray:
        """Frames first .. first + count - 1 of a source, uint8 [count, size, size, 3].

        Raises RejectedInput, also `changed` for a file that has no longer the frames of its survey.
        """
        request = {"location": source.location, "first": first, "count": count}
        _, parts = self._pool.ask(request, name=source.location)
        return np.frombuffer(parts[0], np.uint8).reshape(count, self._size, self._size, 3)

    def __enter__(self) -> "SourcePool":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # do not wait for what will not be used
            self._pool.close()
        self.threads.shutdown(cancel_futures=True)
        self._pool.close()


def working_frames(path: Path, size: int) -> Iterator[np.ndarray]:
    """The frames of a video in presentation order, uint8 [size, size, 3], at most MAX_FRAMES of
    them. Raises RejectedInput as packing does."""
    # an even size is a multiple of this patch size
    framing = Framing(size=size, patch_size=2)
    timeline = read_timeline(path, framing.limits)
    crop = None
    count = 0
    with open_frames(path, framing.limits, from_key=timeline.has_keys) as (stream, decoded):
        for frame in itertools.islice(decoded, MAX_FRAMES):
            if crop is None:
                crop = crop_of_stream(path, frame, stream=stream, framing=framing)
            yield working_frame(frame, crop)
            count += 1
    if count < min(len(timeline.pts), MAX_FRAMES):
        # raises where frames are missing; otherwise the packets had announced too many
        count_frames(path, timeline=timeline, limits=framing.limits, salvage=False)


def changes_of(frames: Iterator[np.ndarray]) -> np.ndarray:
    """Mean absolute difference of each frame to the one before it, float32 [frames]."""
    changes = []
    before = None
    for frame in frames:
        now = frame.astype(np.int16)
        # the first frame is compared with itself
        changes.append(np.abs(now - (now if before is None else before)).mean())
        before = now
    return np.array(changes, np.float32)


def _prepare(settings: dict) -> Callable[[dict], Answer]:
    """Child: the function that surveys a file, or reads `count` of its frames."""

    def answer(request: dict) -> Answer:
        path = Path(request["location"])
        frames = working_frames(path, size=settings["size"])
        if "count" not in request:
            changes = changes_of(frames)
            return {"sha256": file_sha256(path)}, [changes.tobytes()]
        first = request["first"]
        wanted = list(itertools.islice(frames, first, first + request["count"]))
        if len(wanted) < request["count"]:
            raise RejectedInput("changed", f"{path} has fewer frames than before")
        return {}, [np.stack(wanted).tobytes()]

    return answer


if __name__ == "__main__":
    serve(_prepare)
