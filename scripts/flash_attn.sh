#!/usr/bin/env bash
# Installs flash-attn's Python code into the environment ENVIRONMENT, without its CUDA kernels, for which the tests have
# a stand-in. Needs no GPU and no CUDA, and leaves PyTorch alone.
#
#   bash scripts/flash_attn.sh ENVIRONMENT
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1/bin/python
"$python" -c 'import importlib.metadata as m; m.version("flash-attn")' 2>/dev/null && exit
pip() { "$python" -m pip --disable-pip-version-check install --quiet --no-deps -c scripts/constraints.txt "$@"; }
pip ninja packaging psutil setuptools wheel
# Without FORCE_BUILD its setup.py looks for a wheel with kernels; without SKIP_CUDA_BUILD it compiles them for hours.
FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE pip --no-build-isolation flash-attn
