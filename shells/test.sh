#!/usr/bin/env bash
# Installs once, then runs lint and all tests that this machine can run. Arguments go to pytest:
#   bash shells/test.sh                     everything
#   bash shells/test.sh -m "not e2e"        without the slowest tier
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
unset OMP_NUM_THREADS

ruff check .
ruff format --check .
python -m pytest --durations=10 "$@"
