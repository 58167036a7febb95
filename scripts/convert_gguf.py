"""The command `hf-kvattn convert-gguf`, from a checkout: `python scripts/convert_gguf.py --help`."""

import sys

from hf_kvattn.tools.commands import script

sys.exit(script("convert-gguf"))
