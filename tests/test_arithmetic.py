"""Both sides of every comparison of bits compute with the same number of threads."""

import re

import torch
from conftest import NUM_THREADS, NUMERIC, ROOT, run, torchrun

from training.distributed import process_group

# one string, since two ranks print into one pipe
REPORT = "import torch; print(f'<{torch.get_num_threads()}>')"
IN_A_GROUP = (
    "import torch; from training.distributed import process_group\n"
    "with process_group(): print(f'<{torch.get_num_threads()}>')"
)


def test_this_process_its_children_and_their_ranks_have_one_number_of_threads(tmp_path):
    script = tmp_path / "report.py"
    script.write_text(IN_A_GROUP)
    printed = [
        run("-c", REPORT).stdout,
        run("-c", IN_A_GROUP).stdout,
        torchrun(2, script).stdout,
    ]
    threads = [int(number) for text in printed for number in re.findall(r"<(\d+)>", text)]
    assert threads == [int(NUM_THREADS)] * 4
    with process_group():
        assert torch.get_num_threads() == int(NUM_THREADS)
    assert torch.get_num_threads() == int(NUM_THREADS)


def test_no_test_chooses_threads_of_its_own():
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.name != "test_arithmetic.py":
            assert "OMP_NUM_THREADS" not in path.read_text(), path


def test_a_number_of_threads_that_is_none_is_named():
    done = run("-c", IN_A_GROUP, check=False, UNIVIT_NUM_THREADS="many")
    assert done.returncode and "UNIVIT_NUM_THREADS is 'many'" in done.stderr


def test_every_numeric_file_exists():
    assert [name for name in NUMERIC if not (ROOT / name).is_file()] == []
