"""Compare two runs step by step: `python benchmarks/compare_runs.py OUTPUT_A OUTPUT_B`.

Reads both metrics.jsonl and prints, for every value that both record, "identical" or the largest
relative difference and its step. A refactoring that claims no numeric change must print identical.
"""

import argparse
import json
from pathlib import Path


def read_steps(output: Path) -> dict[int, dict[str, float]]:
    """Step -> recorded values of a run."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return {record.pop("step"): record for record in map(json.loads, lines)}


def compare(first: Path, second: Path) -> dict[str, dict]:
    """Per value: number of common steps, largest relative difference and where it is."""
    a, b = read_steps(first), read_steps(second)
    steps = sorted(a.keys() & b.keys())
    report = {}
    for name in sorted(a[steps[0]].keys() & b[steps[0]].keys()):
        differences = [
            (abs(a[s][name] - b[s][name]) / max(abs(a[s][name]), abs(b[s][name]), 1e-30), s)
            for s in steps
        ]
        worst, step = max(differences)
        report[name] = {"steps": len(steps), "identical": worst == 0, "worst": worst, "step": step}
    return report


def main() -> None:
    """Print the comparison as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args()
    print(json.dumps(compare(args.first, args.second), indent=1))


if __name__ == "__main__":
    main()
