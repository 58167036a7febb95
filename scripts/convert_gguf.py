"""Turn a GGUF file into a safetensors folder that transformers loads by itself.

    python scripts/convert_gguf.py model.Q4_K_M.gguf --output model
    python scripts/convert_gguf.py model.f16.gguf --output model --dtype float16 --max-shard-size 2GB
    python scripts/convert_gguf.py smollm2-135m --output smollm2 --json

The folder holds weights, config, tokenizer with its chat template, generation config and a card. It is loaded back, and
gets its name only when its logits are equal to those of the GGUF-loaded model, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import sys

from tabulate import tabulate

from hf_kvattn.convert import gguf
from hf_kvattn.evaluation import inputs


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    parser.add_argument("source", help=f"a .gguf file, or {inputs.SMOLLM2}")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="of the written weights")
    parser.add_argument("--max-shard-size", default="5GB", help="of one safetensors file")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON in the last line of stdout")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    found = gguf.convert(args.source, args.output, inputs.DTYPES[args.dtype], args.max_shard_size)
    print(tabulate([[name, size] for name, size in found["files_bytes"].items()], ["file", "bytes"], "github"))
    print(f"\nwritten: {args.output}, logits of {found['logits_equal_tokens']} tokens equal, bit by bit")
    if args.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
