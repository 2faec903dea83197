"""Compare two runs step by step: `python benchmarks/compare_runs.py OUTPUT_A OUTPUT_B`.

Reads both metrics.jsonl and prints "identical", or the first difference and, for every value that
both record, the largest relative one and its step. A refactoring that claims no numeric change must
print identical. Exit code 1 when runs differ.
"""

import argparse
import json
import sys
from pathlib import Path


def read_steps(output: Path) -> dict[int, dict[str, float]]:
    """Step -> recorded values of a run."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return {record.pop("step"): record for record in map(json.loads, lines)}


def compare(first: Path, second: Path) -> dict[str, dict]:
    """Per value: number of common steps, largest relative difference and where it is."""
    a, b = read_steps(first), read_steps(second)
    steps = sorted(a.keys() & b.keys())
    if not steps:
        sys.exit(f"{first} and {second} have no step in common")
    report = {}
    for name in sorted(a[steps[0]].keys() & b[steps[0]].keys()):
        differences = [
            (abs(a[s][name] - b[s][name]) / max(abs(a[s][name]), abs(b[s][name]), 1e-30), s)
            for s in steps
            if None not in (a[s][name], b[s][name])  # not finite
        ]
        worst, step = max(differences)
        report[name] = {"steps": len(steps), "worst": worst, "step": step}
    return report


def first_difference(first: Path, second: Path) -> str | None:
    """Where two records differ first, in words; None when they are identical."""
    a, b = read_steps(first), read_steps(second)
    for step in sorted(a.keys() | b.keys()):
        left, right = a.get(step), b.get(step)
        if left is None or right is None:
            return f"step {step} is only in {first if right is None else second}"
        for name in sorted(left.keys() | right.keys()):
            if left.get(name) != right.get(name):
                return f"step {step}, {name}: {left.get(name)} and {right.get(name)}"
    return None


def main() -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args()
    difference = first_difference(args.first, args.second)
    if difference is None:
        print("identical")
        return 0
    print(f"first difference: {difference}")
    print(json.dumps(compare(args.first, args.second), indent=1))
    return 1


if __name__ == "__main__":
    sys.exit(main())
