#!/usr/bin/env bash
# Makes the sdist and, from it, the wheel of this Linux machine, and tests the wheel where there is no compiler:
#
#   bash scripts/wheel.sh [pytest arguments]
#
# OUT (dist) is where both go. PYTHON is an interpreter with the extra `release`; .venv/release is made unless it is set.
# pyproject.toml tells cibuildwheel to do the same, for more platforms and in older Linuxes, whose wheels serve more.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(bash scripts/environment.sh release release | tail -n 1)/bin/python}
out=${OUT:-dist}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

unset CFLAGS CXXFLAGS CPPFLAGS LDFLAGS # `-march=native` would make a wheel for this machine alone
"$python" -m build --outdir "$work/built" .
PATH=$(dirname "$python"):$PATH "$python" -m auditwheel repair --exclude libgomp.so.1 \
  --wheel-dir "$work/repaired" "$work"/built/*.whl
mkdir -p "$out"
cp "$work"/built/*.tar.gz "$work"/repaired/*.whl "$out"

# The package must come from the wheel: no checkout is beside the tests, or in Python's path.
mkdir -p "$work/checkout/model_cards"
cp -r pyproject.toml tests scripts "$work/checkout"
cp -r model_cards/kernels "$work/checkout/model_cards"
"$python" -m venv "$work/clean"
(
  cd "$work/checkout"
  unset PYTHONPATH
  export OMP_NUM_THREADS=1 PATH=$work/clean/bin
  if command -v c++ cc g++ gcc clang; then
    echo "wheel.sh: there is a compiler" >&2
    exit 1
  fi
  pip() { command pip --disable-pip-version-check install --quiet --no-compile --only-binary :all: "$@"; }
  pip -c scripts/constraints.txt torch numpy
  pip -c scripts/constraints.txt "$work"/repaired/*.whl pytest pytest-timeout
  hf-kvattn describe
  pytest tests/kernels tests/test_package.py::test_one_openmp_runtime_is_shared_with_torch "$@"
)
