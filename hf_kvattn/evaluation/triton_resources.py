"""The command line of `codegen.py`, which needs triton: this file says so where there is none."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

from hf_kvattn.tools.command_line import Command
from hf_kvattn.tools.files import replace_text

HELP = """Compile the Triton kernels for NVIDIA and AMD GPUs, without one, and write down what they take.

    hf-kvattn triton-resources --output model_cards/kernels
    hf-kvattn triton-resources --output resources --targets sm_90
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="write triton.json and TRITON.md there")
    targets = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
    parser.add_argument("--targets", nargs="+", choices=targets, default=targets, help="GPUs to compile for")


def _main(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("triton is not installed: pip install triton")
    data, page = (Path(args.output) / name for name in ("triton.json", "TRITON.md"))
    for path in (data, page):
        if path.exists():
            raise ValueError(f"{path} exists already: move it away or choose another --output")
    from hf_kvattn.evaluation import codegen  # needs triton

    found = codegen.measure(args.targets)
    data.parent.mkdir(parents=True, exist_ok=True)
    replace_text(data, json.dumps(found, indent=1) + "\n")
    replace_text(page, codegen.table(found))
    print(f"{len(found['kernels'])} kernels: {page}")
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
