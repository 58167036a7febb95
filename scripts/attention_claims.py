"""What is said of attention and KV caches, measured on your machine: the stated figure beside the measured one.

    python scripts/attention_claims.py
    python scripts/attention_claims.py --output results --rounds 7 --new-tokens 21
    python scripts/attention_claims.py --model ./my-model --lengths 512 2048 --cache-lengths 8192 --contexts 128 1024

Standard against tiled and windowed attention, decoding with and without a cache, the caches of MHA, GQA, MQA and a
sliding window. Exits with status 1 when a cache that must be exact gives other tokens than the stock one.
"""

from __future__ import annotations

import argparse
import sys

from hf_kvattn.evaluation import claims, inputs, report, variants


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    inputs.add_arguments(parser, ["none", variants.BASELINE, "kvattn-static"])
    sizes = {"nargs": "+", "type": inputs.positive_int}
    lengths = [512, 1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--contexts", default=[128, 512, 1024, 2048], help="prompt tokens, for decoding", **sizes)
    parser.add_argument("--lengths", default=lengths, help="tokens of the prefill attention", **sizes)
    parser.add_argument("--cache-lengths", default=lengths[3:], help="tokens of the caches compared", **sizes)
    parser.add_argument(
        "--heads", nargs=3, type=inputs.positive_int, default=[8, 8, 64], help="of the prefill: query, KV, head_dim"
    )
    parser.add_argument("--window", type=inputs.positive_int, default=4096, help="visible tokens of the windowed rows")
    parser.add_argument(
        "--standard-gib", type=inputs.positive_int, default=8, help="skip standard attention where it needs more memory"
    )
    parser.add_argument("--rounds", type=inputs.positive_int, default=5, help="turns of everything that is timed")
    parser.add_argument("--new-tokens", type=inputs.positive_int, default=20, help="decoded in all rounds together")
    parser.add_argument(
        "--none-limit-s", type=float, default=60.0, help="skip decoding without a cache when a step takes longer"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    chosen = variants.select(args.variants)

    def measure(model, tokenizer, text):
        return claims.measure(
            model,
            tokenizer,
            inputs.load_tokens(tokenizer, text, max(args.contexts)),
            variants=chosen,
            contexts=args.contexts,
            lengths=args.lengths,
            cache_lengths=args.cache_lengths,
            heads=args.heads,
            window=args.window,
            standard_bytes=args.standard_gib * 2**30,
            rounds=args.rounds,
            new_tokens=args.new_tokens,
            none_limit_s=args.none_limit_s,
            progress=True,
        )

    return 1 if report.measured(args, measure)["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
