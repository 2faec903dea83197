"""Answers of a multimodal model: how they are read and paired, and what evaluation servers take.

    python -m eval_encoder.lmm.scoring.answers FORMAT --answers FILE --questions FILE --output FILE

Answers are JSON lines {question_id, prompt, text, answer_id, model_id, metadata}. They are paired
with questions by id, never by order; an id that is missing, doubled or foreign is an error.

    FORMAT      questions                      output
    vqav2       JSON lines {question_id}       JSON list of {question_id, answer}; the server takes
                                               files that answer all questions of test2015
    vizwiz      JSON lines {question_id, image}
                                               JSON list of {image, answer}
    mmbench     the official .tsv              its columns without the images, and `prediction`:
                                               .tsv, or .xlsx where openpyxl is installed
    mmvet       JSON lines {question_id}       JSON object {"v1_ID": text}
    llavabench  JSON lines {question_id}       the answers in the questions' order: the judge reads
                                               both files line by line

Answers for vqav2 and vizwiz are normalised as the server does it, see `normalise_answer`. Cost:
all files are held in memory, MMBench's without its images.
"""

import argparse
import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.reading import names_place
from model_factory.files import DamagedFile, check_fields, json_lines, parse_json, write_atomically

Fields = Mapping[str, type | tuple[type, ...]]  # {field that must be there: its type or types}

ID = (str, int)
QUESTION: Fields = {"question_id": ID}
ANSWER: Fields = {**QUESTION, "prompt": str, "text": str}
JUDGED: Fields = {**ANSWER, "answer_id": ID, "model_id": str, "metadata": dict}
EXAMPLES = 3  # ids that an error names
LONGEST_FIELD = 2**31 - 1  # bytes; MMBench holds images as text, the csv module allows 128 KiB

# the lists of VQA's evaluation (vqaEval.py), which servers and LLaVA's scripts share
ARTICLES = {"a", "an", "the"}
WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(value) for value, word in enumerate(WORDS)} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`!'  # comma and question mark are removed before
FULL_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
you've
""".split()  # none that is another word without its apostrophe, as we'll is
# {with any one apostrophe left out: full}
CONTRACTIONS = {
    full[:index] + full[index + 1 :]: full
    for full in FULL_CONTRACTIONS
    for index, letter in enumerate(full)
    if letter == "'"
}


def normalise_answer(text: str) -> str:
    """An answer as VQA's evaluation compares it (VQAv2, VizWiz, TextVQA).

    Lower case; no comma, question mark or article, no period but in front of a digit; `'s` a word
    of its own; zero to ten and none as digits; a left-out apostrophe put back. Other punctuation
    becomes a space, or nothing where the same sign stands beside a space anywhere in the answer.
    """
    text = text.lower().replace(",", "").replace("?", "")
    text = text.replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    for sign in PUNCTUATION:
        # looked up in `text`: signs that were replaced before must not change the rule for others
        beside_space = f"{sign} " in text or f" {sign}" in text
        bare = bare.replace(sign, "" if beside_space else " ")
    # a period in front of a digit belongs to a number
    without_periods = re.sub(r"\.(?!\d)", "", bare)
    words = [NUMBERS.get(word, word) for word in without_periods.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def question_id(row: dict) -> str:
    """The id of a question or an answer as text: 7 and "7" are the same question."""
    return str(row["question_id"])


@dataclass(frozen=True)
class Answers:
    """The rows of an answers file."""

    path: Path
    rows: list[dict]

    def pair(
        self, asked: Sequence[Hashable], key_of: Callable[[dict], Hashable] = question_id
    ) -> list[dict]:
        """The answer to each question, in the order of `asked`.

        asked: keys of the questions. key_of: gives the key of an answer. A key may be asked several
        times where the very same prompt is: its answers are then taken in their order. ValueError
        unless every question is answered exactly once and nothing else is.
        """
        questions = Counter(asked)
        answered = Counter(map(key_of, self.rows))
        more = answered - questions
        problems = {
            "missing (asked, not answered)": list(questions - answered),
            "doubled (answered more often than asked)": [key for key in more if key in questions],
            "foreign (answered, not asked)": [key for key in more if key not in questions],
        }
        found = {name: keys for name, keys in problems.items() if keys}
        listed = [f"{len(keys)} {name}: {_some(keys)}" for name, keys in found.items()]
        if listed:
            raise ValueError(
                f"{self.path} does not answer each of {len(asked)} questions once. Ids "
                f"{'; '.join(listed)}. Ids asked: {_some(list(questions))}"
            )
        answers: dict[Hashable, list[dict]] = {}
        # reversed, so that pop() takes answers to the same key in their order
        for row in reversed(self.rows):
            answers.setdefault(key_of(row), []).append(row)
        return [answers[key].pop() for key in asked]

    def with_questions(self, questions: Mapping[str, dict]) -> Iterator[tuple[dict, dict]]:
        """(question, answer) in the order of {id: question}. ValueError as of `pair`."""
        return zip(questions.values(), self.pair(list(questions)), strict=True)


def read_answers(path: Path, fields: Fields = ANSWER) -> Answers:
    """Answers from JSON lines; ValueError for a line that lacks one of the fields."""
    return Answers(path, rows=read_lines(path, fields))


def read_lines(path: Path, fields: Fields) -> list[dict]:
    """Objects of a file of JSON lines; ValueError for one that lacks one of the fields."""
    return [row for _, row in json_lines(existing(path), fields)]


def read_annotations(path: Path, fields: Fields) -> dict:
    """Object of an official JSON file; ValueError where it lacks one of the fields."""
    content = parse_json(existing(path).read_bytes(), name=str(path))
    return checked(content, fields, name=str(path))


def read_annotation_list(path: Path, key: str, fields: Fields) -> list[dict]:
    """Objects of the list that stands under `key` in an official JSON file; ValueError for one
    that lacks one of the fields."""
    rows = read_annotations(path, {key: list})[key]
    for index, row in enumerate(rows):
        checked(row, fields, name=f"{path} {key}[{index}]")
    return rows


def checked(row: object, fields: Fields, name: str) -> dict:
    """The row itself; DamagedFile (a ValueError) with the row's name unless it is an object that
    holds the fields."""
    if not isinstance(row, dict):
        raise DamagedFile(f"{name} is {row!r:.80}, which is no JSON object")
    check_fields(row, fields=fields, name=name)
    return row


def by_id(rows: Iterable[dict], path: Path, field: str = "question_id") -> dict[str, dict]:
    """{id: row}; ValueError for a file without rows or one that names an id twice."""
    unique: dict[str, dict] = {}
    for row in rows:
        key = str(row[field])
        if key in unique:
            raise ValueError(f"{path} names {field} {row[field]!r} twice: give the official file")
        unique[key] = row
    if not unique:
        raise ValueError(f"{path} holds no question")
    return unique


def existing(path: Path) -> Path:
    """The path itself; ValueError unless it is a file."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    return path


