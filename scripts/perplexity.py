"""Compare what caches do to the predictions of your model: perplexity, KL divergence, same top-1.

    python scripts/perplexity.py
    python scripts/perplexity.py --out results --windows 2 --stride 128
    python scripts/perplexity.py --model ./my-model --text book.txt --stride 1 --variants none kvattn-static
    python scripts/perplexity.py --stream 65536 --text book.txt --out results

The stock cache of generate() is always the first row, and what the others are compared with.
With --stream, one text is fed through one cache instead: a window with sinks, at positions from 0 and from 4,000,000,
the window alone, and everything kept; then decode steps and prompts are timed with the same window.
"""

from __future__ import annotations

import argparse
import sys

from hf_kvattn.evaluation import inputs, perplexity, report, stream, variants


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    inputs.add_arguments(parser, variants.default_names())
    parser.add_argument("--window", type=inputs.positive_int, default=2048, help="tokens of one piece of text")
    parser.add_argument("--prefill", type=inputs.positive_int, default=1024, help="its first tokens, not scored")
    parser.add_argument("--stride", type=inputs.positive_int, default=32, help="tokens at once; 1 is exact decoding")
    parser.add_argument("--windows", type=inputs.positive_int, default=4, help="how many pieces of text")
    usual = stream.Plan()
    parser.add_argument("--stream", type=inputs.positive_int, metavar="TOKENS", help="measure a stream of this length")
    parser.add_argument("--stream-window", type=inputs.positive_int, default=usual.window, help="its window")
    parser.add_argument("--stream-sinks", type=int, default=usual.sinks, help="its sinks")
    parser.add_argument(
        "--stream-full", type=inputs.positive_int, default=usual.full_tokens, help="where keeping everything ends"
    )
    parser.add_argument(
        "--stream-prompts", type=inputs.positive_int, nargs="+", default=list(usual.prompts), help="lengths timed"
    )
    parser.add_argument("--rounds", type=inputs.positive_int, default=usual.rounds, help="turns of what is timed")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    chosen = variants.select(args.variants)
    plan = None if args.stream is None else stream_plan(args)

    def measure(model, tokenizer, text):
        if plan is not None:
            return stream.measure(model, inputs.load_tokens(tokenizer, text, plan.tokens + 1), plan, progress=True)
        return perplexity.measure(
            model,
            inputs.load_tokens(tokenizer, text, args.windows * args.window),
            variants=chosen,
            window=args.window,
            prefill=args.prefill,
            stride=args.stride,
            windows=args.windows,
            progress=True,
        )

    report.measured(args, measure)
    return 0


def stream_plan(args: argparse.Namespace) -> stream.Plan:
    plan = stream.Plan.of_length(
        args.stream,
        window=args.stream_window,
        sinks=args.stream_sinks,
        full_tokens=args.stream_full,
        prompts=tuple(args.stream_prompts),
        rounds=args.rounds,
    )
    plan.check()
    return plan


if __name__ == "__main__":
    sys.exit(inputs.run(main))
