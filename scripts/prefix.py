"""A prefix computed once and loaded later: how long each takes, on your model.

    python scripts/prefix.py
    python scripts/prefix.py --context 2048 --threads 2 --output results
    python scripts/prefix.py --model ./my-model --variants kvattn-static --json

Exits with status 1 when a loaded cache gives other tokens than the one that was saved.
"""

from __future__ import annotations

import argparse
import sys

from hf_kvattn.evaluation import inputs, prefix, report, variants


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    inputs.add_arguments(parser, ["kvattn-static", "kvattn-int8", "kvattn-int4", "kvattn-int2"])
    parser.add_argument("--context", type=inputs.positive_int, default=2048, help="tokens of the prefix")
    parser.add_argument("--new-tokens", type=inputs.positive_int, default=16, help="decoded after it, to compare")
    parser.add_argument("--rounds", type=inputs.positive_int, default=5, help="turns of each cache")
    args = parser.parse_args(arguments)
    chosen = variants.select(args.variants)

    def measure(model, tokenizer, text):
        return prefix.measure(
            model,
            inputs.load_tokens(tokenizer, text, args.context + 1),
            variants=chosen,
            rounds=args.rounds,
            new_tokens=args.new_tokens,
            progress=True,
        )

    return 0 if all(row["same_tokens"] for row in report.measured(args, measure)["rows"]) else 1


if __name__ == "__main__":
    sys.exit(inputs.run(main))
