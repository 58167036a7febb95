"""Compare what caches do to the predictions of your model: perplexity, KL divergence, same top-1.

    python scripts/perplexity.py
    python scripts/perplexity.py --out results --windows 2 --stride 128
    python scripts/perplexity.py --model ./my-model --text book.txt --stride 1 --variants none kvattn-static

The stock cache of generate() is always the first row, and what the others are compared with.
"""

from __future__ import annotations

import argparse
import sys

import hf_kvattn
from hf_kvattn.evaluation import inputs, perplexity, report, variants


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    inputs.add_arguments(parser, list(variants.VARIANTS))
    parser.add_argument("--window", type=inputs.positive_int, default=2048, help="tokens of one piece of text")
    parser.add_argument("--prefill", type=inputs.positive_int, default=1024, help="its first tokens, not scored")
    parser.add_argument("--stride", type=inputs.positive_int, default=32, help="tokens at once; 1 is exact decoding")
    parser.add_argument("--windows", type=inputs.positive_int, default=4, help="how many pieces of text")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    chosen = variants.select(args.variants)
    report.check_out_dir(args.out)
    model, tokenizer, text = inputs.load_from_arguments(args)
    with hf_kvattn.backend(args.backend):
        results = perplexity.measure(
            model,
            inputs.load_tokens(tokenizer, text, args.windows * args.window),
            variants=chosen,
            window=args.window,
            prefill=args.prefill,
            stride=args.stride,
            windows=args.windows,
            progress=True,
        )
        results["conditions"] = inputs.conditions(model, args)
    report.finish(results, args.out, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
