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
from pathlib import Path

from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.reading import names_place
from model_factory.files import parse_json, write_atomically

Kinds = Mapping[str, type | tuple[type, ...]]  # {field: types that its value may have}

ID = (str, int)
QUESTION: dict[str, type | tuple[type, ...]] = {"question_id": ID}
ANSWER = QUESTION | {"prompt": str, "text": str}
# fields that LLaVA-Bench's judge reads
JUDGED = ANSWER | {"answer_id": ID, "model_id": str, "metadata": dict}
EXAMPLES = 3  # ids that an error names
LONGEST_FIELD = 2**31 - 1  # bytes; MMBench holds images as text, the csv module allows 128 KiB

# the lists of VQA's official evaluation
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
        questions = Counter(asked)
        answered = Counter(key_of(row) for row in self.rows)
        surplus = answered - questions
        by_fault = {
            "missing (asked, not answered)": list(questions - answered),
            "doubled (answered more often than asked)": [k for k in surplus if k in questions],
            "foreign (answered, not asked)": [k for k in surplus if k not in questions],
        }
        wrong = [f"{len(keys)} {name}: {_some(keys)}" for name, keys in by_fault.items() if keys]
        if wrong:
            raise ValueError(
                f"{self.path} does not answer each of {len(asked)} questions once. Ids "
                f"{'; '.join(wrong)}. Ids asked: {_some(questions)}"
            )
        # reversed, so that pop takes the first answer of a key first
        answers: dict[Hashable, list[dict]] = {}
        for row in reversed(self.rows):
            answers.setdefault(key_of(row), []).append(row)
        return [answers[key].pop() for key in asked]


def read_answers(path: Path) -> Answers:
    """Answers from JSON lines; ValueError for a line without question_id, prompt or text."""
    return Answers(path, read_jsonl(path, ANSWER))


def numbered_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(file and line, object) of a file of JSON lines; blank lines are passed over. ValueError for
    a line that is no JSON object."""
    with open(existing(path), "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                location = f"{path} line {number}"
                yield location, parse_json(line, name=location)


def read_jsonl(path: Path, kinds: Kinds) -> list[dict]:
    """Objects of a file of JSON lines; `kinds` must be in each, else ValueError."""
    return [checked(row, kinds=kinds, location=where) for where, row in numbered_rows(path)]


def read_object(path: Path, kinds: Kinds) -> dict:
    """Object of a JSON file that holds `kinds`; ValueError for anything else."""
    content = parse_json(existing(path).read_bytes(), name=str(path))
    return checked(content, kinds=kinds, location=str(path))


def read_list(path: Path, field: str, kinds: Kinds) -> list[dict]:
    """Objects of the list that is one field of a JSON file; `kinds` must be in each, else
    ValueError."""
    rows = read_object(path, {field: list})[field]
    return [
        checked(row, kinds=kinds, location=f"{path} {field}[{index}]")
        for index, row in enumerate(rows)
    ]


def checked(row: object, kinds: Kinds, location: str) -> dict:
    """The row itself; ValueError that names its location unless it is an object that holds
    `kinds`."""
    if not isinstance(row, dict):
        raise ValueError(f"{location}: {str(row)[:80]!r} is no JSON object")
    for field, kind in kinds.items():
        if field not in row:
            raise ValueError(f"{location} lacks {field!r}: it has {_some(row)}")
        value = row[field]
        if not isinstance(value, kind):
            wanted = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(one.__name__ for one in wanted)
            raise ValueError(
                f"{location}: {field} is {str(value)[:80]!r}, of type {type(value).__name__}, "
                f"not {names}"
            )
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


def _some(ids: Iterable[Hashable]) -> str:
    ids = list(ids)
    shown = [repr(one) for one in ids[:EXAMPLES]]
    if len(ids) > EXAMPLES:
        shown.append("...")
    return ", ".join(shown)


def _paired(answers: Answers, path: Path, kinds: Kinds = QUESTION) -> list[tuple[dict, dict]]:
    """(question, answer) in the order of a file of questions."""
    questions = by_id(read_jsonl(path, kinds), path)
    return list(zip(questions.values(), answers.pair(list(questions)), strict=True))


def write_vqav2(answers: Answers, questions: Path, output: Path) -> None:
    """[{question_id, answer}]; ids keep the type that the questions have."""
    _write_normalised(_paired(answers, questions), field="question_id", output=output)


def write_vizwiz(answers: Answers, questions: Path, output: Path) -> None:
    """[{image, answer}]"""
    pairs = _paired(answers, questions, kinds=QUESTION | {"image": str})
    _write_normalised(pairs, field="image", output=output)


def _write_normalised(pairs: Sequence[tuple[dict, dict]], field: str, output: Path) -> None:
    rows = [
        {field: question[field], "answer": normalise_answer(answer["text"])}
        for question, answer in pairs
    ]
    write_atomically(output, json.dumps(rows).encode())


def write_mmvet(answers: Answers, questions: Path, output: Path) -> None:
    """{"v1_ID": text}"""
    texts = {f"v1_{question_id(q)}": answer["text"] for q, answer in _paired(answers, questions)}
    write_atomically(output, json.dumps(texts, indent=2).encode())


def write_llavabench(answers: Answers, questions: Path, output: Path) -> None:
    """The six fields of each answer, in the order of the questions."""
    lines = []
    for _, answer in _paired(answers, questions):
        location = f"{answers.path} id {question_id(answer)}"
        row = checked(answer, kinds=JUDGED, location=location)
        lines.append(json.dumps({field: row[field] for field in JUDGED}) + "\n")
    write_atomically(output, "".join(lines).encode())


def write_mmbench(answers: Answers, questions: Path, output: Path) -> None:
    """The official table and `prediction`. Without the column `image`: the server has the images,
    and no cell of a workbook could hold one."""
    if output.suffix not in (".tsv", ".xlsx"):
        raise ValueError(f"--output {output}: a table for MMBench ends with .tsv or .xlsx")
    table = _read_mmbench(questions)
    texts = [answer["text"] for answer in answers.pair(list(table))]
    columns = list(next(iter(table.values())))
    cells = [[*columns, "prediction"]]
    cells += [[*row.values(), text] for row, text in zip(table.values(), texts, strict=True)]
    data = _xlsx(cells, output) if output.suffix == ".xlsx" else _tsv(cells)
    write_atomically(output, data)


@names_place("path")
def _read_mmbench(path: Path) -> dict[str, dict]:
    """{index: row without its image}"""
    csv.field_size_limit(LONGEST_FIELD)
    rows = []
    with open(existing(path), newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream, delimiter="\t")
        columns = table.fieldnames or ()
        if "index" not in columns:
            raise ValueError(f"{path} has no column `index`: give the official .tsv")
        for row in table:
            if None in row or None in row.values():  # more or fewer cells than the first line
                raise ValueError(
                    f"{path} line {table.line_num}: not {len(columns)} cells as above it"
                )
            rows.append({name: cell for name, cell in row.items() if name != "image"})
    return by_id(rows, path=path, field="index")


def _tsv(cells: list[list[str]]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(cells)
    return stream.getvalue().encode()


def _xlsx(cells: list[list[str]], output: Path) -> bytes:
    """The bytes of a workbook; ValueError with `output` where openpyxl is absent."""
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
