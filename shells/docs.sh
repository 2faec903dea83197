#!/usr/bin/env bash
# Builds the documentation with its API reference into output/site; every warning is an error.
#   bash shells/docs.sh            then open output/site/index.html, or, as the search box needs a
#                                  server, run python3 -m http.server --directory output/site
# Sources are read, never imported, so an environment of its own with the extra `docs` is enough:
# .venv-docs, made once. DOCS_PYTHON names another Python that has the extra installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${DOCS_PYTHON:-.venv-docs/bin/python}"
if [ -z "${DOCS_PYTHON:-}" ]; then
    # only the extra, not the project with torch
    wanted="$(python3 - <<'PY'
import re
from pathlib import Path

text = Path("pyproject.toml").read_text()
print(" ".join(re.findall(r'"([^"]+)"', re.search(r"^docs = \[(.*?)\]$", text, re.M).group(1))))
PY
)"
    stamp=".venv-docs/installed-$(echo "$wanted" | cksum | cut -d' ' -f1)"
    if [ ! -f "$stamp" ]; then
        echo "installing $wanted into .venv-docs; this happens once"
        python3 -m venv .venv-docs
        # shellcheck disable=SC2086 # one word per package
        .venv-docs/bin/pip install --quiet --disable-pip-version-check $wanted
        rm -f .venv-docs/installed-*
        touch "$stamp"
    fi
fi
# silences a notice about the next major version of MkDocs, which the extra leaves out
NO_MKDOCS_2_WARNING=1 "$python" -m mkdocs build --strict
echo "output/site/index.html"
