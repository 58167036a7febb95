"""One layer's decode attention against the speed at which this machine reads memory.

python scripts/bandwidth.py
python scripts/bandwidth.py --heads 32 8 128 --context 4096 --output results
python scripts/bandwidth.py --queries 512 --rounds 5
python scripts/bandwidth.py --native-variant avx2
"""

from __future__ import annotations

import argparse
import sys

import torch

from hf_kvattn.evaluation import bandwidth, inputs, report
from hf_kvattn.kernels import native


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    parser.add_argument(
        "--heads", nargs=3, type=inputs.positive_int, default=[9, 3, 64], help="query heads, KV heads, head_dim"
    )
    parser.add_argument("--context", type=inputs.positive_int, default=8192, help="stored tokens")
    parser.add_argument(
        "--queries", type=inputs.positive_int, default=1, help="query tokens: more are a prompt's chunk"
    )
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="of queries, keys and values")
    parser.add_argument("--rounds", type=inputs.positive_int, default=20, help="turns")
    parser.add_argument("--native-variant", help="of the native kernels, avx2 for example; None takes the CPU's best")
    parser.add_argument("--threads", type=inputs.positive_int, help="CPU threads; None leaves it to torch")
    parser.add_argument("--out", "--output", metavar="DIR", help="write results.json, report.md and a plot there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    args = parser.parse_args(arguments)
    report.check_out_dir(args.out)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    native.select_variant(args.native_variant)
    results = bandwidth.measure(*args.heads, args.context, inputs.DTYPES[args.dtype], args.rounds, args.queries)
    args.model = "one layer, {} query and {} KV heads of {}".format(*args.heads)
    args.text, args.backend = "random numbers", "each in turn"
    report.finish({"kind": "bandwidth"} | results | {"conditions": inputs.conditions(None, args)}, args.out, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
