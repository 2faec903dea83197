"""Files and functions stay small enough to be read; no function body is written twice."""

import ast

import pytest
from conftest import ROOT

MAX_FILE, MAX_FUNCTION, MIN_DUPLICATE = 450, 60, 8
FILES = [
    p
    for pkg in ("model_factory", "data_pipeline", "training", "eval_encoder")
    for p in sorted((ROOT / pkg).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_and_its_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{node.name} is {length} lines"


def test_no_function_body_stands_twice():
    seen = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.FunctionDef)
                and node.end_lineno - node.lineno + 1 >= MIN_DUPLICATE
            ):
                body = "\n".join(ast.unparse(statement) for statement in node.body)
                place = f"{path.relative_to(ROOT)}:{node.name}"
                assert body not in seen, f"{place} repeats {seen[body]}"
                seen[body] = place


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "module without docstring"
    public = [
        n
        for n in tree.body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")
    ]
    for node in public:
        assert ast.get_docstring(node), f"{node.name} has no docstring"
