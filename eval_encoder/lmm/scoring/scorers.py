"""Scores of a multimodal model's answers where the official annotations are at hand; no server.

    python -m eval_encoder.lmm.scoring.scorers BENCH --answers FILE --annotations PATH
        [--output FILE.json]

    BENCH       annotations                                answers are right if
    pope        folder of coco_pope_{random,popular,       yes and no agree; `no` or `not` in the
                adversarial}.json                          first sentence is no, else yes
    gqa         testdev_balanced_questions.json            equal, lower case, without a final dot
    sqa         folder of problems.json, pid_splits.json   the letter, see `option_letter`
    textvqa     TextVQA_0.5.1_val.json                     three annotators agree; soft
    seed        SEED-Bench.json                            exactly the letter
    seed_image  the same; its questions about images only
    mme         folder of the 14 tasks' .txt files         yes and no agree, see `leading_yes`

Answers are JSON lines {question_id, prompt, text, ...}, paired by id (answers.py). Peculiar ids:
POPE numbers each file from 1, so an id is `random/1`; MME's `task/image` and TextVQA's image id are
shared by several questions, which the first line of the prompt tells apart. Figures are in percent,
MME's sums in points. `--confidence` adds 95 % intervals: questions are resampled within their file,
task or type. Cost: below a second, a few with intervals.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from eval_encoder.lmm.scoring.answers import (
    QUESTION,
    Answers,
    Fields,
    by_id,
    checked,
    existing,
    normalise_answer,
    question_id,
    read_annotation_list,
    read_annotations,
    read_answers,
    read_lines,
)
from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.plain_text import printable
from model_factory.files import write_atomically

if TYPE_CHECKING:
    import numpy as np

POPE_FILES = ("random", "popular", "adversarial")
OPTIONS = "ABCDE"  # a question of ScienceQA has at most five
# MME's own division of its tasks, which the two sums follow
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
MME_INSTRUCTION = "please answer yes or no."  # the end of each official question, lower case
RESAMPLINGS = 1000  # 25 of them lie beyond each bound

Outcomes = dict[str, list]  # group of questions -> outcome of each, as its scorer defines it
Figures = dict[str, float]


@dataclass(frozen=True)
class Score:
    """Figures of one answers file, in percent (MME's sums in points), the headline first.
    `intervals` {figure: (low, high)}, 95 %, where they were asked for."""

    benchmark: str
    questions: int
    figures: Figures
    intervals: dict[str, tuple[float, float]] | None = None


def score(benchmark: str, answers: Path, annotations: Path, confidence: bool = False) -> Score:
    """Score one answers file. ValueError for files that are absent, damaged or do not belong
    together, and for an unknown benchmark."""
    if benchmark not in SCORERS:
        raise ValueError(f"unknown benchmark {benchmark!r}: choose one of {', '.join(SCORERS)}")
    evaluate, summarise = SCORERS[benchmark]
    given = read_answers(answers)
    outcomes = evaluate(given, annotations)
    for group, values in outcomes.items():
        if not values:
            raise ValueError(f"{annotations} holds no question of {benchmark} ({group})")
    return Score(
        benchmark=benchmark,
        questions=len(given.rows),
        figures=summarise(outcomes),
        intervals=_intervals(summarise, outcomes) if confidence else None,
    )


def says_yes(text: str) -> bool:
    """POPE's reading: no if the first sentence holds the word `no` or `not`, else yes."""
    sentence = text.partition(".")[0]
    words = re.findall(r"[a-z']+", sentence.lower())
    return not {"no", "not"} & set(words)


def evaluate_pope(answers: Answers, annotations: Path) -> Outcomes:
    """{file: [(answer is yes, label is yes)]}"""
    labels: dict[str, bool] = {}
    for name in POPE_FILES:
        path = annotations / f"coco_pope_{name}.json"
        rows = by_id(read_lines(path, {**QUESTION, "label": str}), path)
        for number, row in rows.items():
            if row["label"] not in ("yes", "no"):
                raise ValueError(f"{path} id {number}: label {row['label']!r} is not yes or no")
            labels[f"{name}/{number}"] = row["label"] == "yes"
    outcomes: Outcomes = {name: [] for name in POPE_FILES}
    for key, answer in zip(labels, answers.pair(list(labels)), strict=True):
        name = key.partition("/")[0]
        is_yes = says_yes(answer["text"])
        outcomes[name].append((is_yes, labels[key]))
    return outcomes


def summarise_pope(outcomes: Outcomes) -> Figures:
    """`f1`, the mean of the three files', and of each file accuracy, precision, recall, f1 and the
    share of yes. Precision and recall of nothing are 0."""
    files: Figures = {}
    for name, pairs in outcomes.items():
        answered = sum(answer for answer, _ in pairs)
        positive = sum(label for _, label in pairs)
        hits = pairs.count((True, True))
        files |= {
            f"{name}_accuracy": _percent(answer == label for answer, label in pairs),
            f"{name}_precision": 100 * hits / max(1, answered),
            f"{name}_recall": 100 * hits / max(1, positive),
            f"{name}_f1": 200 * hits / max(1, answered + positive),
            f"{name}_yes": 100 * answered / len(pairs),
        }
    f1 = fmean(files[f"{name}_f1"] for name in outcomes)
    return {"f1": f1} | files


def evaluate_gqa(answers: Answers, annotations: Path) -> Outcomes:
    """{"all": [right]}"""
    questions = read_annotations(annotations, {})
    rights = []
    for number, answer in zip(questions, answers.pair(list(questions)), strict=True):
        name = f"{annotations} id {number}"
        question = checked(questions[number], fields={"answer": str}, name=name)
        text = answer["text"].strip().lower()
        rights.append(text.rstrip(".") == question["answer"])
    return {"all": rights}


def option_letter(text: str) -> str | None:
    """The option that ScienceQA's rule reads: `B`, `B. anything`, or one `The answer is B.`
    somewhere; None for all else."""
    text = text.strip()
    begins_with_option = bool(text) and text[0] in OPTIONS
    if begins_with_option and text[1:3] in ("", ". "):
        return text[0]
    stated = re.findall(r"The answer is ([A-Z])\.", text)
    return stated[0] if len(stated) == 1 else None


def evaluate_sqa(answers: Answers, annotations: Path) -> Outcomes:
    """{"image": [right], "text": [right]} of the test split, by whether a question has an image."""
    numbers = read_annotations(annotations / "pid_splits.json", {"test": list})["test"]
    path = annotations / "problems.json"
    problems = read_annotations(path, dict.fromkeys(numbers, dict))
    outcomes: Outcomes = {"image": [], "text": []}
    for number, answer in zip(numbers, answers.pair(numbers), strict=True):
        problem = checked(
            problems[number],
            fields={"answer": int, "image": (str, type(None))},
            name=f"{path} id {number}",
        )
        # -1, which is never right, for an answer without an option
        option = OPTIONS.find(option_letter(answer["text"]) or "none")
        group = "image" if problem["image"] else "text"
        outcomes[group].append(option == problem["answer"])
    return outcomes


def summarise_sqa(outcomes: Outcomes) -> Figures:
    """`image`, the published subset, and `all`."""
    return {"image": _percent(outcomes["image"]), "all": _percent(_all_values(outcomes))}


def soft_accuracy(answer: str, references: list[str]) -> float:
    """min(1, agreeing annotators / 3), averaged over leaving one of them out: with ten, an answer
    that 0, 1, 2, 3, 4 of them gave scores 0, 0.3, 0.6, 0.9, 1."""
    answer = normalise_answer(answer)
    agreeing = [normalise_answer(reference) == answer for reference in references]
    total = sum(agreeing)
    # without each annotator in turn: one who agrees is missing among the agreeing
    scores = [min(1.0, (total - own) / 3) for own in agreeing]
    return sum(scores) / len(agreeing)


def evaluate_textvqa(answers: Answers, annotations: Path) -> Outcomes:
    """{"all": [soft accuracy]}. LLaVA's question_id is the image's id, shared by several questions:
    the prompt's first line tells them apart, and answers to the same one are taken in order."""
    fields: Fields = {**QUESTION, "image_id": str, "question": str, "answers": list}
    rows = read_annotation_list(annotations, key="data", fields=fields)
    for row in rows:
        # soft accuracy leaves one annotator out, and needs another
        if len(row["answers"]) < 2:
            raise ValueError(f"{annotations} id {row['question_id']} has fewer than two annotators")
    paired = answers.pair(
        [(row["image_id"], _first_line(row["question"])) for row in rows],
        key_of=lambda answer: (question_id(answer), _first_line(answer["prompt"])),
    )
    pairs = zip(paired, rows, strict=True)
    accuracies = [soft_accuracy(answer["text"], row["answers"]) for answer, row in pairs]
    return {"all": accuracies}


def summarise_accuracy(outcomes: Outcomes) -> Figures:
    """`accuracy` over all questions."""
    return {"accuracy": _percent(_all_values(outcomes))}


def evaluate_seed(answers: Answers, annotations: Path, images_only: bool) -> Outcomes:
    """{"image_type_1": [right]} by kind of data and type of question, in the types' order."""
    fields: Fields = {**QUESTION, "answer": str, "data_type": str, "question_type_id": int}
    rows = read_annotation_list(annotations, key="questions", fields=fields)
    rows = [row for row in rows if row["data_type"] == "image" or not images_only]
    # a stable sort: questions of a type keep the order of the file
    rows.sort(key=lambda row: row["question_type_id"])
    questions = by_id(rows, annotations)
    outcomes: Outcomes = defaultdict(list)
    for row, answer in answers.with_questions(questions):
        group = f"{row['data_type']}_type_{row['question_type_id']}"
        outcomes[group].append(answer["text"].strip() == row["answer"])
    return outcomes


def summarise_seed(outcomes: Outcomes) -> Figures:
    """`total` where there are both, `image`, `video`, and each type."""
    kinds: Outcomes = defaultdict(list)
    for group, values in outcomes.items():
        kinds[group.partition("_")[0]] += values
    groups = {**kinds, **outcomes}
    if len(kinds) > 1:
        groups = {"total": _all_values(kinds), **groups}
    return {name: _percent(values) for name, values in groups.items()}


def leading_yes(text: str) -> bool | None:
    """MME's reading: whether `yes`, else `no`, is within the first four characters; None, which is
    never right, if neither is."""
    head = text.strip().lower()[:4]
    if "yes" in head:
        return True
    return False if "no" in head else None


def evaluate_mme(answers: Answers, annotations: Path) -> Outcomes:
    """{task: [(first right, second right)]}, one pair for each image."""
    labels = [row for task in TASKS for row in _mme_rows(annotations, task)]
    paired = answers.pair([key for key, _ in labels], key_of=_mme_key)
    images: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for ((task, image, _), label), answer in zip(labels, paired, strict=True):
        images[task, image].append(leading_yes(answer["text"]) is label)
    outcomes: Outcomes = {task: [] for task in TASKS}
    for (task, image), rights in images.items():
        if len(rights) != 2:
            raise ValueError(f"{annotations}: {task}.txt asks {len(rights)}, not 2, of {image}")
        outcomes[task].append(tuple(rights))
    return outcomes


def summarise_mme(outcomes: Outcomes) -> Figures:
    """Points of `perception` (of 2000) and `cognition` (of 800), which are the sums over tasks of
    `accuracy` and of `accuracy_plus`, the share of images with both questions right."""
    tasks: Figures = {}
    for task, pairs in outcomes.items():
        tasks[f"{task}_accuracy"] = _percent(right for pair in pairs for right in pair)
        tasks[f"{task}_accuracy_plus"] = _percent(map(all, pairs))

    def points(names: tuple[str, ...]) -> float:
        sums = [tasks[f"{task}_accuracy"] + tasks[f"{task}_accuracy_plus"] for task in names]
        return sum(sums)

    return {"perception": points(PERCEPTION), "cognition": points(COGNITION), **tasks}


def _mme_rows(annotations: Path, task: str) -> Iterator[tuple[tuple[str, str, str], bool]]:
    """(key, label is yes) of each question of a task."""
    path = existing(annotations / f"{task}.txt")
    with open(path, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            cells = line.strip("\n").split("\t")
            # [-1], as a damaged line may have no third cell
            label = cells[-1].strip().lower()
            if len(cells) != 3 or label not in ("yes", "no"):
                raise ValueError(f"{path} line {number}: {line!r} is no image, question, Yes/No")
            # as a row of answers, so that both sides have their key by one rule
            image, question = cells[:2]
            key = _mme_key({"question_id": f"{task}/{image}", "prompt": question})
            yield key, label == "yes"


def _mme_key(row: dict) -> tuple[str, str, str]:
    """(task, image, question); folders between task and image do not count, nor whether the
    instruction was left out."""
    task, _, image = question_id(row).partition("/")
    question = _first_line(row["prompt"]).removesuffix(MME_INSTRUCTION).strip()
    return task, image.rpartition("/")[2], question


def _first_line(prompt: str) -> str:
    """A question as it is compared: the first line, lower case, single spaces."""
    # further lines hold instructions and OCR tokens, which are the prompt's and no annotation's
    first = prompt.strip().partition("\n")[0]
    return " ".join(first.lower().split())


def _percent(values: Iterable[float]) -> float:
    return 100 * fmean(values)


def _all_values(outcomes: Outcomes) -> list:
    return [value for values in outcomes.values() for value in values]


def _intervals(
    summarise: Callable[[Outcomes], Figures], outcomes: Outcomes
) -> dict[str, tuple[float, float]]:
    """95 % bounds of each figure when questions are resampled within their groups."""
    # numpy takes longer to import than figures without intervals take in all
    from eval_encoder.intervals import bootstrap_bounds

    def resampled(rng: "np.random.Generator") -> Figures:
        drawn = {}
        for group, values in outcomes.items():
            indices = rng.integers(0, len(values), len(values)).tolist()
            drawn[group] = [values[index] for index in indices]
        return summarise(drawn)

    return bootstrap_bounds(resampled, purpose="lmm interval", resamplings=RESAMPLINGS)


# {benchmark: (how answers are compared with annotations, how outcomes become figures)}
SCORERS: dict[str, tuple[Callable[[Answers, Path], Outcomes], Callable[[Outcomes], Figures]]] = {
    "pope": (evaluate_pope, summarise_pope),
    "gqa": (evaluate_gqa, summarise_accuracy),
    "sqa": (evaluate_sqa, summarise_sqa),
    "textvqa": (evaluate_textvqa, summarise_accuracy),
    "seed": (partial(evaluate_seed, images_only=False), summarise_seed),
    "seed_image": (partial(evaluate_seed, images_only=True), summarise_seed),
    "mme": (evaluate_mme, summarise_mme),
}


def format_table(result: Score) -> str:
    """One line for each figure, the headline first."""
    width = max(map(len, result.figures))
    lines = [f"{result.benchmark}: {result.questions} questions"]
    for name, value in result.figures.items():
        line = f"{printable(name):{width}} {value:8.2f}"
        if result.intervals is not None:
            lower, upper = result.intervals[name]
            line += f"{lower:9.2f} .. {upper:.2f}"
        lines.append(line)
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.lmm.scoring.scorers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", choices=SCORERS, metavar="BENCH", help=", ".join(SCORERS))
    parser.add_argument("--answers", type=Path, required=True, help="JSON lines of a model")
    parser.add_argument("--annotations", type=Path, required=True, help="official, see above")
    parser.add_argument("--output", type=output_path, help="write the figures as JSON too")
    parser.add_argument("--confidence", action="store_true", help="add 95 %% intervals")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the figures of one answers file; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_score, argv=argv)


def _score(args: argparse.Namespace) -> None:
    result = score(
        args.benchmark,
        answers=args.answers,
        annotations=args.annotations,
        confidence=args.confidence,
    )
    print(format_table(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(result), indent=2)
        write_atomically(args.output, f"{text}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
