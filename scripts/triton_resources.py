"""The command `hf-kvattn triton-resources`, from a checkout: `python scripts/triton_resources.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("triton-resources"))
