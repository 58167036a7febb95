"""What beam search makes caches move at every step: bytes and milliseconds, on your model.

python scripts/beams.py
python scripts/beams.py --context 1024 --beams 8 --threads 2 --output results
python scripts/beams.py --model ./my-model --variants stock-dynamic kvattn-static-fit --json
"""

from __future__ import annotations

import argparse
import sys

from hf_kvattn.evaluation import beams, inputs, report, variants


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    inputs.add_arguments(parser, [variants.BASELINE, "kvattn-static-fit", "kvattn-int8", "kvattn-int4"])
    parser.add_argument("--context", type=inputs.positive_int, default=512, help="tokens of a prompt")
    parser.add_argument("--batch-size", type=inputs.positive_int, default=1, help="prompts")
    parser.add_argument("--beams", type=inputs.positive_int, default=4, help="for each prompt")
    parser.add_argument("--new-tokens", type=inputs.positive_int, default=64, help="steps")
    parser.add_argument("--rounds", type=inputs.positive_int, default=3, help="of timing, in turns")
    args = parser.parse_args(arguments)
    chosen = variants.select(args.variants)

    def measure(model, tokenizer, text):
        return beams.measure(
            model,
            inputs.load_tokens(tokenizer, text, args.batch_size * args.context),
            variants=chosen,
            context=args.context,
            batch_size=args.batch_size,
            beams=args.beams,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            progress=True,
        )

    report.measured(args, measure)
    return 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
