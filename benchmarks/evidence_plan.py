"""What the experiment on evidence consists of: sets, inputs, budgets, seeds, and the hypotheses.

A cell is one training of one encoder from random weights: a set, an input, a budget of tokens and a
seed. All cells have the same encoder, recipe and number of steps; what differs is what is seen of a
clip. docs/evidence.md says what was expected before the first cell ran.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

SETS = ("brief_events", "motion_shapes", "tempo")
BUDGETS = (49, 98, 196, 392)  # tokens of a clip: 1, 2, 4 and 8 whole frames
SEEDS = (1, 2, 3)
SIZE = 112  # pixels
FRAME_TOKENS = (SIZE // 16) ** 2
NUM_FRAMES = 64  # of a clip
# One I-frame of a clip takes the whole smallest budget: there half of its patches are taken.
HALF_I_FRAME = FRAME_TOKENS


@dataclass(frozen=True)
class Frames:
    """Whole frames at even times: how many, the scale of their sides, and how many to a token."""

    count: int
    scale: float = 1.0
    per_token: int = 1  # successive frames that one token holds

    @property
    def tokens(self) -> int:
        """Tokens of a clip."""
        side = round(SIZE // 16 * self.scale)
        return self.count // self.per_token * side**2


# Dense frames at low resolution: 32 px, or 48 px where all 64 frames of 32 px leave tokens over.
SMALL_FRAMES = {
    49: Frames(12, 2 / 7),
    98: Frames(24, 2 / 7),
    196: Frames(49, 2 / 7),
    392: Frames(43, 3 / 7),
}
# Inputs whose patches are selected: input -> flags of `pack`
SELECTED = {
    "codec": {},
    "codec clipped": {"--score": "clipped"},
    "codec mean": {"--score": "mean"},
    "codec residual": {"--motion-weight": "0"},
    "codec bits": {"--score": "bits"},
    "published": {"--rule": "published"},
    "differences": {"--rule": "differences"},
    "I-frame and random": {"--rule": "i_frames_random"},
    "random": {"--rule": "random"},
}
STORED_BY = "codec"  # the packing that stores all frames whole, which costs half of its time
WITHOUT_I_FRAME = ("published", "random")
TUBE = 2  # frames in a token, as video encoders of tubes have it
INPUTS = ("frames", "low resolution", "tubes", *SELECTED)
# What is compared by default; the other scores are there for `--inputs`.
RIVALS = (
    *("frames", "low resolution", "tubes", "codec", "published", "differences"),
    *("I-frame and random", "random"),
)


@dataclass(frozen=True)
class Cell:
    """One training: a set, an input, tokens of a clip, and the seed of weights and order."""

    dataset: str
    input: str
    budget: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.dataset}-{self.input.replace(' ', '_')}-{self.budget}-{self.seed}"

    @property
    def frames(self) -> Frames | None:
        """The whole frames that are seen; None where patches are selected."""
        if self.input == "frames":
            return Frames(self.budget // FRAME_TOKENS)
        if self.input == "tubes":
            return Frames(TUBE * (self.budget // FRAME_TOKENS), per_token=TUBE)
        return SMALL_FRAMES[self.budget] if self.input == "low resolution" else None

    @property
    def tokens(self) -> int:
        """Tokens that are seen of a clip."""
        return self.budget if self.frames is None else self.frames.tokens

    @property
    def packing(self) -> "Packing":
        """The packing that it reads."""
        if self.frames is not None:
            return Packing(self.dataset, STORED_BY, is_half=False)
        is_half = self.budget <= HALF_I_FRAME and self.input not in WITHOUT_I_FRAME
        return Packing(self.dataset, self.input, is_half)


@dataclass(frozen=True)
class Packing:
    """A set packed by one selection; `is_half`: half of the I-frame's patches are taken."""

    dataset: str
    input: str
    is_half: bool

    @property
    def name(self) -> str:
        """Name of its folder."""
        half = "-half" if self.is_half else ""
        return f"{self.dataset}-{self.input.replace(' ', '_')}{half}"

    @property
    def flags(self) -> list[str]:
        """Flags of `pack` beside its inputs."""
        stores_all = self.input == STORED_BY and not self.is_half
        flags = {
            "--size": str(SIZE),
            "--gop": str(NUM_FRAMES),
            "--budget": str(HALF_I_FRAME if self.is_half else max(BUDGETS)),
            "--full-frames": str(NUM_FRAMES if stores_all else 1),
            **SELECTED[self.input],
        }
        if self.is_half:
            flags["--i-frame-share"] = "0.5"
        return [word for pair in flags.items() for word in pair]


def cells(
    datasets: tuple[str, ...],
    inputs: tuple[str, ...],
    budgets: tuple[int, ...],
    seeds: tuple[int, ...],
) -> Iterator[Cell]:
    """All cells, one seed after the other: whatever ends a run early, what is there is whole."""
    for seed, budget, dataset, name in product(seeds, budgets, datasets, inputs):
        yield Cell(dataset, name, budget=budget, seed=seed)


@dataclass(frozen=True)
class Group:
    """Some of a set's clips: those whose `factor` lies in [low, high], or all of them."""

    name: str
    factor: str = ""
    low: float = 0.0
    high: float = float("inf")

    def holds(self, facts: dict) -> bool:
        """Whether a clip of these facts (a line of events.jsonl) belongs to it."""
        return not self.factor or self.low <= facts[self.factor] <= self.high


ALL = Group("all")
SHORT = Group("at most 8 frames", "duration", 0, 8)
LONG = Group("16 or 32 frames", "duration", 16, 64)
SMALL = Group("radius 2 to 4", "radius", 0, 4)
LARGE = Group("radius above 4", "radius", 4, 64)
GROUPS = {
    "brief_events": (ALL, SHORT, LONG, SMALL, LARGE),
    "motion_shapes": (ALL,),
    "tempo": (ALL,),
}


NEGLIGIBLE = 5.0  # points of accuracy; a choice, made before the first cell was published


@dataclass(frozen=True)
class Hypothesis:
    """What was expected of the difference codec - rival on a group of clips at a budget.

    expected: more (the interval of the difference lies above 0), or not more (it ends below
    NEGLIGIBLE, so that a gain worth having is ruled out, and not merely unseen).
    """

    text: str
    dataset: str
    rival: str
    budget: int
    group: Group
    expected: str


HYPOTHESES = (
    Hypothesis(
        "codec beats uniform frames where the event is shorter than the spacing of the frames",
        "brief_events", "frames", 98, SHORT, "more",
    ),
    Hypothesis(
        "the gain vanishes where the event lasts longer than the spacing of the frames",
        "brief_events", "frames", 392, LONG, "not more",
    ),
    Hypothesis(
        "the gain vanishes as tokens grow",
        "brief_events", "frames", 392, ALL, "not more",
    ),
    Hypothesis(
        "codec beats dense frames at low resolution where the object is small",
        "brief_events", "low resolution", 98, SMALL, "more",
    ),
    Hypothesis(
        "and only there",
        "brief_events", "low resolution", 98, LARGE, "not more",
    ),
    Hypothesis(
        "no gain where motion fills the whole clip",
        "motion_shapes", "frames", 98, ALL, "not more",
    ),
)  # fmt: skip