def _some(ids: list) -> str:
    """The first ids, as errors show them."""
    dots = ", ..." if len(ids) > EXAMPLES else ""
    return ", ".join(map(repr, ids[:EXAMPLES])) + dots


def _paired(answers: Answers, path: Path, fields: Fields = QUESTION) -> Iterator[tuple[dict, dict]]:
    """(question, answer) in the order of a file of questions."""
    return answers.with_questions(by_id(read_lines(path, fields), path))


def write_normalised(
    answers: Answers, questions: Path, output: Path, key: str, kind: type | tuple[type, ...]
) -> None:
    """[{key, answer}]; `key` is a field of the questions, of type `kind`, and keeps its value."""
    pairs = _paired(answers, questions, fields={**QUESTION, key: kind})
    rows = [
        {key: question[key], "answer": normalise_answer(answer["text"])}
        for question, answer in pairs
    ]
    write_atomically(output, json.dumps(rows).encode())


def write_mmvet(answers: Answers, questions: Path, output: Path) -> None:
    """{"v1_ID": text}"""
    texts = {
        f"v1_{question_id(question)}": answer["text"]
        for question, answer in _paired(answers, questions)
    }
    write_atomically(output, json.dumps(texts, indent=2).encode())


def write_llavabench(answers: Answers, questions: Path, output: Path) -> None:
    """The six fields of each answer, in the order of the questions."""
    lines = []
    for _, answer in _paired(answers, questions):
        checked(answer, JUDGED, name=f"{answers.path} id {question_id(answer)}")
        fields = {field: answer[field] for field in JUDGED}
        lines.append(json.dumps(fields) + "\n")
    write_atomically(output, "".join(lines).encode())


def write_mmbench(answers: Answers, questions: Path, output: Path) -> None:
    """The official table and `prediction`. Without the column `image`: the server has the images,
    and no cell of a workbook could hold one."""
    # before the table, which holds all images, is read
    if output.suffix not in (".tsv", ".xlsx"):
        raise ValueError(f"--output {output}: a table for MMBench ends with .tsv or .xlsx")
    table = _read_mmbench(questions)
    columns = [*next(iter(table.values())), "prediction"]
    cells = [columns]
    for row, answer in answers.with_questions(table):
        cells.append([*row.values(), answer["text"]])
    if output.suffix == ".xlsx":
        write_atomically(output, _xlsx(cells, output))
        return
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(cells)
    write_atomically(output, stream.getvalue().encode())


@names_place("path")
def _read_mmbench(path: Path) -> dict[str, dict]:
    """{index: row without image}"""
    csv.field_size_limit(LONGEST_FIELD)
    rows = []
    # utf-8-sig also reads files without a byte order mark
    with open(existing(path), newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream, delimiter="\t")
        columns = table.fieldnames or ()
        if "index" not in columns:
            raise ValueError(f"{path} has no column `index`: give the official .tsv")
        for row in table:
            # DictReader puts surplus cells under None, and None for missing ones
            if None in row or None in row.values():
                raise ValueError(
                    f"{path} line {table.line_num}: not {len(columns)} cells as above it"
                )
            row.pop("image", None)
            rows.append(row)
    return by_id(rows, path, field="index")


def _xlsx(cells: list[list[str]], output: Path) -> bytes:
    """A workbook of one sheet; `output` is for the error."""
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise ValueError(
            f"{output} needs openpyxl, which is not installed: `pip install openpyxl`, or name a "
            ".tsv and convert it"
        ) from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in cells:
        sheet.append(row)
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


FORMATS: dict[str, Callable[[Answers, Path, Path], None]] = {
    "vqav2": partial(write_normalised, key="question_id", kind=ID),
    "vizwiz": partial(write_normalised, key="image", kind=str),
    "mmbench": write_mmbench,
    "mmvet": write_mmvet,
    "llavabench": write_llavabench,
}


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.lmm.scoring.answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--answers", type=Path, required=True, help="JSON lines of a model")
    parser.add_argument("--questions", type=Path, required=True, help="what was asked, see above")
    parser.add_argument("--output", type=output_path, required=True, help="file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write one file; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_write, argv=argv)


def _write(args: argparse.Namespace) -> None:
    answers = read_answers(args.answers)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    FORMATS[args.format](answers, args.questions, args.output)
    print(f"{len(answers.rows)} answers in {args.output}")


if __name__ == "__main__":
    sys.exit(main())
