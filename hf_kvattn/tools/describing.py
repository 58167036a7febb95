"""The command `describe`."""

import argparse

from hf_kvattn.describe import describe
from hf_kvattn.tools.command_line import Command

HELP = """Which backends this machine has, and which one each case takes.

    hf-kvattn
    hf-kvattn describe
"""


def _main(args: argparse.Namespace) -> int:
    print(describe())
    return 0


COMMAND = Command(HELP, lambda parser: None, _main)
