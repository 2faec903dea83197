#!/usr/bin/env bash
# Installs once, then runs lint, types and all tests that this machine can run. Arguments are pytest's:
#   bash shells/test.sh                     everything
#   bash shells/test.sh -m "not e2e"        without the slowest tier
#   bash shells/test.sh --soak              with every case of every sweep (docs/testing.md)
# Without arguments, the numeric tests run twice more, under other arithmetic (test_arithmetic.sh),
# and the documentation is built.
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

ruff check .
ruff format --check .
python -m mypy
# three files at a time, as some of them wait, in the order of tests/conftest.py
python -m pytest --numprocesses "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder \
    --durations=10 "$@"
# one run sees one processor: the numeric tests again, as an older and a larger one would compute
if [ $# -eq 0 ]; then
    bash shells/test_arithmetic.sh --quick
    bash shells/docs.sh
fi
