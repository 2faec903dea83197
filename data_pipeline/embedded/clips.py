"""A labelled set as a folder: real H.264 clips, two lists, settings, and where events are.

    DIR/clips/train_00000.mp4 ...   DIR/train.csv  DIR/val.csv    (lines: relative path,label)
    DIR/classes.txt   DIR/settings.json
    DIR/events.jsonl  what is known of each clip (`read_events`), of sets that have events

Lists are written first and clips after, each whole or not at all. A clip that exists is not written
again, so a killed run goes on, and a larger number of clips adds to a folder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from model_factory.files import (
    DamagedFile,
    check_fields,
    json_line,
    parse_json,
    parse_json_line,
    read_json,
    write_atomically,
    write_json,
)

from ..stop import leave_to_parent

VAL_INDEX = 1 << 24  # of the first validation clip: no index is in both splits
EVENTS_NAME = "events.jsonl"
SPLITS = ("train", "val")

# called with label=, index=; returns frames uint8 [T, H, W, 3]. It is sent to worker processes
Render = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Clip:
    """One clip of a set: its file relative to the folder, its split, its class, and the index that
    all its random draws are a function of."""

    name: str
    split: str
    label: int
    index: int


def list_clips(num_train: int, num_val: int, num_classes: int) -> list[Clip]:
    """The clips of both splits, classes in turns."""
    clips = []
    for split, count, first in (("train", num_train, 0), ("val", num_val, VAL_INDEX)):
        for i in range(count):
            name = f"clips/{split}_{i:05d}.mp4"
            clips.append(Clip(name, split=split, label=i % num_classes, index=first + i))
    return clips


def start_set(directory: Path, settings: list, names: str) -> None:
    """Make the folder of a set, or check that it is one of the same settings (check_settings)."""
    (directory / "clips").mkdir(parents=True, exist_ok=True)
    check_settings(directory / "settings.json", settings=settings, names=names)


def write_lists(
    directory: Path,
    clips: Sequence[Clip],
    classes: Sequence[str],
    events: Mapping[str, dict] | None = None,
) -> None:
    """Write both lists, the names of the classes, and where given what is known of each clip, by
    its name. `file` and `label` are added to it."""
    for split in SPLITS:
        lines = [f"{clip.name},{clip.label}\n" for clip in clips if clip.split == split]
        write_atomically(directory / f"{split}.csv", "".join(lines).encode())
    write_atomically(directory / "classes.txt", ("\n".join(classes) + "\n").encode())
    if events is not None:
        rows = [
            json_line({"file": clip.name, "label": clip.label, **events[clip.name]})
            for clip in clips
        ]
        write_atomically(directory / EVENTS_NAME, b"".join(rows))


def read_events(directory: Path, fields: Mapping[str, type | tuple[type, ...]]) -> Iterator[dict]:
    """What is known of each clip of a set, in the order of the lists, with `file`, `label` and
    `fields` of these types. Raises DamagedFile for a line that changed."""
    path = directory / EVENTS_NAME
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            name = f"{path} line {number}"
            row = parse_json_line(line, name=name)
            check_fields(row, fields={"file": str, "label": int, **fields}, name=name)
            yield row


def missing_clips(directory: Path, clips: Sequence[Clip]) -> list[Clip]:
    """The clips whose file is not there yet."""
    return [clip for clip in clips if not (directory / clip.name).exists()]


def write_missing(directory: Path, clips: Sequence[Clip], render: Render, workers: int) -> None:
    """Render and encode the clips whose file is not there yet, in worker processes."""
    missing = missing_clips(directory, clips)
    renders = [render] * len(missing)
    paths = [directory / clip.name for clip in missing]
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=leave_to_parent) as pool:
        # the list waits for all, and raises what went wrong in a worker
        list(pool.map(_write_one, renders, paths, missing, chunksize=8))


def _write_one(render: Render, path: Path, clip: Clip) -> None:
    write_clip(path, frames=render(label=clip.label, index=clip.index))


def write_clip(path: Path, frames: np.ndarray, fps: int = 25) -> None:
    """Encode uint8 [T, H, W, 3] as H.264 in mp4; the file appears whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        _encode(temporary, frames=frames, fps=fps)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _encode(path: Path, frames: np.ndarray, fps: int) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        # x264's macroblock tree reads memory it never wrote on small frames: unless it is off, the
        # same frames give different bytes from one call to the next
        stream.options = {"preset": "veryfast", "crf": "16", "x264-params": "mbtree=0"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def check_settings(path: Path, settings: list, names: str) -> None:
    """Clips of two kinds must not mix in one folder: the first run writes its settings to `path`,
    and ValueError ends a later one whose settings differ. `names` is what the message calls them.
    """
    if path.is_file():
        there = _read_settings(path)
        if there != settings:
            raise ValueError(
                f"{path.parent} holds clips of other settings {there} ({names}), "
                f"asked for are {settings}: delete the folder or take another"
            )
    write_json(path, {"settings": settings})


def _read_settings(path: Path) -> list:
    """The settings that a folder was written with: an object with its digest, a bare list by
    versions of before."""
    data = path.read_bytes()
    try:
        if data.startswith(b"["):
            return parse_json(b'{"settings": %s}' % data, str(path))["settings"]
        return read_json(path, {"settings": list})["settings"]
    except DamagedFile as error:
        raise ValueError(f"{error}: delete the folder or take another") from error
