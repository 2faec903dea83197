"""Published figures to show beside ours, never mixed with them.

Top-1 in percent of frozen large encoders under the attentive probe of the OneVision-Encoder paper
and site (February 2026), 8 or 16 frames, codec input of 2048 or 4096 patches. Their protocol picks
the best epoch on the validation list and evaluated about two thirds of it, with one seed; baselines
moved by up to 17 points between two of its tables (MetaCLIP2 on Diving48). Ours are not comparable
to the digit.
"""

from dataclasses import dataclass

SOURCE = "OneVision-Encoder paper and site, February 2026"
COLUMNS = (
    "ssv2", "diving48", "perception_test", "charadesego", "epic_verb", "epic_noun", "k400",
    "hmdb51",
)  # fmt: skip
# Frames of L/14 at 224 and of p16 at 256 px have 256 tokens, of p16 at 224 px 196. The table of
# token budgets, up to 1024, has two data sets.
TABLE = """
SigLIP2 L/16   | 2 frames  |  512 |    -  28.1  38.7     -     -     -     -     -
OV-Encoder     | codec     |  512 |    -  46.5  50.5     -     -     -     -     -
SigLIP2 L/16   | 4 frames  | 1024 |    -  48.7  50.1     -     -     -     -     -
OV-Encoder     | codec     | 1024 |    -  54.9  58.6     -     -     -     -     -
MetaCLIP2 L/14 | 8 frames  | 2048 | 47.2  48.0  47.7  11.0  48.0  40.9  82.4  76.3
AIMv2 L/14     | 8 frames  | 2048 | 55.1  43.6  55.1  12.0  56.6  45.6  81.1  81.3
DINOv3 L/16    | 8 frames  | 1568 | 57.4  58.6  59.3  13.2  62.5  51.7  82.9  78.6
SigLIP2 L/16   | 8 frames  | 2048 | 52.6  50.1  52.7  11.6  54.2  43.8  80.9  79.1
OV-Encoder     | 8 frames  | 2048 | 57.7  57.6  58.3  12.1  61.4  52.5  84.3  83.1
OV-Encoder     | codec     | 2048 | 58.5  67.2  60.0  12.3  62.3  53.9  84.4  83.4
MetaCLIP2 L/14 | 16 frames | 4096 | 49.3  42.1  51.1  11.2  49.2  43.2  84.0  78.2
AIMv2 L/14     | 16 frames | 4096 | 57.2  55.7  56.4  12.4  58.3  46.2  82.2  82.6
DINOv3 L/16    | 16 frames | 3136 | 58.3  61.3  60.8  14.0  63.2  51.9  83.9  79.7
SigLIP2 L/16   | 16 frames | 4096 | 58.2  56.7  53.3  11.9  56.4  45.2  82.7  81.2
OV-Encoder     | 16 frames | 4096 | 58.7  63.2  60.3  12.6  62.9  54.5  85.1  81.6
OV-Encoder     | codec     | 4096 | 60.1  69.4  60.9  12.9  63.3  54.4  85.4  85.3
"""


@dataclass(frozen=True)
class Anchor:
    """One published row: encoder, its input, tokens per clip, and top-1 by data set."""

    encoder: str
    input: str
    tokens: int
    values: dict[str, float]


def anchors() -> list[Anchor]:
    """The rows of the table."""
    rows = []
    for line in TABLE.strip().splitlines():
        encoder, input_name, tokens, figures = (cell.strip() for cell in line.split("|"))
        pairs = zip(COLUMNS, figures.split(), strict=True)
        values = {dataset: float(figure) for dataset, figure in pairs if figure != "-"}
        rows.append(Anchor(encoder, input_name, tokens=int(tokens), values=values))
    return rows
