"""The command `hf-kvattn gpu-check`, from a checkout: `python scripts/gpu_check.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("gpu-check"))
