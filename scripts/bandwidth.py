"""One layer's decode attention against the speed at which this machine reads memory.

python scripts/bandwidth.py
python scripts/bandwidth.py --heads 32 8 128 --context 4096 --json
"""

from __future__ import annotations

import argparse
import json

import torch

from hf_kvattn.evaluation import bandwidth, inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    parser.add_argument(
        "--heads", nargs=3, type=inputs.positive_int, default=[9, 3, 64], help="query heads, KV heads, head_dim"
    )
    parser.add_argument("--context", type=inputs.positive_int, default=8192, help="stored tokens")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="of queries, keys and values")
    parser.add_argument("--rounds", type=inputs.positive_int, default=20, help="turns")
    parser.add_argument("--threads", type=inputs.positive_int, help="CPU threads; None leaves it to torch")
    parser.add_argument("--json", action="store_true", help="print the result as JSON in the last line")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    found = bandwidth.measure(*args.heads, args.context, inputs.DTYPES[args.dtype], args.rounds)
    print(f"reading memory: {found['read_bytes_s'] / 1e9:.1f} GB/s with {torch.get_num_threads()} threads")
    print(f"keys and values of one layer at {args.context} tokens: {found['layer_bytes'] / 2**20:.1f} MiB\n")
    print("| backend | ms a layer (p20 to p80) | GB/s | share of the bandwidth |\n| :-- | --: | --: | --: |")
    for name, row in found["backends"].items():
        spread = "{median_ms:.3f} ({p20_ms:.3f} to {p80_ms:.3f})".format(**row)
        print(f"| {name} | {spread} | {row['bytes_s'] / 1e9:.1f} | {row['share']:.2f} |")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
