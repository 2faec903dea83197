"""Samples of the demonstration set: attributes, captions, questions, answers; and their files.

Attributes follow from the rank of an image or clip by arithmetic, so that any answer is right as
often as any other; the order of a training medium's questions is drawn from (seed, index). The
command is question_set.py, which describes the files.
"""

import io
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.embedded.clips import check_settings, write_clip
from data_pipeline.embedded.drawing import COLOURS, OUTLINES, Appearance
from data_pipeline.embedded.motion_shapes import CLASSES, GENERATOR_VERSION, render_clip
from data_pipeline.random import counter_rng
from eval_encoder.lmm.demo.question_set import DemoSet
from model_factory.files import write_atomically

SET_VERSION = 1  # moves when the same arguments give other samples
INSTRUCTION = "Answer with one word."  # on a line of its own after every question
ASKED = {  # of a training medium, in an order of its own
    "image": ("colour", "shape", "yes_no"),
    "video": ("colour", "shape", "yes_no", "direction"),
}
# kinds of held-out questions, in turns: half of each category on clips, directions on clips only
HELD_OUT = (
    ("image", "colour"),
    ("video", "colour"),
    ("image", "shape"),
    ("video", "shape"),
    ("image", "yes_no"),
    ("video", "yes_no"),
    ("video", "direction"),
    ("video", "direction"),
)
# ranks after which every colour, outline, motion and yes_no answer occurred equally often: the
# least common multiple of 6 colours, 3 outlines and 8 motions
ROUND = 24
EXTRAS_EVERY = 20  # training media for each sample on two images, and for each without an image
# index of the first held-out medium: beyond any training set, so that no draw is shared
HELD_OUT_INDEX = 1 << 24
# of the brightest channel: the background stays below, every colour of a shape above
SHAPE_BRIGHTNESS = 140
MOTION_PHRASES = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "clockwise": "turning clockwise",
    "counterclockwise": "turning counterclockwise",
    "grow": "growing",
    "shrink": "shrinking",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
