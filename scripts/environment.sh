#!/usr/bin/env bash
# Makes (or completes) the virtual environment .venv/NAME with this package and EXTRAS:
#
#   bash scripts/environment.sh NAME EXTRAS
#
# PYTHON chooses the interpreter. Prints the environment's path as its last line.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 extras=$2
environment=$PWD/.venv/$name
[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment" >&2
pip() { "$environment/bin/python" -m pip --disable-pip-version-check "$@" >&2; }
# torch on its own first: nothing that comes later may choose another build of it.
pip install --quiet -c scripts/constraints.txt torch numpy
pip install --quiet -c scripts/constraints.txt ".[$extras]"
echo "$environment"
