#!/usr/bin/env bash
# Which lines of the four packages the tests run, in every process that a test starts or forks;
# what SIGKILL ends is not counted.
#
#   bash shells/coverage.sh                      everything, about twice as long as shells/test.sh
#   bash shells/coverage.sh tests/training       what ARGS for pytest choose
#
# The table is printed; output/coverage/html shows the lines.
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

folder="$PWD/output/coverage"
rm -rf "$folder"
mkdir -p "$folder"
export COVERAGE_FILE="$folder/data" # processes run in many folders
# absolute: tests/mutants.py copies the packages, and copies do not count
packages="$PWD/training,$PWD/model_factory,$PWD/data_pipeline,$PWD/eval_encoder"

failed=0
python -m coverage run --source="$packages" -m pytest --numprocesses "${TEST_WORKERS:-3}" \
    --dist loadfile --no-loadscope-reorder "$@" || failed=$?
python -m coverage combine --quiet
python -m coverage html --quiet --directory "$folder/html"
python -m coverage report --skip-covered
exit "$failed"
