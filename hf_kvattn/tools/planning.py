"""The command `plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math

from hf_kvattn.planning import plan
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import Command, positive_int

HELP = """Bytes of each cache for a model, and the longest context that fits into a GPU beside its weights.

    hf-kvattn plan ./my-model --context 32768 --gpu-gib 24
    hf-kvattn plan config.json --batch 8 --context 8192 --gpu-gib 80 --weights-gib 4.5 --json
"""


def gib(text: str) -> int:
    """An argparse type: gibibytes as bytes."""
    n_bytes = float(text) * (1 << 30)
    if not 1 <= n_bytes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(n_bytes)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"hub id, folder, config.json, .gguf file or {inputs.SMOLLM2}")
    parser.add_argument("--batch", type=positive_int, default=1, help="rows; beams count as rows")
    parser.add_argument("--context", type=positive_int, required=True, help="tokens of a row")
    parser.add_argument("--gpu-gib", type=gib, required=True, metavar="GIB", help="memory for weights and cache")
    parser.add_argument("--weights-gib", type=gib, metavar="GIB", help="of quantized weights; None: from the config")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="of weights and exact tokens")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON in the last line of stdout")


def _main(args: argparse.Namespace) -> int:
    config, dtype = inputs.load_config(args.model), inputs.DTYPES[args.dtype]
    result = plan(config, args.batch, args.context, dtype, args.gpu_gib, args.weights_gib)
    print(result)
    if args.json:
        print(json.dumps(dataclasses.asdict(result) | {"dtype": args.dtype, "choice": result.choice}))
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
