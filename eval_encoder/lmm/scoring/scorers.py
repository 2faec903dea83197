"""Scores of a multimodal model's answers where the official annotations are at hand; no server.

    python -m eval_encoder.lmm.scoring.scorers BENCH --answers FILE --annotations PATH
        [--output FILE.json]

    BENCH       annotations                                answers are right if
    pope        folder of coco_pope_{random,popular,       yes and no agree; `no` or `not` in the
                adversarial}.json                          first sentence is no, else yes
    gqa         testdev_balanced_questions.json            equal, lower case, without a final dot
    sqa         folder of problems.json, pid_splits.json   the letter, see `option_letter`
    textvqa     TextVQA_0.5.1_val.json                     three annotators agree; soft
    seed        SEED-Bench.json                            the very letter
    seed_image  the same; its questions about images only
    mme         folder of the 14 tasks' .txt files         yes and no agree, see `leading_yes`

Answers are JSON lines {question_id, prompt, text, ...}, paired by id (answers.py). Peculiar
ids: POPE counts each file anew, so an id is `random/1`; MME's `task/picture` and TextVQA's image id
are shared by several questions, which the first line of the prompt tells apart. Figures are in
percent, MME's sums in points. `--confidence` adds 95 % intervals: questions are drawn anew within
their file, task or type. Cost: below a second, a few with intervals.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from eval_encoder.lmm.scoring.answers import (
    QUESTION,
    Answers,
    Kinds,
    by_id,
    checked,
    existing,
    normalise_answer,
    read_answers,
    read_jsonl,
    read_list,
    read_object,
)
from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.plain_text import printable
from model_factory.files import write_atomically

if TYPE_CHECKING:
    import numpy as np

POPE_FILES = ("random", "popular", "adversarial")
OPTIONS = "ABCDE"
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
MME_INSTRUCTION = "please answer yes or no."
RESAMPLINGS = 1000

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
    compare, summarise = SCORERS[benchmark]
    rows = read_answers(answers)
    outcomes = compare(rows, annotations)
    for group, values in outcomes.items():
        if not values:
            raise ValueError(f"{annotations} holds no question of {benchmark} ({group})")
    return Score(
        benchmark=benchmark,
        questions=len(rows.rows),
        figures=summarise(outcomes),
        intervals=_intervals(summarise, outcomes) if confidence else None,
    )


def says_yes(text: str) -> bool:
    """POPE's reading: no if the first sentence holds the word `no` or `not`, else yes."""
    words = re.findall(r"[a-z']+", text.partition(".")[0].lower())
    return not {"no", "not"} & set(words)


def compare_pope(answers: Answers, annotations: Path) -> Outcomes:
    """{file: [(said yes, is yes)]}"""
    labels: dict[str, str] = {}
    for name in POPE_FILES:
        path = annotations / f"coco_pope_{name}.json"
        rows = by_id(read_jsonl(path, QUESTION | {"label": str}), path)
        for number, row in rows.items():
            if row["label"] not in ("yes", "no"):
                raise ValueError(f"{path} id {number}: label {row['label']!r} is not yes or no")
            labels[f"{name}/{number}"] = row["label"]
    outcomes: Outcomes = {name: [] for name in POPE_FILES}
    for key, answer in zip(labels, answers.pair(list(labels)), strict=True):
        outcomes[key.partition("/")[0]].append((says_yes(answer["text"]), labels[key] == "yes"))
    return outcomes


def summarise_pope(outcomes: Outcomes) -> Figures:
    """`f1`, the mean of the three files', and of each file accuracy, precision, recall, f1 and the
    share of yes. Precision and recall of nothing are 0."""
    files: Figures = {}
    for name, pairs in outcomes.items():
        said = sum(says for says, _ in pairs)
        are = sum(is_yes for _, is_yes in pairs)
        hits = pairs.count((True, True))
        files |= {
            f"{name}_accuracy": _percent(one == other for one, other in pairs),
            f"{name}_precision": 100 * hits / max(1, said),
            f"{name}_recall": 100 * hits / max(1, are),
            f"{name}_f1": 200 * hits / max(1, said + are),
            f"{name}_yes": 100 * said / len(pairs),
        }
    return {"f1": sum(files[f"{name}_f1"] for name in outcomes) / len(outcomes)} | files


def compare_gqa(answers: Answers, annotations: Path) -> Outcomes:
    """{"all": [right]}"""
    questions = read_object(annotations, {})
    rights = []
    for number, answer in zip(questions, answers.pair(list(questions)), strict=True):
        question = checked(
            questions[number], kinds={"answer": str}, location=f"{annotations} id {number}"
        )
        rights.append(answer["text"].strip().lower().rstrip(".") == question["answer"])
    return {"all": rights}


