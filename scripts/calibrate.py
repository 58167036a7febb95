"""The command `hf-kvattn calibrate`, from a checkout: `python scripts/calibrate.py --help`."""

import sys

from hf_kvattn.__main__ import script

sys.exit(script("calibrate"))
