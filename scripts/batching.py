"""The command `hf-kvattn batching`, from a checkout: `python scripts/batching.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("batching"))