def option_letter(text: str) -> str | None:
    """The option that ScienceQA's rule reads: `B`, `B. anything`, or one `The answer is B.`
    somewhere; None for all else."""
    text = text.strip()
    if text[:1] and text[0] in OPTIONS and text[1:3] in ("", ". "):
        return text[0]
    stated = re.findall(r"The answer is ([A-Z])\.", text)
    return stated[0] if len(stated) == 1 else None


def compare_sqa(answers: Answers, annotations: Path) -> Outcomes:
    """{"image": [right], "text": [right]} of the test split, by whether there is an image."""
    numbers = read_object(annotations / "pid_splits.json", {"test": list})["test"]
    path = annotations / "problems.json"
    problems = read_object(path, dict.fromkeys(numbers, dict))
    kinds: Kinds = {"answer": int, "image": (str, type(None))}
    outcomes: Outcomes = {"image": [], "text": []}
    for number, answer in zip(numbers, answers.pair(numbers), strict=True):
        problem = checked(problems[number], kinds=kinds, location=f"{path} id {number}")
        letter = option_letter(answer["text"])
        is_right = letter is not None and OPTIONS.find(letter) == problem["answer"]
        outcomes["image" if problem["image"] else "text"].append(is_right)
    return outcomes


def summarise_sqa(outcomes: Outcomes) -> Figures:
    """`image`, the published subset, and `all`."""
    return {"image": _percent(outcomes["image"]), "all": _percent(sum(outcomes.values(), []))}


def soft_accuracy(answer: str, references: list[str]) -> float:
    """min(1, agreeing annotators / 3), averaged over leaving one of them out: with ten, an answer
    that 0, 1, 2, 3, 4 of them gave scores 0, 0.3, 0.6, 0.9, 1."""
    answer = normalise_answer(answer)
    agreeing = [normalise_answer(reference) == answer for reference in references]
    total = sum(agreeing)
    return sum(min(1.0, (total - own) / 3) for own in agreeing) / len(agreeing)


def compare_textvqa(answers: Answers, annotations: Path) -> Outcomes:
    """{"all": [soft accuracy]}. LLaVA's question_id is the image's id, shared by several questions:
    the prompt's first line tells them apart, and answers to the same one are taken in order."""
    kinds = QUESTION | {"image_id": str, "question": str, "answers": list}
    rows = read_list(annotations, field="data", kinds=kinds)
    for row in rows:
        if len(row["answers"]) < 2:
            raise ValueError(f"{annotations} id {row['question_id']} has fewer than two annotators")
    asked = [(row["image_id"], _first_line(row["question"])) for row in rows]
    paired = answers.pair(asked, lambda row: (str(row["question_id"]), _first_line(row["prompt"])))
    pairs = zip(paired, rows, strict=True)
    return {"all": [soft_accuracy(answer["text"], row["answers"]) for answer, row in pairs]}


def summarise_accuracy(outcomes: Outcomes) -> Figures:
    """`accuracy` over all questions."""
    return {"accuracy": _percent(sum(outcomes.values(), []))}


def compare_seed(answers: Answers, annotations: Path, images_only: bool) -> Outcomes:
    """{"image_type_1": [right]} by kind of data and type of question, in the types' order."""
    kinds = QUESTION | {"answer": str, "data_type": str, "question_type_id": int}
    rows = read_list(annotations, field="questions", kinds=kinds)
    rows = [row for row in rows if row["data_type"] == "image" or not images_only]
    rows.sort(key=lambda row: row["question_type_id"])
    questions = by_id(rows, annotations)
    outcomes: Outcomes = {}
    for row, answer in zip(questions.values(), answers.pair(list(questions)), strict=True):
        group = outcomes.setdefault(f"{row['data_type']}_type_{row['question_type_id']}", [])
        group.append(answer["text"].strip() == row["answer"])
    return outcomes


def summarise_seed(outcomes: Outcomes) -> Figures:
    """`total` where there are both, `image`, `video`, and each type."""
    kinds: Outcomes = {}
    for group, values in outcomes.items():
        kinds.setdefault(group.partition("_")[0], []).extend(values)
    total = {"total": sum(kinds.values(), [])} if len(kinds) > 1 else {}
    return {name: _percent(values) for name, values in (total | kinds | outcomes).items()}


def leading_yes(text: str) -> bool | None:
    """MME's reading: whether `yes`, else `no`, is within the first four characters; None, which is
    never right, if neither is."""
    head = text.strip().lower()[:4]
    if "yes" in head:
        return True
    return False if "no" in head else None


