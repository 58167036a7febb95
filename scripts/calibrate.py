"""The command `hf-kvattn calibrate`, from a checkout: `python scripts/calibrate.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("calibrate"))
