"""The command `hf-kvattn train-tiny`, from a checkout: `python scripts/train_tiny.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("train-tiny"))
