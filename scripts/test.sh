#!/usr/bin/env bash
# Makes an environment and passes all tests: style, types, the parts that meet transformers with the oldest version
# supported, the jobs (suites that need a process of their own, see tests/README.md), and the suite.
#
#   bash scripts/test.sh [pytest arguments]
#   bash scripts/test.sh --slow
#
# Arguments go to the suite, and the jobs are left out. As many processes as there are cores run tests; `-n 0` is one.
# `--slow` runs what the first command leaves out, and nothing else: builds, long sweeps, whole measurements.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(bash scripts/environment.sh test test,doors | tail -n 1)
bin=$environment/bin
bash scripts/flash_attn.sh "$environment"
export OMP_NUM_THREADS=1
parallel=(-n logical --dist worksteal)

if [ "${1:-}" = --slow ]; then
  shift
  exec "$bin/pytest" "${parallel[@]}" -m slow "$@"
fi

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"

oldest=5.17.0
if [ ! -d "$environment/oldest/transformers" ]; then
  # Beside the environment's own version, which stays as it is. transformers does not depend on torch.
  "$bin/python" -m pip --disable-pip-version-check install --quiet --target "$environment/oldest.new" \
    --upgrade "transformers==$oldest"
  mv "$environment/oldest.new" "$environment/oldest"
fi
echo "transformers $oldest, the oldest supported:"
PYTHONPATH=$environment/oldest "$bin/pytest" "${parallel[@]}" tests/test_masks.py tests/test_plugin.py \
  tests/test_generate.py tests/caches/test_static_cache.py

job() {
  echo "$1:"
  "$bin/pytest" "${parallel[@]}" "$@"
}
triton_versions=(3.3.1 3.6.0 3.9.0) # beside the pinned one: what PyTorch 2.7 brings, what 2.11 does, and the newest
if [ $# -eq 0 ]; then
  if "$bin/python" -c 'import triton' 2>/dev/null; then
    TRITON_INTERPRET=1 job tests/jobs/triton_interpreter
    job tests/jobs/triton_codegen
    for version in "${triton_versions[@]}"; do
      beside=$environment/triton-$version
      if [ ! -d "$beside" ]; then
        # Interpreters before 3.7 do not work with a numpy that is newer.
        "$bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$beside.new" \
          "triton==$version" numpy==2.2.6
        mv "$beside.new" "$beside"
      fi
      echo "triton $version:"
      PYTHONPATH=$beside TRITON_INTERPRET=1 job tests/jobs/triton_interpreter -m every_triton
      PYTHONPATH=$beside job tests/jobs/triton_codegen -m every_triton
    done
  else
    echo "tests/jobs/triton_*: not run, triton is not installed"
  fi
  if command -v g++ >/dev/null; then
    job tests/jobs/graphs_on_fakes
  else
    echo "tests/jobs/graphs_on_fakes: not run, there is no g++"
  fi
  if command -v g++ >/dev/null && command -v cmake >/dev/null && grep -qsw avx2 /proc/cpuinfo; then
    job tests/jobs/emulated_avx512
  else
    echo "tests/jobs/emulated_avx512: not run, it needs g++, cmake and a CPU with AVX2"
  fi
  if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null && command -v cmake >/dev/null; then
    job tests/jobs/arm
  else
    echo "tests/jobs/arm: not run, it needs cmake and Debian's g++-aarch64-linux-gnu and qemu-user"
  fi
  job tests/jobs/model_sweep
  job tests/jobs/doors
fi
echo "transformers $("$bin/python" -c 'import transformers; print(transformers.__version__)'):"
exec "$bin/pytest" "${parallel[@]}" "$@"
