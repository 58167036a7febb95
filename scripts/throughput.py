"""The command `hf-kvattn throughput`, from a checkout: `python scripts/throughput.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("throughput"))
