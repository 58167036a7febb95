"""The command `hf-kvattn perplexity`, from a checkout: `python scripts/perplexity.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("perplexity"))
