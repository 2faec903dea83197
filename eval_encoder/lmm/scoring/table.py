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
from pathlib import Path

from eval_encoder.tables import markdown_table
from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.files import read_json, write_atomically

# what the table shows of record.json
RECORD: dict[str, type | tuple[type, ...]] = {
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


def rows_of(models: dict[str, Path], labels: Path, seconds: dict[str, float]) -> list[dict]:
    """One row per model. Raises ValueError for a folder without record or answers."""
    from eval_encoder.intervals import normal_half_width, with_half_width
    from eval_encoder.lmm.demo.question_set import score

    rows = []
    for name, folder in models.items():
        path = folder / "record.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: train {name} with lmm_probe.py first")
        record = read_json(path, RECORD)
        accuracy = score(folder / "answers.jsonl", labels)
        share = accuracy["overall"] / 100
        num_questions = len(labels.read_text().splitlines())
        half_width = normal_half_width(math.sqrt(share * (1 - share)), num_questions)
        tokens = 0 if record["arguments"]["blind"] else record["tokens_per_picture"]
        rows.append(
            {
                "model": name,
                "tokens": tokens,
                "parameters": f"{record['parameters'] / 1e6:.2f} M",
                "learning": f"{record['learning'] / 1e6:.2f} M",
                "seconds": f"{seconds.get(name, record['seconds']):.0f}",
                **{kind: f"{value:.1f}" for kind, value in accuracy.items() if kind != "overall"},
                "overall": with_half_width(accuracy["overall"], half_width),
            }
        )
    return rows


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    return markdown_table(list(rows[0]), [row.values() for row in rows])


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
