"""The command `hf-kvattn card`, from a checkout: `python scripts/make_model_card.py --help`."""

import sys

from hf_kvattn.__main__ import script

sys.exit(script("card"))
