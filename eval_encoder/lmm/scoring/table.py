"""Trained multimodal models side by side: `python -m eval_encoder.lmm.scoring.table NAME=OUT ...`.

    OUT/record.json      tokens per image, parameters (lmm_probe.py), seconds of this stage;
                         --seconds NAME=S gives those of all stages
    OUT/answers.jsonl    answers of the demo's questions (lmm_eval.py)
    --labels FILE        the demo's answers.jsonl

Accuracy is in percent, with half the width of its 95 % interval by the normal approximation over
questions. Seconds were measured as the stages ran, so with whatever ran beside them.
"""

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from eval_encoder.lmm.scoring.answers import QUESTION, Fields, by_id, read_answers, read_lines
from eval_encoder.tables import markdown_table
from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.files import read_json, write_atomically

# fields of record.json that the table shows
RECORD: Fields = {
    "arguments": dict,
    "tokens_per_picture": int,
    "parameters": int,
    "learning": int,
    "seconds": (int, float),
}


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.lmm.scoring.table", description=__doc__.split("\n")[0]
    )
    parser.add_argument("models", nargs="+", metavar="NAME=OUT", help="what lmm_probe.py wrote")
    parser.add_argument("--labels", type=Path, required=True, help="answers.jsonl of the demo set")
    parser.add_argument("--seconds", nargs="*", default=[], metavar="NAME=S", help="of all stages")
    parser.add_argument("--output", type=output_path, help="also write the table here")
    return parser


def demo_accuracy(answers: Path, labels: Path) -> dict[str, float]:
    """Accuracy in percent of every category of the demo set, and `overall`, over all questions.

    answers: a model's JSON lines. labels: answers.jsonl of the set. Texts are right when they equal
    the label, lower-cased and without a final dot. Raises ValueError for lines that cannot be read,
    and for questions that are missing, unknown or answered twice: a score over some of the
    questions would not compare.
    """
    questions = by_id(read_lines(labels, {**QUESTION, "label": str, "category": str}), labels)
    given = read_answers(answers, fields={**QUESTION, "text": str})
    rights: dict[str, list[bool]] = defaultdict(list)
    for question, answer in given.with_questions(questions):
        text = answer["text"].strip().lower().removesuffix(".").strip()
        rights[question["category"]].append(text == question["label"])
    rights["overall"] = [right for category in rights.values() for right in category]
    return {name: 100 * fmean(values) for name, values in rights.items()}


def rows_of(models: dict[str, Path], labels: Path, seconds: dict[str, float]) -> list[dict]:
    """One row per model. Raises ValueError for a folder without record or answers."""
    # numpy takes longer to import than --help takes in all
    from eval_encoder.intervals import normal_half_width, with_half_width

    rows = []
    for name, folder in models.items():
        path = folder / "record.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: train {name} with lmm_probe.py first")
        record = read_json(path, RECORD)
        accuracy = demo_accuracy(folder / "answers.jsonl", labels)
        overall = accuracy.pop("overall")
        share = overall / 100
        # the standard deviation of what is right or wrong, a share of it right
        deviation = math.sqrt(share * (1 - share))
        count = len(read_lines(labels, QUESTION))
        half_width = normal_half_width(deviation, count=count)
        rows.append(
            {
                "model": name,
                # a blind model is trained and asked without its images
                "tokens": 0 if record["arguments"]["blind"] else record["tokens_per_picture"],
                "parameters": f"{record['parameters'] / 1e6:.2f} M",
                "learning": f"{record['learning'] / 1e6:.2f} M",
                "seconds": f"{seconds.get(name, record['seconds']):.0f}",
                **{category: f"{value:.1f}" for category, value in accuracy.items()},
                "overall": with_half_width(overall, half_width),
            }
        )
    return rows


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    return markdown_table(columns=list(rows[0]), rows=[row.values() for row in rows])


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_print_table, argv=argv)


def _print_table(args: argparse.Namespace) -> None:
    models = {name: Path(path) for name, path in map(_pair, args.models)}
    seconds = {name: float(value) for name, value in map(_pair, args.seconds)}
    table = markdown(rows_of(models, labels=args.labels, seconds=seconds))
    print(table, end="")
    if args.output is not None:
        write_atomically(args.output, table.encode())


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is no NAME=VALUE")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
