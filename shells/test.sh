#!/usr/bin/env bash
# Installs once, then runs lint and all tests that this machine can run. Arguments go to pytest:
#   bash shells/test.sh                     everything
#   bash shells/test.sh -m "not e2e"        without the slowest tier
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
unset OMP_NUM_THREADS

ruff check .
ruff format --check .
# two files at a time: most tests are single processes that start up
python -m pytest --numprocesses "${TEST_WORKERS:-2}" --dist loadfile --durations=10 "$@"
