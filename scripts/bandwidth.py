"""The command `hf-kvattn bandwidth`, from a checkout: `python scripts/bandwidth.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("bandwidth"))
