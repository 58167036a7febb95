"""The command `hf-kvattn triton-resources`, from a checkout: `python scripts/triton_resources.py --help`."""

import sys

from hf_kvattn.__main__ import script

sys.exit(script("triton-resources"))
