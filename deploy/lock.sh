#!/usr/bin/env bash
# Writes deploy/locks/*.txt anew: every package of the images with its version and hashes. Run it on purpose, read the
# diff, commit it. Needs uv; `UV_INDEX_URL` and the like name another index where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.13.0
lock() {
    uv pip compile --quiet --generate-hashes --no-header --no-annotate --upgrade \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --custom-compile-command deploy/lock.sh "$@"
}

# One version of torch in both variants: a checkpoint of one is read by the other.
lock --extra cluster --extra sample --constraint <(echo "torch==${torch}+cpu") \
    --find-links "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu/torch/}" \
    --output-file deploy/locks/cpu.txt pyproject.toml
lock --extra cluster --extra sample --constraint <(echo "torch==${torch}") \
    --output-file deploy/locks/cuda.txt pyproject.toml