OPPOSITES = {
    "hot": "cold",
    "day": "night",
    "big": "small",
    "old": "new",
    "up": "down",
    "left": "right",
    "first": "second",
    "yes": "no",
}

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Medium:
    """One image or clip. `kind` is image or video, `path` relative to the set, `index` the counter
    of its random draws, `rank` the number that its attributes follow from.
    """

    kind: str
    path: str
    index: int
    rank: int
    colour: str
    shape: str
    motion: str

    @property
    def caption(self) -> str:
        """The answer of stage 1."""
        moving = f" {MOTION_PHRASES[self.motion]}" if self.kind == "video" else ""
        return f"a {self.colour} {self.shape}{moving} ."

    def ask(self, category: str) -> tuple[str, str]:
        """(question, answer) of colour, shape, direction (clips only) or yes_no; KeyError else."""
        if category == "yes_no":
            return self._ask_yes_no()
        return {
            "colour": ("What is the colour of the shape?", self.colour),
            "shape": ("Which shape is it?", self.shape),
            "direction": ("How does the shape move?", self.motion),
        }[category]

    def _ask_yes_no(self) -> tuple[str, str]:
        """Within a round every colour is asked for, and is right, as often as any other."""
        names = list(COLOURS)
        turn = self.rank // len(names)
        if (turn + self.rank // ROUND) % 2 == 0:
            return f"Is the shape {self.colour}?", "yes"
        # 1 to 5 further on, so never the colour that is shown
        step = 1 + turn % (len(names) - 1)
        index = names.index(self.colour) + step
        other = names[index % len(names)]
        return f"Is the shape {other}?", "no"


def medium_at(kind: str, name: str, index: int, rank: int) -> Medium:
    """The medium of a rank. Attributes are in equal shares in every round of 24 ranks, and all 144
    combinations of them in every six rounds.
    """
    return Medium(
        kind=kind,
        path=f"images/{name}.png" if kind == "image" else f"clips/{name}.mp4",
        index=index,
        rank=rank,
        # one colour further each round: otherwise each motion would always have the same colours
        colour=list(COLOURS)[(rank + rank // ROUND) % len(COLOURS)],
        shape=list(OUTLINES.values())[rank // len(CLASSES) % len(OUTLINES)],
        motion=CLASSES[rank % len(CLASSES)],
    )


def training_medium(number: int) -> Medium:
    """Three of every five are images; images and clips have ranks of their own."""
    five, within = divmod(number, 5)
    is_image = within < 3
    return medium_at(
        kind="image" if is_image else "video",
        name=f"train_{number:05d}",
        index=number,
        rank=3 * five + within if is_image else 2 * five + within - 3,
    )


def held_out(num_val: int) -> Iterator[tuple[Medium, str]]:
    """(medium, category) of every held-out question; each has a medium of its own."""
    for number in range(num_val):
        turn, within = divmod(number, len(HELD_OUT))
        kind, category = HELD_OUT[within]
        medium = medium_at(
            kind=kind,
            name=f"val_{number:05d}",
            index=HELD_OUT_INDEX + number,
            # HELD_OUT has two questions of direction in a turn, which need ranks of their own
            rank=2 * turn + within % 2 if category == "direction" else turn,
        )
        yield medium, category


def tuning_samples(seed: int, num_train: int) -> list[dict]:
    """All samples of stage 2."""
    extras = range(num_train // EXTRAS_EVERY)
    samples = [_dialogue(seed, number) for number in range(num_train)]
    samples += [_two_images(seed, number) for number in extras]
    samples += [_text_only(seed, number) for number in extras]
    return [{"id": f"tune_{index:05d}", **sample} for index, sample in enumerate(samples)]


def _dialogue(seed: int, number: int) -> dict:
    """All categories of a medium, one after the other, in an order of its own."""
    medium = training_medium(number)
    categories = ASKED[medium.kind]
    order = counter_rng(seed, "lmm_demo_set", number).permutation(len(categories))
    rounds = [medium.ask(categories[index]) for index in order]
    turns = _turns(f"<{medium.kind}>\n", rounds)
    return {medium.kind: medium.path, "conversations": turns}


def _two_images(seed: int, number: int) -> dict:
    """Two of twelve images, which differ in colour."""
    # the purpose of the draws is part of the set: another text would give other samples
    rng = counter_rng(seed, "lmm_demo_set two pictures", number)
    first = EXTRAS_EVERY * number
    media = [training_medium(first + offset) for offset in range(EXTRAS_EVERY)]
    media = [medium for medium in media if medium.kind == "image"]
    asked = media[rng.integers(len(media))]
    others = [medium for medium in media if medium.colour != asked.colour]
    pair = [asked, others[rng.integers(len(others))]]
    answer = "first"
    if number % 2:  # in turns, so that neither answer is the likelier one
        pair.reverse()
        answer = "second"
    question = f"Which picture shows the {asked.colour} shape, first or second?"
    turns = _turns("<image>\n<image>\n", [(question, answer)])
    return {"image": [medium.path for medium in pair], "conversations": turns}


def _text_only(seed: int, number: int) -> dict:
    rng = counter_rng(seed, "lmm_demo_set text", number)
    if number % 2:
        word = list(OPPOSITES)[rng.integers(len(OPPOSITES))]
        question = f"What is the opposite of {word}?"
        answer = OPPOSITES[word]
    else:
        # summands of at most four, since NUMBERS ends with eight
        largest = len(NUMBERS) // 2
        left, right = rng.integers(0, largest + 1, 2).tolist()
        question = f"What is {NUMBERS[left]} plus {NUMBERS[right]}?"
        answer = NUMBERS[left + right]
    return {"conversations": _turns("", [(question, answer)])}


def _turns(placeholders: str, rounds: Iterable[tuple[str, str]]) -> Turns:
    """LLaVA's conversation; the placeholders stand before the first question."""
    turns: Turns = []
    for question, answer in rounds:
        turns.append({"from": "human", "value": f"{question}\n{INSTRUCTION}"})
        turns.append({"from": "gpt", "value": answer})
    turns[0]["value"] = placeholders + turns[0]["value"]
    return turns


def caption_sample(medium: Medium) -> dict:
    """The sample of stage 1."""
    turns = [
        {"from": "human", "value": f"<{medium.kind}>"},
        {"from": "gpt", "value": medium.caption},
    ]
    return {"id": Path(medium.path).stem, medium.kind: medium.path, "conversations": turns}


def render_image(medium: Medium, seed: int, size: int) -> np.ndarray:
    """The image of a medium, uint8 [size, size, 3].

    The world wraps around, so it is rolled until the shape, the only bright thing, lies whole in
    the middle.
    """
    image = _render(medium, seed, size=size, frames=1)[0]
    is_shape = image.max(axis=2) > SHAPE_BRIGHTNESS
    # the mean of positions on a circle, since the shape may lie across the border
    angles = 2j * np.pi / size * np.arange(size)
    circle = np.exp(angles)
    shifts = []
    for axis in (0, 1):
        weights = is_shape.sum(axis=1 - axis)  # bright pixels of every row, or column
        centre = np.angle(weights @ circle) * size / (2 * np.pi)
        shifts.append(size // 2 - round(float(centre)))
    return np.roll(image, shifts, axis=(0, 1))


def _render(medium: Medium, seed: int, size: int, frames: int) -> np.ndarray:
    corners = {name: number for number, name in OUTLINES.items()}[medium.shape]
    return render_clip(
        label=CLASSES.index(medium.motion),
        seed=seed,
        index=medium.index,
        difficulty="easy",
        size=size,
        frames=frames,
        appearance=Appearance(medium.colour, corners),
    )


def _write_medium(config: DemoSet, medium: Medium) -> None:
    path = config.output / medium.path
    if medium.kind == "video":
        write_clip(path, frames=_render(medium, config.seed, size=config.size, frames=64))
        return
    stream = io.BytesIO()
    image = render_image(medium, config.seed, size=config.size)
    Image.fromarray(image).save(stream, "PNG")
    write_atomically(path, stream.getvalue())


def write_demo_set(config: DemoSet) -> None:
    """Write the set.

    Media that exist are kept, so a killed run goes on; lists come last. Raises ValueError for
    counts or sizes that cannot be, and for a folder of other settings.
    """
    _check_counts(config)
    for folder in ("images", "clips"):
        (config.output / folder).mkdir(parents=True, exist_ok=True)
    check_settings(
        config.output / "settings.json",
        settings=[SET_VERSION, GENERATOR_VERSION, config.size, config.seed],
        names="set version, generator version, size, seed",
    )
    train = [training_medium(number) for number in range(config.num_train)]
    questions = list(held_out(config.num_val))
    media = train + [medium for medium, _ in questions]
    absent = [medium for medium in media if not (config.output / medium.path).exists()]
    # spawned: forking a process that has threads may deadlock its child
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(_write_medium, config), absent, chunksize=8))
    captions = [caption_sample(medium) for medium in train]
    tuning = tuning_samples(config.seed, config.num_train)
    for name, samples in (("align", captions), ("tune", tuning)):
        text = json.dumps(samples, indent=1)
        write_atomically(config.output / f"{name}.json", text.encode())
    _write_questions(config.output, questions)


def _check_counts(config: DemoSet) -> None:
    if config.num_train < EXTRAS_EVERY:
        raise ValueError(f"num_train is {config.num_train}: {EXTRAS_EVERY} or more give every kind")
    whole = ROUND * len(HELD_OUT)
    if config.num_val < whole or config.num_val % whole:
        raise ValueError(
            f"num_val is {config.num_val}: answers are in equal shares at multiples of {whole}"
        )
    if config.size < 32 or config.size % 2:
        raise ValueError(f"size is {config.size}: give an even number of pixels, 32 or more")


def _write_questions(directory: Path, questions: list[tuple[Medium, str]]) -> None:
    """questions.jsonl, then answers.jsonl."""
    asked = []
    labels = []
    for number, (medium, category) in enumerate(questions):
        question, label = medium.ask(category)
        text = f"{question}\n{INSTRUCTION}"
        row = {"question_id": number, medium.kind: medium.path, "text": text, "category": category}
        asked.append(row)
        labels.append({"question_id": number, "label": label, "category": category})
    for name, rows in (("questions", asked), ("answers", labels)):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        write_atomically(directory / f"{name}.jsonl", lines.encode())
