"""Compare the speed and memory of caches inside the real generate(), on your model.

    python scripts/throughput.py
    python scripts/throughput.py --out results --contexts 128 2048 --batch-sizes 1
    python scripts/throughput.py --model ./my-model --dtype float32 --variants stock-dynamic kvattn-static

Exits with status 1 when a cache that must be exact gives other tokens than the stock one, near ties excepted.
"""

from __future__ import annotations

import argparse
import sys

from hf_kvattn.evaluation import inputs, report, throughput, variants


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    inputs.add_arguments(parser, variants.default_names())
    parser.add_argument(
        "--contexts", nargs="+", type=inputs.positive_int, default=[128, 2048, 7900], help="prompt tokens"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=inputs.positive_int, default=[1, 8], help="prompts at once")
    parser.add_argument("--new-tokens", type=inputs.positive_int, default=45, help="decoded in all rounds together")
    parser.add_argument("--rounds", type=inputs.positive_int, default=5, help="turns of each cache")
    parser.add_argument(
        "--max-batch-tokens", type=inputs.positive_int, default=16384, help="skip batches with more prompt tokens"
    )
    parser.add_argument(
        "--none-limit-s", type=float, default=4.0, help="skip decoding without a cache when a step takes longer"
    )
    parser.add_argument(
        "--prompts-s",
        type=float,
        default=10.0,
        help="seconds for each cache's prompts: one a round, as far as they fit",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    chosen = variants.select(args.variants)
    needed = throughput.tokens_needed(args.contexts, args.batch_sizes, args.max_batch_tokens)

    def measure(model, tokenizer, text):
        return throughput.measure(
            model,
            tokenizer,
            inputs.load_tokens(tokenizer, text, needed),
            variants=chosen,
            contexts=args.contexts,
            batch_sizes=args.batch_sizes,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            none_limit_s=args.none_limit_s,
            prompts_s=args.prompts_s,
            max_batch_tokens=args.max_batch_tokens,
            progress=True,
        )

    return 1 if report.measured(args, measure)["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
