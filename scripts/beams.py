"""The command `hf-kvattn beams`, from a checkout: `python scripts/beams.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("beams"))
