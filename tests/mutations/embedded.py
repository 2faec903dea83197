"""Mutations of the labelled sets that the product makes itself: data_pipeline/embedded."""

from .mutant import Mutant

BRIEF = "data_pipeline/embedded/brief_events.py"
TEMPO = "data_pipeline/embedded/tempo.py"

EMBEDDED = (
    Mutant(
        name="order-without-dark-middle",
        file=BRIEF,
        old="if 2 * step == duration - 1:",
        new="if 2 * step == -1:",
        why="at odd durations the first colour is shown for longer: counting tells the class",
        tests=("data_pipeline/embedded/test_brief_events.py",),
    ),
    Mutant(
        name="dart-always-in-the-middle",
        file=BRIEF,
        old="row = step if along_y > 0 else duration - 1 - step",
        new="row = row if along_y > 0 else duration - 1 - step",
        why="a dart downwards does not move",
        tests=("data_pipeline/embedded/test_brief_events.py",),
    ),
    Mutant(
        name="one-frame-twice-is-two",
        file=BRIEF,
        old="for frame in event.frames:\n        in_columns",
        new="for frame in (*event.frames, *event.frames):\n        in_columns",
        why="one frame of a dart passes for its direction",
        tests=("data_pipeline/embedded/test_brief_events.py",),
    ),
    Mutant(
        name="gap-not-needed",
        file=BRIEF,
        old='if CLASSES[event.label] == "two_blinks":\n        needed.add(DARK)',
        new='if CLASSES[event.label] == "two_blinks":\n        needed.add(FIRST)',
        why="two blinks without the gap are taken for decidable",
        tests=("data_pipeline/embedded/test_brief_events.py",),
    ),
    Mutant(
        name="freeze-leaves-frames-out",
        file=TEMPO,
        old="np.maximum(np.minimum(order, at), order - (FROZEN - 1))",
        new="np.where((at <= order) & (order < at + FROZEN), at, order)",
        why="a freeze is a jump too",
        tests=("data_pipeline/embedded/test_tempo.py",),
    ),
    Mutant(
        name="window-judged-with-frame-before",
        file=TEMPO,
        old="sliding_window_view(changes[1:], WINDOW - 1)[:count]",
        new="sliding_window_view(changes, WINDOW - 1)[:count]",
        why="windows that begin at a cut are lost, those that end with one are used",
        tests=("data_pipeline/embedded/test_tempo.py",),
    ),
    Mutant(
        name="foreign-from-own-source",
        file=TEMPO,
        old="others = [other for other, _ in ordered if other is not source]",
        new="others = [other for other, _ in ordered]",
        why="frames of the same footage are called foreign",
        tests=("data_pipeline/embedded/test_tempo.py",),
    ),
    Mutant(
        name="named-sides-fall-back-to-the-hash",
        file=TEMPO,
        old="    if val_inputs is not None:\n        validating",
        new="    if val_inputs:\n        validating",
        why="--val with nothing usable is ignored",
        tests=("data_pipeline/embedded/test_tempo.py",),
    ),
)
