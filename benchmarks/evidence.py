"""Do codec patches beat other inputs of as many tokens? Trains and probes an encoder for each.

    python benchmarks/evidence.py --output DIR
    python benchmarks/evidence.py --output DIR --only brief_events --budgets 98 --seeds 1

One cell after the other (evidence_plan.py); a cell that is there is not run again, so a run that
was stopped goes on. Ends in DIR/report.md, with tables, plots and a verdict on each hypothesis.
docs/evidence.md has the hypotheses and what was found.
"""

import argparse
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are not installed

from benchmarks.evidence_plan import BUDGETS, INPUTS, RIVALS, SEEDS, SETS, cells  # noqa: E402
from benchmarks.evidence_report import report  # noqa: E402
from benchmarks.evidence_run import Recipe, Runner  # noqa: E402


def main() -> None:
    """Run the cells that are missing, then write the report of all that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of everything")
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS[:2], help="sets")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=RIVALS, help="inputs")
    parser.add_argument("--budgets", nargs="+", type=int, choices=BUDGETS, default=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of the trainings")
    parser.add_argument("--videos", nargs="+", type=Path, default=[], help="sources of tempo")
    parser.add_argument("--report", action="store_true", help="only the report of what is there")
    for field in fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default))
    args = parser.parse_args()
    if "tempo" in args.only and not args.videos:
        parser.error("--only tempo needs --videos")
    given = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    recipe = replace(Recipe(), **{name: v for name, v in given.items() if v is not None})
    runner = Runner(args.output, recipe=recipe, videos=args.videos)
    planned = cells(tuple(args.only), tuple(args.inputs), tuple(args.budgets), tuple(args.seeds))
    missing = [] if args.report else [cell for cell in planned if not runner.result(cell).exists()]
    for number, cell in enumerate(missing, 1):
        started = time.perf_counter()
        runner.run(cell)
        seconds = time.perf_counter() - started
        print(f"{number} of {len(missing)}: {cell.name} in {seconds:.0f} s", flush=True)
    text = report(args.output)
    (args.output / "report.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
