"""The command `hf-kvattn convert-gqa`, from a checkout: `python scripts/convert_gqa.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("convert-gqa"))
