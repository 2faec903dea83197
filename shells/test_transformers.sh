#!/usr/bin/env bash
# Runs the model tests with an older transformers, laid over the installed environment:
#   bash shells/test_transformers.sh           4.57.3, the oldest that is supported
#   bash shells/test_transformers.sh VERSION   another one
# The suite of test.sh runs them with the pinned, current one. Needs a package index once.
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

version="${1:-4.57.3}"
overlay=".venv/transformers-$version"
if [ ! -d "$overlay" ]; then
    # its dependencies except torch and numpy, which stay those of the environment
    pip install --quiet --disable-pip-version-check --target "$overlay.new" --no-deps "transformers==$version" \
        "huggingface-hub==0.36.0" "tokenizers==0.22.1" requests urllib3 charset-normalizer idna certifi
    mv "$overlay.new" "$overlay"
fi
PYTHONPATH="$PWD/$overlay" python -c "import transformers; assert transformers.__version__ == '$version'"
PYTHONPATH="$PWD/$overlay" python -m pytest tests/model_factory "${@:2}"
