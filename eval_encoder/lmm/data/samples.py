"""The conversations of a stage, read and checked before anything heavy is imported or loaded.

    list -> every n-th sample of it -> without visuals, for the blind baseline -> checked

A wrong path, a broken line or a picture that is not there ends a stage within seconds, not after
minutes of loading weights. Needs the standard library alone. Cost: the list's text, and one look at
the file system for every picture and clip.
"""

from collections.abc import Sequence
from pathlib import Path

from ..config import LmmArguments
from .conversation import Sample, Turn, Visual, check_template, read_samples


def stage_samples(arguments: LmmArguments) -> list[Sample]:
    """The samples that a stage trains on.

    Raises ValueError for an --image_folder that is none, what `read_samples` and `check_template`
    raise, a --data_fraction that leaves nothing, and pictures and clips that are not there.
    """
    folder = Path(arguments.image_folder)
    if not folder.is_dir():
        raise ValueError(f"--image_folder {folder} is no folder: name the one that paths begin at")
    # a blind model reads no files, so that its list may name any
    samples = read_samples(arguments.data_path, None if arguments.blind else folder)
    kept = int(len(samples) * arguments.data_fraction)
    if not kept:
        raise ValueError(
            f"--data_fraction {arguments.data_fraction} of the {len(samples)} samples of "
            f"{arguments.data_path} is none: give a larger one"
        )
    samples = [samples[int(number / arguments.data_fraction)] for number in range(kept)]
    if arguments.blind:
        samples = [without_visuals(sample) for sample in samples]
    check_template(samples, arguments.version)
    check_present(samples, folder)
    return samples


def without_visuals(sample: Sample) -> Sample:
    """The same conversation, text only: what a blind reader is given."""
    turns = [
        Turn(turn.speaker, turn.text.replace("<image>\n", "").replace("<video>\n", ""))
        for turn in sample.turns
    ]
    return Sample(sample.id, tuple(turns), ())


def check_present(samples: Sequence[Sample], folder: Path) -> None:
    """Raises ValueError that counts the files below `folder` that are not there and names the first
    of them."""
    users: dict[Visual, str] = {}
    for sample in samples:
        for visual in sample.visuals:
            users.setdefault(visual, sample.id)
    places = {visual.place(folder): name for visual, name in users.items()}
    absent = [(place, name) for place, name in places.items() if not place.exists()]
    if absent:
        lines = ", ".join(f"{place} (sample {name!r})" for place, name in absent[:5])
        raise ValueError(
            f"{len(absent)} of {len(places)} pictures and clips are not there; the first: {lines}; "
            "check --image_folder"
        )
