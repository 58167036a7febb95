#!/usr/bin/env bash
# Makes an environment and passes all tests: style, types, the suite, and the parts that meet transformers once more
# with the oldest version supported.
#
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(bash scripts/environment.sh test test | tail -n 1)
bin=$environment/bin
bash scripts/flash_attn.sh "$environment"
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
PYTHONPATH=$environment/oldest "$bin/pytest" tests/test_masks.py tests/test_plugin.py tests/test_generate.py \
  tests/test_static_cache.py
echo "transformers $("$bin/python" -c 'import transformers; print(transformers.__version__)'):"
exec "$bin/pytest" "$@"
