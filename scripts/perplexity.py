"""The command `hf-kvattn perplexity`, from a checkout: `python scripts/perplexity.py --help`."""

import sys

from hf_kvattn.__main__ import script

sys.exit(script("perplexity"))
