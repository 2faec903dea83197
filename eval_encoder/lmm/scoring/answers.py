"""Answers of a multimodal model: how they are read and paired, and what evaluation servers take.

    python -m eval_encoder.lmm.scoring.answers FORMAT --answers FILE --questions FILE --output FILE

Answers are JSON lines {question_id, prompt, text, answer_id, model_id, metadata}. They are paired
with questions by id, never by order; an id that is missing, doubled or foreign is an error.

    FORMAT      questions                      output
    vqav2       JSON lines {question_id}       JSON list of {question_id, answer}; the server takes
                                               files that answer all questions of test2015
    vizwiz      JSON lines {question_id, image}
                                               JSON list of {image, answer}
    mmbench     the official .tsv              its columns without the pictures, and `prediction`:
                                               .tsv, or .xlsx where openpyxl is installed
    mmvet       JSON lines {question_id}       JSON object {"v1_ID": text}
    llavabench  JSON lines {question_id}       the answers in the questions' order: the judge reads
                                               both files line by line

Answers for vqav2 and vizwiz are normalised as the server does it, see `normalise_answer`. Cost:
all files are held in memory, MMBench's without its pictures.
"""

import argparse
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.reading import names_place

ID = (str, int)
QUESTION = {"question_id": ID}
ANSWER = QUESTION | {"prompt": str, "text": str}
JUDGED = ANSWER | {"answer_id": ID, "model_id": str, "metadata": dict}
EXAMPLES = 3  # ids that an error names
LONGEST_FIELD = 2**31 - 1  # bytes; MMBench holds pictures as text, the csv module allows 128 KiB

ARTICLES = {"a", "an", "the"}
NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(),
                   map(str, range(11)), strict=True)) | {"none": "0"}  # fmt: skip
PUNCTUATION = ';/[]"{}()=+\\_-><@`!'  # comma and question mark are gone before
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
    full[:place] + full[place + 1 :]: full
    for full in FULL_CONTRACTIONS
    for place, letter in enumerate(full)
    if letter == "'"
}


def normalise_answer(text: str) -> str:
    """An answer as VQA's evaluation compares it (VQAv2, VizWiz, TextVQA).

    Lower case; no comma, question mark or article, no period but in front of a digit; `'s` a word
    of its own; zero to ten and none as digits; a left-out apostrophe put back. Other punctuation
    becomes a space, or nothing where the same sign stands beside a space anywhere in the answer.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        bare = bare.replace(sign, "" if beside_space else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", bare).split()]
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
        """The answer to each question, in the order of `asked`, the keys of the questions; `key_of`
        gives that of an answer. A key may be asked several times where the very same prompt is:
        its answers are then taken in their order. ValueError unless every question is answered
        exactly once and nothing else is."""
        questions, found = Counter(asked), Counter(map(key_of, self.rows))
        more = found - questions
        parts = {
            "missing (asked, not answered)": questions - found,
            "doubled (answered more often than asked)": [key for key in more if key in questions],
            "foreign (answered, not asked)": [key for key in more if key not in questions],
        }
        wrong = [f"{len(keys)} {name}: {_some(keys)}" for name, keys in parts.items() if keys]
        if wrong:
            raise ValueError(
                f"{self.path} does not answer each of {len(asked)} questions once. Ids "
                f"{'; '.join(wrong)}. Ids asked: {_some(questions)}"
            )
        answers: dict[Hashable, list[dict]] = {}
        for row in reversed(self.rows):
            answers.setdefault(key_of(row), []).append(row)
        return [answers[key].pop() for key in asked]


def read_answers(path: Path) -> Answers:
    """Answers from JSON lines; ValueError for a line without question_id, prompt or text."""
    return Answers(path, read_jsonl(path, ANSWER))


def read_jsonl(path: Path, kinds: Mapping) -> list[dict]:
    """Objects of a file of JSON lines; `kinds` {field: type} must be in each, else ValueError."""
    rows = []
    with open(existing(path), "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {number} is no JSON: {error}") from error
            rows.append(checked(row, kinds, f"{path} line {number}"))
    return rows


def read_json(path: Path, kinds: Mapping) -> dict:
    """Object of a JSON file that holds `kinds`, {field: type}; ValueError for anything else."""
    try:
        found = json.loads(existing(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    return checked(found, kinds, str(path))


def read_list(path: Path, field: str, kinds: Mapping) -> list[dict]:
    """Objects of the list that is one field of a JSON file; `kinds` must be in each, else
    ValueError."""
    rows = read_json(path, {field: list})[field]
    return [checked(row, kinds, f"{path} {field}[{n}]") for n, row in enumerate(rows)]


def checked(row, kinds: Mapping, place: str) -> dict:
    """The row itself; ValueError that names the place unless it is an object that holds `kinds`,
    {field: type or types}."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {str(row)[:80]!r} is no JSON object")
    for field, kind in kinds.items():
        if field not in row:
            raise ValueError(f"{place} lacks {field!r}: it has {_some(row)}")
        if not isinstance(row[field], kind):
            value, found = str(row[field])[:80], type(row[field]).__name__
            raise ValueError(f"{place}: {field} is {value!r}, of type {found}, not {_names(kind)}")
    return row


