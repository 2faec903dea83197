"""On demand: plausible mistakes, one at a time, each of which some test must notice.

    python tests/mutants.py [--only NAME ...] [--list] [--jobs N] [--output FILE.md]

The mistakes are data (tests/mutations/). What the tests need is copied to a temporary folder, one
copy per mutation; the text is replaced there, and the mutation's own tests run with -x. The tree
itself is never changed. Before that, the same tests must pass in a copy without a mutation, or a
failure would mean nothing.

    killed     a test failed, as it should
    survived   all passed: write the test that is missing, or say why none can be (`equivalent`)
    timed out  the tests did not end within LIMIT_S: a loop that does not end is noticed too
    broken     pytest itself failed: the mutation does not import, or its tests are not there

Exit code 1 where anything survived without a reason or is broken, 2 for a mutation that no longer
fits the text (tests/test_mutants.py finds those in every run of the suite).
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mutations import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
# all that the named tests read; golden vectors lie beside the repository (tests/conftest.py)
COPIED = ("model_factory", "data_pipeline", "training", "eval_encoder", "tests", "pyproject.toml")
# the slowest of the named tests start several ranks: minutes on two cores that others use too
LIMIT_S = 600.0
KILLED, SURVIVED, TIMED_OUT, BROKEN = "killed", "survived", "timed out", "broken"
# exit codes of pytest that say something about the code under test; all others mean a broken run
OUTCOMES = {0: SURVIVED, 1: KILLED}


class StaleMutant(ValueError):
    """A mutation whose text is not in its file exactly once."""


@dataclass(frozen=True)
class Result:
    """What the tests made of one mutation; `noticed_by`: the test that failed, or the last line of
    pytest where none did."""

    mutant: Mutant
    outcome: str
    seconds: float
    noticed_by: str

    @property
    def is_fault(self) -> bool:
        """Whether something is to be done: a missing test, or a mutation that cannot run."""
        return self.outcome == BROKEN or (self.outcome == SURVIVED and not self.mutant.equivalent)


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """Text of the mutant's file with the mistake in it. Raises StaleMutant."""
    text = (root / mutant.file).read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise StaleMutant(
            f"{mutant.name}: its text occurs {count} times in {mutant.file}, not once: adapt the "
            f"mutation to the code, in tests/mutations/\n{mutant.old}"
        )
    return text.replace(mutant.old, mutant.new)


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of what the tests need, which goes in the end. A fresh one for every mutation: byte
    code of an earlier one would be taken for that of a file of the same size and second."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / ROOT.name
        tree.mkdir()
        leave_out = shutil.ignore_patterns("__pycache__", ".hypothesis", ".pytest_cache")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=leave_out)
            else:
                shutil.copyfile(ROOT / name, tree / name)
        shared = ROOT.parent / "shared"
        if shared.is_dir():
            tree.with_name("shared").symlink_to(shared)
        yield tree


def run_tests(tree: Path, tests: Sequence[str], limit_s: float = LIMIT_S) -> tuple[str, str]:
    """(outcome, the first test that failed or pytest's last line) of tests in a copy."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        + [f"tests/{test}" for test in tests],
        cwd=tree,
        env={**environment, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # ranks that a test started among them
        process.communicate()
        return TIMED_OUT, f"no end after {limit_s:.0f} s"
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", output, flags=re.MULTILINE)
    lines = output.strip().splitlines() or ["no output"]
    return OUTCOMES.get(process.returncode, BROKEN), failed[0] if failed else lines[-1]


def try_mutant(mutant: Mutant, limit_s: float = LIMIT_S) -> Result:
    """Apply one mutation in a copy of its own and run its tests there. Raises StaleMutant."""
    text = mutated(mutant)
    started = time.monotonic()
    with copied_tree() as tree:
        (tree / mutant.file).write_text(text)
        outcome, noticed_by = run_tests(tree, tests=mutant.tests, limit_s=limit_s)
    return Result(mutant, outcome, time.monotonic() - started, noticed_by)


def check_untouched(mutants: Sequence[Mutant]) -> None:
    """Raises ValueError where a test fails without any mutation."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    whole = [test for test in tests if "::" not in test]
    wanted = whole + [test for test in tests if test.partition("::")[0] not in whole]
    with copied_tree() as tree:
        outcome, line = run_tests(tree, tests=wanted, limit_s=LIMIT_S * len(wanted))
    if outcome != SURVIVED:
        raise ValueError(f"without any mutation: {outcome} ({line}); mend that first")


def table(results: Sequence[Result]) -> str:
    """Markdown, one line per mutation, what is to be done first."""
    ordered = sorted(results, key=lambda result: (not result.is_fault, result.outcome == KILLED))
    lines = ["| mutation | file | outcome | s | noticed by |", "| --- | --- | --- | ---: | --- |"]
    for result in ordered:
        reason = f" ({result.mutant.equivalent})" if result.mutant.equivalent else ""
        cells = (
            result.mutant.name,
            result.mutant.file,
            result.outcome + reason,
            f"{result.seconds:.0f}",
            result.noticed_by,
        )
        lines.append(f"| {' | '.join(cells)} |")
    counts = {
        o: sum(r.outcome == o for r in results) for o in (KILLED, SURVIVED, TIMED_OUT, BROKEN)
    }
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    return "\n".join([*lines, "", f"{len(results)} mutations: {told}."])


def chosen(names: Sequence[str]) -> list[Mutant]:
    """Mutations of these names, all without any. Raises ValueError for an unknown name."""
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no mutation is called {', '.join(unknown)}: see --list")
    return [known[name] for name in names] if names else list(MUTANTS)


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some mutations")
    parser.add_argument("--list", action="store_true", help="show the mutations and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="mutations that run at a time")
    parser.add_argument("--output", type=Path, help="write the table to a file too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Try mutations and print their table; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        mutants = chosen(args.only)
        for mutant in mutants:
            mutated(mutant)
        if args.list:
            for mutant in mutants:
                print(f"{mutant.name:40} {mutant.file:50} {mutant.why}")
            return 0
        check_untouched(mutants)
        results = []
        with ThreadPoolExecutor(args.jobs) as pool:
            for result in pool.map(try_mutant, mutants):
                results.append(result)
                print(f"{result.outcome:10} {result.mutant.name} ({result.seconds:.0f} s)")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + table(results))
    if args.output:
        args.output.write_text(table(results) + "\n")
    return int(any(result.is_fault for result in results))


if __name__ == "__main__":
    sys.exit(main())
