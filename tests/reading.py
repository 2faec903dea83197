"""How the product reads, in numbers; and, on demand, the lines that made them.

    python tests/reading.py                          the table of all four packages
    python tests/reading.py --before TREE            with the same figures of another checkout
    python tests/reading.py --list PATH ...          what to look at in these files or folders
    python tests/reading.py --entered MODULE ARGS    the files that a run of a module enters

Figures, per package and together:

    nodes             statements and expressions, as ast.walk meets them
    lines             lines that are neither empty nor of a comment or a docstring
    nodes per line    of those lines
    comments          lines with a comment per 100 lines
    tuples            assignments of several values to several names per 1,000 lines
    stars             positional arguments unpacked from a sequence per 1,000 lines
    function mean     lines of a function, from its `def` to its end, docstring included
    six parameters    share of functions that take six or more, in percent
    used once         functions of at most eight lines that one place alone names

Files entered are those of which a function ran, import apart: `--entered` runs a module in this
process and counts. From shards to a saved step, with SHARDS packed and labelled before:

    python tests/reading.py --since training/trainer.py:train --until training/trainer.py:_export
        --entered training.train_univit --preset demo --list_datasets SHARDS
        --num_sampled_data 64 --list_batch_size 32 --output OUTPUT
"""

import argparse
import ast
import collections
import inspect
import io
import runpy
import sys
import threading
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("model_factory", "data_pipeline", "training", "eval_encoder")
SHORT_FUNCTION = 8
MANY_PARAMETERS = 6
NAMED_FROM = 3  # arguments: from so many on, calls of our own functions name them


@dataclass
class Figures:
    """Counts of some files, and the lines to look at: {kind: ["path:line text"]}."""

    files: int = 0
    nodes: int = 0
    lines: int = 0
    comments: int = 0
    functions: list[int] = field(default_factory=list)
    many_parameters: int = 0
    found: dict[str, list[str]] = field(default_factory=lambda: collections.defaultdict(list))

    def add(self, other: "Figures") -> None:
        """Count the other's files too."""
        self.files += other.files
        self.nodes += other.nodes
        self.lines += other.lines
        self.comments += other.comments
        self.functions += other.functions
        self.many_parameters += other.many_parameters
        for kind, places in other.found.items():
            self.found[kind] += places

    def row(self) -> dict[str, float]:
        """The figures of the table, by their names."""
        lines = max(self.lines, 1)
        functions = max(len(self.functions), 1)
        return {
            "files": self.files,
            "nodes": self.nodes,
            "lines": self.lines,
            "nodes per line": self.nodes / lines,
            "comments": 100 * self.comments / lines,
            "tuples": 1000 * len(self.found["tuple"]) / lines,
            "stars": 1000 * len(self.found["star"]) / lines,
            "function mean": sum(self.functions) / functions,
            "function max": max(self.functions, default=0),
            "six parameters": 100 * self.many_parameters / functions,
            "used once": len(self.found["once"]),
            "unnamed": len(self.found["unnamed"]),
        }


def figures_of(path: Path, own: set[str], uses: collections.Counter) -> Figures:
    """Figures of one file. `own` are the names of all our functions, `uses` how often each name
    stands anywhere."""
    text = path.read_text()
    tree = ast.parse(text)
    rows = text.splitlines()
    comments = _comment_lines(text)
    silent = _docstring_lines(tree) | {
        number for number, row in enumerate(rows, 1) if not row.strip()
    }
    alone = {number for number in comments if rows[number - 1].lstrip().startswith("#")}
    result = Figures(files=1, lines=len(rows) - len(silent | alone), comments=len(comments))
    for node in ast.walk(tree):
        if isinstance(node, ast.expr | ast.stmt):
            result.nodes += 1
        kinds = list(_kinds(node, own, uses))
        for kind in kinds:
            text_of_line = rows[node.lineno - 1].strip()[:100]
            result.found[kind].append(f"{_shown(path)}:{node.lineno} {text_of_line}")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            result.functions.append(_length(node))
            result.many_parameters += _num_parameters(node) >= MANY_PARAMETERS
    return result