def by_id(rows: Iterable[dict], path: Path, field: str = "question_id") -> dict[str, dict]:
    """{id: row}; ValueError for a file without rows or one that names an id twice."""
    found: dict[str, dict] = {}
    for row in rows:
        if str(row[field]) in found:
            raise ValueError(f"{path} names {field} {row[field]!r} twice: give the official file")
        found[str(row[field])] = row
    if not found:
        raise ValueError(f"{path} holds no question")
    return found


def existing(path: Path) -> Path:
    """The path itself; ValueError unless it is a file."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    return path


def _names(kind: type | tuple[type, ...]) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))


def _some(ids: Iterable[Hashable]) -> str:
    ids = list(ids)
    return ", ".join(map(repr, ids[:EXAMPLES])) + ", ..." * (len(ids) > EXAMPLES)


def _paired(answers: Answers, path: Path, kinds: Mapping = QUESTION) -> list[tuple[dict, dict]]:
    """(question, answer) in the order of a file of questions."""
    questions = by_id(read_jsonl(path, kinds), path)
    return list(zip(questions.values(), answers.pair(list(questions)), strict=True))


def write_vqav2(answers: Answers, questions: Path, output: Path) -> None:
    """[{question_id, answer}]; ids keep the type that the questions have."""
    pairs = _paired(answers, questions)
    rows = [
        {"question_id": question["question_id"], "answer": normalise_answer(answer["text"])}
        for question, answer in pairs
    ]
    output.write_text(json.dumps(rows))


def write_vizwiz(answers: Answers, questions: Path, output: Path) -> None:
    """[{image, answer}]"""
    pairs = _paired(answers, questions, QUESTION | {"image": str})
    rows = [
        {"image": question["image"], "answer": normalise_answer(answer["text"])}
        for question, answer in pairs
    ]
    output.write_text(json.dumps(rows))


def write_mmvet(answers: Answers, questions: Path, output: Path) -> None:
    """{"v1_ID": text}"""
    texts = {f"v1_{question_id(q)}": answer["text"] for q, answer in _paired(answers, questions)}
    output.write_text(json.dumps(texts, indent=2))


def write_llavabench(answers: Answers, questions: Path, output: Path) -> None:
    """The six fields of each answer, in the order of the questions."""
    rows = [
        {field: checked(answer, JUDGED, f"{answers.path} id {question_id(answer)}")[field]
         for field in JUDGED}
        for _, answer in _paired(answers, questions)
    ]  # fmt: skip
    output.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_mmbench(answers: Answers, questions: Path, output: Path) -> None:
    """The official table and `prediction`. Without the column `image`: the server has the pictures,
    and no cell of a workbook could hold one."""
    if output.suffix not in (".tsv", ".xlsx"):
        raise ValueError(f"--output {output}: a table for MMBench ends with .tsv or .xlsx")
    table = _read_mmbench(questions)
    texts = [answer["text"] for answer in answers.pair(list(table))]
    columns = [*next(iter(table.values())), "prediction"]
    cells = [[*row.values(), text] for row, text in zip(table.values(), texts, strict=True)]
    write = _write_xlsx if output.suffix == ".xlsx" else _write_tsv
    write([columns, *cells], output)


@names_place("path")
def _read_mmbench(path: Path) -> dict[str, dict]:
    """{index: row without picture}"""
    csv.field_size_limit(LONGEST_FIELD)
    rows = []
    with open(existing(path), newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream, delimiter="\t")
        if "index" not in (table.fieldnames or ()):
            raise ValueError(f"{path} has no column `index`: give the official .tsv")
        for row in table:
            if None in row or None in row.values():  # more or fewer cells than the first line
                raise ValueError(
                    f"{path} line {table.line_num}: not {len(table.fieldnames)} cells as above it"
                )
            rows.append({name: cell for name, cell in row.items() if name != "image"})
    return by_id(rows, path, "index")


def _write_tsv(cells: list[list[str]], output: Path) -> None:
    with open(output, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(cells)


def _write_xlsx(cells: list[list[str]], output: Path) -> None:
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
    book.save(output)


FORMATS = {
    "vqav2": write_vqav2,
    "vizwiz": write_vizwiz,
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
