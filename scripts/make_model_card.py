"""The command `hf-kvattn card`, from a checkout: `python scripts/make_model_card.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("card"))
