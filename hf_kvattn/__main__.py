"""Which backends this machine has and which cache a model needs.

python -m hf_kvattn                                       # what works here, and which backend each case takes
python -m hf_kvattn plan ./my-model --context 32768 --gpu-gib 24
python -m hf_kvattn plan config.json --batch 8 --context 8192 --gpu-gib 80 --weights-gib 4.5 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from transformers import AutoConfig, PreTrainedConfig

from .describe import describe
from .evaluation import inputs
from .planning import plan


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hf_kvattn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    planning = commands.add_parser(
        "plan",
        help="bytes of each cache, and the longest context that fits",
        description=__doc__,
        formatter_class=inputs.HelpFormatter,
    )
    planning.add_argument("model", help=f"hub id, folder, config.json, .gguf file or {inputs.SMOLLM2}")
    planning.add_argument("--batch", type=inputs.positive_int, default=1, help="rows; beams count as rows")
    planning.add_argument("--context", type=inputs.positive_int, required=True, help="tokens of a row")
    planning.add_argument("--gpu-gib", type=gib, required=True, metavar="GIB", help="memory for weights and cache")
    planning.add_argument("--weights-gib", type=gib, metavar="GIB", help="of quantized weights; None: from the config")
    planning.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="of weights and exact tokens")
    planning.add_argument("--json", action="store_true", help="print the plan as JSON in the last line of stdout")
    return parser.parse_args(arguments)


def gib(text: str) -> int:
    """An argparse type: gibibytes as bytes."""
    n_bytes = int(float(text) * (1 << 30))
    if n_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return n_bytes


def load_config(name: str) -> PreTrainedConfig:
    path = inputs.gguf_path(name)
    if path is None:
        return AutoConfig.from_pretrained(name)
    return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.command is None:
        print(describe())
        return 0
    dtype = inputs.DTYPES[args.dtype]
    result = plan(load_config(args.model), args.batch, args.context, dtype, args.gpu_gib, args.weights_gib)
    print(result)
    if args.json:
        print(json.dumps(dataclasses.asdict(result) | {"dtype": args.dtype, "choice": result.choice}))
    return 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
