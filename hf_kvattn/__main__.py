"""`python -m hf_kvattn COMMAND ...`, which is `hf-kvattn COMMAND ...` (`tools/commands.py`)."""

import sys

from hf_kvattn.tools.commands import main

if __name__ == "__main__":
    sys.exit(main())