def compare_mme(answers: Answers, annotations: Path) -> Outcomes:
    """{task: [(first right, second right)]}, one pair for each image."""
    truths = [row for task in TASKS for row in _mme_rows(annotations, task)]
    paired = answers.pair([key for key, _ in truths], _mme_key)
    pictures: dict[tuple[str, str], list[bool]] = {}
    for ((task, picture, _), truth), answer in zip(truths, paired, strict=True):
        pictures.setdefault((task, picture), []).append(leading_yes(answer["text"]) is truth)
    outcomes: Outcomes = {task: [] for task in TASKS}
    for (task, picture), rights in pictures.items():
        if len(rights) != 2:
            raise ValueError(f"{annotations}: {task}.txt asks {len(rights)}, not 2, of {picture}")
        outcomes[task].append(tuple(rights))
    return outcomes


def summarise_mme(outcomes: Outcomes) -> Figures:
    """Points of `perception` (of 2000) and `cognition` (of 800), which are the sums over tasks of
    `accuracy` and of `accuracy_plus`, the share of pictures with both questions right."""
    tasks: Figures = {}
    for task, pairs in outcomes.items():
        tasks[f"{task}_accuracy"] = _percent(right for pair in pairs for right in pair)
        tasks[f"{task}_accuracy_plus"] = _percent(map(all, pairs))
    sums = {
        name: sum(tasks[f"{task}_accuracy"] + tasks[f"{task}_accuracy_plus"] for task in part)
        for name, part in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return sums | tasks


def _mme_rows(annotations: Path, task: str) -> list[tuple[tuple[str, str, str], bool]]:
    """(key, is yes) of each question."""
    path = existing(annotations / f"{task}.txt")
    rows = []
    with open(path, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            cells = line.strip("\n").split("\t")
            if len(cells) != 3 or cells[2].strip().lower() not in ("yes", "no"):
                raise ValueError(f"{path} line {number}: {line!r} is no picture, question, Yes/No")
            answer = {"question_id": f"{task}/{cells[0]}", "prompt": cells[1]}
            rows.append((_mme_key(answer), cells[2].strip().lower() == "yes"))
    return rows


def _mme_key(row: dict) -> tuple[str, str, str]:
    """(task, picture, question); folders between task and picture do not count, nor whether the
    instruction was left out."""
    task, _, picture = str(row["question_id"]).partition("/")
    question = _first_line(row["prompt"]).removesuffix(MME_INSTRUCTION).strip()
    return task, picture.rpartition("/")[2], question


def _first_line(prompt: str) -> str:
    """A question as it is compared: the first line, lower case, single spaces."""
    return " ".join(prompt.strip().partition("\n")[0].lower().split())


def _percent(values: Iterable[float]) -> float:
    return 100 * fmean(values)


def _intervals(
    summarise: Callable[[Outcomes], Figures], outcomes: Outcomes
) -> dict[str, tuple[float, float]]:
    """95 % bounds of each figure when questions are drawn anew within their groups."""
    # numpy takes longer to import than figures without intervals take in all
    from eval_encoder.intervals import bootstrap_bounds

    def resampled(draw: "np.random.Generator") -> Figures:
        drawn = {}
        for group, values in outcomes.items():
            indices = draw.integers(0, len(values), len(values)).tolist()
            drawn[group] = [values[index] for index in indices]
        return summarise(drawn)

    return bootstrap_bounds(resampled, purpose="lmm interval", resamplings=RESAMPLINGS)


# how answers are compared with annotations, and how outcomes become figures
SCORERS: dict[str, tuple[Callable[[Answers, Path], Outcomes], Callable[[Outcomes], Figures]]] = {
    "pope": (compare_pope, summarise_pope),
    "gqa": (compare_gqa, summarise_accuracy),
    "sqa": (compare_sqa, summarise_sqa),
    "textvqa": (compare_textvqa, summarise_accuracy),
    "seed": (partial(compare_seed, images_only=False), summarise_seed),
    "seed_image": (partial(compare_seed, images_only=True), summarise_seed),
    "mme": (compare_mme, summarise_mme),
}


def format_table(result: Score) -> str:
    """One line for each figure, the headline first."""
    width = max(map(len, result.figures))
    lines = [f"{result.benchmark}: {result.questions} questions"]
    for name, value in result.figures.items():
        line = f"{printable(name):{width}} {value:8.2f}"
        if result.intervals is not None:
            low, high = result.intervals[name]
            line += f"{low:9.2f} .. {high:.2f}"
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
        write_atomically(args.output, (json.dumps(asdict(result), indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
