"""The command `describe`."""

from __future__ import annotations

import argparse

from hf_kvattn.describe import describe
from hf_kvattn.tools.command_line import Command

HELP = """Which backends this machine has, and which one each case takes.

    hf-kvattn
    hf-kvattn describe
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    pass  # it takes none


def _main(args: argparse.Namespace) -> int:
    print(describe())
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
