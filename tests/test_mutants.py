"""The mutations of tests/mutants.py fit the code as it is, and the script tells a killed one from
a survivor without changing the tree. What the mutations find is run on demand.
"""

import ast
from collections import Counter
from dataclasses import replace

import pytest
from conftest import ROOT
from mutants import (
    BROKEN,
    KILLED,
    MUTANTS,
    SURVIVED,
    TIMED_OUT,
    Result,
    StaleMutant,
    chosen,
    mutated,
    table,
    try_mutant,
)

# without torch: a second instead of ten
QUICK = chosen(["selection-ties"])[0]
LEAST, LEAST_OF_A_PACKAGE = 60, 10


def test_every_mutation_occurs_once_leaves_python_behind_and_names_tests_that_are_there():
    problems = []
    for mutant in MUTANTS:
        try:
            ast.parse(mutated(mutant))
        except (StaleMutant, SyntaxError) as error:
            problems.append(f"{mutant.name}: {error}")
        for test in mutant.tests:
            file, _, name = test.partition("::")
            function = name.partition("[")[0]
            if f"def {function}" not in (ROOT / "tests" / file).read_text():
                problems.append(f"{mutant.name}: {test} is not there")
    assert problems == []


def test_names_are_unique_and_all_packages_have_mutations():
    names = Counter(mutant.name for mutant in MUTANTS)
    assert [name for name, count in names.items() if count > 1] == []
    packages = Counter(mutant.file.partition("/")[0] for mutant in MUTANTS)
    assert len(names) >= LEAST and len(packages) == 4
    assert all(mutant.old != mutant.new and mutant.why for mutant in MUTANTS)
    assert min(packages.values()) >= LEAST_OF_A_PACKAGE


def test_a_mistake_is_killed_and_none_survives_and_the_tree_stays_as_it_is():
    before = (ROOT / QUICK.file).read_bytes()
    killed = try_mutant(QUICK)
    assert killed.outcome == KILLED and not killed.is_fault
    assert "test_equal_patches_are_taken_in_order" in killed.noticed_by
    nothing = try_mutant(replace(QUICK, new=QUICK.old))
    assert nothing.outcome == SURVIVED and nothing.is_fault
    assert (ROOT / QUICK.file).read_bytes() == before


def test_what_cannot_be_imported_or_does_not_end_is_not_called_killed():
    cut = try_mutant(
        replace(QUICK, old="import numpy as np", new="import numpy as np\nimport nowhere")
    )
    assert cut.outcome == BROKEN and cut.is_fault
    endless = replace(
        QUICK,
        old="    best = np.argsort(-s",
        new="    while True: pass\n    best = np.argsort(-s",
    )
    assert try_mutant(endless, limit_s=2).outcome == TIMED_OUT


def test_a_mutation_that_no_longer_fits_is_an_error_that_names_it():
    with pytest.raises(StaleMutant, match="selection-ties: its text occurs 0 times"):
        try_mutant(replace(QUICK, old="as it once was"))
    with pytest.raises(ValueError, match="no mutation is called nobody: see --list"):
        chosen(["nobody"])


def test_the_table_begins_with_what_is_to_be_done():
    equal = replace(QUICK, name="equal", equivalent="nothing reads it")
    results = [
        Result(QUICK, KILLED, seconds=2.4, noticed_by="a.py::test_b"),
        Result(equal, SURVIVED, seconds=3.0, noticed_by="3 passed"),
        Result(replace(QUICK, name="lost"), SURVIVED, seconds=1.0, noticed_by="3 passed"),
    ]
    lines = table(results).splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[:3]] == [
        "lost",
        "equal",
        QUICK.name,
    ]
    assert "survived (nothing reads it)" in lines[1]
    assert lines[-1] == "3 mutations: 1 killed, 2 survived."
