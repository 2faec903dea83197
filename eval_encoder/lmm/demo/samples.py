"""Samples of the demonstration set: attributes, captions, questions and answers.

Attributes follow from a medium's place by arithmetic, so that any answer is right as often as any
other; the order of a training medium's questions is drawn from (seed, index). Nothing here renders
or writes: see question_set.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
ROUND = 24  # places after which every colour, outline, motion and yes_no answer came equally often
EXTRAS_EVERY = 20  # training media for each sample of the two rarer kinds
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
OPPOSITES = {"hot": "cold", "day": "night", "big": "small", "old": "new", "up": "down"}
OPPOSITES |= {"left": "right", "first": "second", "yes": "no"}


@dataclass(frozen=True)
class Medium:
    """One image or clip. `kind` is image or video, `path` relative to the set, `index` the
    counter of its random draws, `place` the number that its attributes follow from.
    """

    kind: str
    path: str
    index: int
    place: int
    colour: str
    shape: str
    motion: str

    @property
    def caption(self) -> str:
        """The target text of stage 1."""
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
        from data_pipeline.motion_shapes import COLOURS

        if (self.place // len(COLOURS) + self.place // ROUND) % 2 == 0:
            return f"Is the shape {self.colour}?", "yes"
        names = list(COLOURS)
        step = 1 + self.place // len(names) % (len(names) - 1)
        asked = names[(names.index(self.colour) + step) % len(names)]
        return f"Is the shape {asked}?", "no"


def medium_at(kind: str, name: str, index: int, place: int) -> Medium:
    """The medium at a place. Attributes are in equal shares in every round of 24 places, and all
    144 combinations of them in every six rounds.
    """
    from data_pipeline.motion_shapes import CLASSES, COLOURS, OUTLINES

    path = f"images/{name}.png" if kind == "image" else f"clips/{name}.mp4"
    colour = tuple(COLOURS)[(place + place // ROUND) % len(COLOURS)]
    shape = tuple(OUTLINES.values())[place // len(CLASSES) % len(OUTLINES)]
    return Medium(
        kind=kind,
        path=path,
        index=index,
        place=place,
        colour=colour,
        shape=shape,
        motion=CLASSES[place % len(CLASSES)],
    )


def training_medium(number: int) -> Medium:
    """Three of every five are pictures; pictures and clips have places of their own."""
    five, within = divmod(number, 5)
    name = f"train_{number:05d}"
    if within < 3:
        return medium_at("image", name, number, 3 * five + within)
    return medium_at("video", name, number, 2 * five + within - 3)


def held_out(num_val: int) -> Iterator[tuple[Medium, str]]:
    """(medium, category) of every held-out question; each has a medium of its own."""
    for number in range(num_val):
        turn, within = divmod(number, len(HELD_OUT))
        kind, category = HELD_OUT[within]
        # directions come twice in HELD_OUT
        place = 2 * turn + within % 2 if category == "direction" else turn
        # indices apart from those of training, so that no random draw is shared
        index = (1 << 24) + number
        yield medium_at(kind, name=f"val_{number:05d}", index=index, place=place), category


def tuning_samples(seed: int, num_train: int) -> list[dict]:
    """All samples of stage 2."""
    extras = range(num_train // EXTRAS_EVERY)
    samples = [_dialogue(seed, number) for number in range(num_train)]
    samples += [_two_pictures(seed, number) for number in extras]
    samples += [_text_only(seed, number) for number in extras]
    return [{"id": f"tune_{i:05d}", **sample} for i, sample in enumerate(samples)]


def _dialogue(seed: int, number: int) -> dict:
    """All categories of a medium, one after the other, in an order of its own."""
    from data_pipeline.random import counter_rng

    medium = training_medium(number)
    asked = ASKED[medium.kind]
    order = counter_rng(seed, "lmm_demo_set", number).permutation(len(asked))
    rounds = [medium.ask(asked[place]) for place in order]
    return {medium.kind: medium.path, "conversations": _turns(f"<{medium.kind}>\n", rounds)}


def _two_pictures(seed: int, number: int) -> dict:
    """Two of twelve pictures, which differ in colour."""
    from data_pipeline.random import counter_rng

    rng = counter_rng(seed, "lmm_demo_set two pictures", number)
    media = [training_medium(EXTRAS_EVERY * number + i) for i in range(EXTRAS_EVERY) if i % 5 < 3]
    asked = media[rng.integers(len(media))]
    others = [medium for medium in media if medium.colour != asked.colour]
    pair = [asked, others[rng.integers(len(others))]]
    if number % 2:
        pair.reverse()
    question = f"Which picture shows the {asked.colour} shape, first or second?"
    answer = "second" if number % 2 else "first"
    turns = _turns("<image>\n<image>\n", [(question, answer)])
    return {"image": [medium.path for medium in pair], "conversations": turns}


def _text_only(seed: int, number: int) -> dict:
    from data_pipeline.random import counter_rng

    rng = counter_rng(seed, "lmm_demo_set text", number)
    if number % 2:
        word = list(OPPOSITES)[rng.integers(len(OPPOSITES))]
        question = f"What is the opposite of {word}?"
        return {"conversations": _turns("", [(question, OPPOSITES[word])])}
    # neither is above four, so that their sum has a word
    left, right = rng.integers(0, len(NUMBERS) // 2 + 1, 2).tolist()
    question = f"What is {NUMBERS[left]} plus {NUMBERS[right]}?"
    return {"conversations": _turns("", [(question, NUMBERS[left + right])])}


def _turns(placeholders: str, rounds: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """LLaVA's conversation; placeholders of the media stand before the first question."""
    turns: list[dict[str, str]] = []
    for question, answer in rounds:
        text = f"{question}\n{INSTRUCTION}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = placeholders + turns[0]["value"]
    return turns


def caption_sample(medium: Medium) -> dict:
    """The sample of stage 1."""
    turns = [{"from": "human", "value": f"<{medium.kind}>"}]
    turns += [{"from": "gpt", "value": medium.caption}]
    return {"id": Path(medium.path).stem, medium.kind: medium.path, "conversations": turns}
