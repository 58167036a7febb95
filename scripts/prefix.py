"""The command `hf-kvattn prefix`, from a checkout: `python scripts/prefix.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("prefix"))