def _kinds(node: ast.AST, own: set[str], uses: collections.Counter):
    """What is to be looked at in a node."""
    if isinstance(node, ast.Assign):
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield "tuple"
    if isinstance(node, ast.Call):
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            yield "star"
        if _called(node) in own and len(node.args) >= NAMED_FROM:
            yield "unnamed"
    if isinstance(node, ast.FunctionDef) and not node.decorator_list:
        # its definition is not counted, so one use is one
        if _length(node) <= SHORT_FUNCTION and uses[node.name] == 1:
            yield "once"


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


def _num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def _comment_lines(text: str) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def names_of(root: Path) -> tuple[set[str], collections.Counter]:
    """(names of all functions, how often each name is used) of the four packages."""
    own = set()
    uses: collections.Counter = collections.Counter()
    for path in product_files(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Name):
                uses[node.id] += 1
            elif isinstance(node, ast.Attribute):
                uses[node.attr] += 1
    return own, uses


def product_files(root: Path, package: str = "") -> list[Path]:
    """Python files of a package of `root`, or of all four."""
    packages = [package] if package else PACKAGES
    return [path for name in packages for path in sorted((root / name).rglob("*.py"))]


def table(root: Path) -> dict[str, dict[str, float]]:
    """{package or `all`: its figures}."""
    own, uses = names_of(root)
    together = Figures()
    rows = {}
    for package in PACKAGES:
        figures = Figures()
        for path in product_files(root, package):
            figures.add(figures_of(path, own, uses))
        together.add(figures)
        rows[package] = figures.row()
    rows["all"] = together.row()
    return rows


def show_table(rows: dict[str, dict[str, float]]) -> None:
    """Print the figures as a Markdown table."""
    columns = list(rows["all"])
    print(f"| | {' | '.join(columns)} |")
    print("| --- |" + " ---: |" * len(columns))
    for name, row in rows.items():
        values = [f"{row[c]:.1f}" if isinstance(row[c], float) else f"{row[c]:,}" for c in columns]
        print(f"| {name} | {' | '.join(values)} |")


def list_places(paths: list[Path]) -> None:
    """Print what is to be looked at in files and folders, by its kind."""
    own, uses = names_of(ROOT)
    figures = Figures()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            figures.add(figures_of(file.resolve(), own, uses))
    for kind, places in figures.found.items():
        print(f"\n{kind}")
        print("\n".join(f"  {place}" for place in places))
    for name, value in figures.row().items():
        print(f"{name:15} {value:,.1f}")


def entered_files(
    module: str, argv: list[str], since: str | None = None, until: str | None = None
) -> list[str]:
    """Our files of which a function ran while `python -m module argv` did, threads included; only
    between the calls of two functions, FILE:NAME each, where these are given."""
    seen = set()
    counting = since is None

    def note(frame, event, _):
        nonlocal counting
        place = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
        if event == "call" and since is not None and place.endswith(since):
            counting = True
        if event == "call" and until is not None and place.endswith(until):
            counting = False
        # bodies of modules and classes run when they are imported, and are not optimised
        is_function = bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED)
        if event == "call" and is_function and counting:
            seen.add(frame.f_code.co_filename)

    sys.argv = [module, *argv]
    sys.path.insert(0, str(ROOT))
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit:
        pass
    finally:
        sys.setprofile(None)
    ours = [Path(name).relative_to(ROOT) for name in seen if Path(name).is_relative_to(ROOT)]
    return sorted(str(path) for path in ours if path.parts[0] in PACKAGES)


def main(argv: list[str] | None = None) -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description="How the product reads, in numbers.")
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--list", type=Path, nargs="+", help="files or folders to look into")
    parser.add_argument("--since", help="FILE:FUNCTION at whose call --entered begins to count")
    parser.add_argument("--until", help="FILE:FUNCTION at whose call it ends")
    parser.add_argument("--entered", nargs=argparse.REMAINDER, help="module and its arguments")
    args = parser.parse_args(argv)
    if args.entered:
        module, *rest = args.entered
        files = entered_files(module, rest, since=args.since, until=args.until)
        print("\n".join(files), f"{len(files)} files", sep="\n")
        return 0
    if args.list:
        list_places(args.list)
        return 0
    if args.before:
        print("before\n")
        show_table(table(args.before))
        print("\nafter\n")
    show_table(table(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
