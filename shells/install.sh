#!/usr/bin/env bash
# Creates .venv once and installs the project into it; sourced by demo.sh and test.sh.
# Chooses the GPU extras where nvidia-smi finds a GPU, else the CPU extras at the tested versions.
# A second run sees that nothing changed and installs nothing.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${UNIVIT_INSTALLED:-}" ]; then return 0; fi # in the image, where all is there

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    extras="gpu,eval,lmm,test"
    constraints="docker/constraints-gpu.txt"
else
    extras="cpu,eval,lmm,test"
    constraints="docker/constraints-cpu.txt"
fi

stamp=".venv/installed-$(cat pyproject.toml "$constraints" | cksum | cut -d' ' -f1)-${extras//,/-}"
if [ ! -f "$stamp" ]; then
    echo "installing into .venv ($extras); this happens once"
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable ".[$extras]"
    rm -f .venv/installed-*
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
# one thread per process: torchrun would set it anyway, with a warning
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
