"""The command `hf-kvattn claims`, from a checkout: `python scripts/attention_claims.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("claims"))
