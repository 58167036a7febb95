"""Make the model card of a results folder from its results.json alone.

    python scripts/make_model_card.py model_cards/*
    python scripts/make_model_card.py results --output card.md
    python scripts/make_model_card.py model_cards/* --check

The card is the folder's README.md. A file there that this script did not write is left alone, with exit status 2.
With --check nothing is written, and the exit status is 1 when a card differs from what the results give.
"""

from __future__ import annotations

import argparse
import sys

from hf_kvattn.evaluation import cards, inputs


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="what --output of the measuring scripts named")
    parser.add_argument("--output", metavar="FILE", help="write one folder's card there; None means its README.md")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    args = parser.parse_args(arguments)
    if args.output is not None and (args.check or len(args.folders) > 1):
        parser.error("--output takes one folder, and no --check")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if not args.check:
        for folder in args.folders:
            print(f"written: {cards.write(folder, args.output)}")
        return 0
    differing = [folder for folder in args.folders if not cards.check(folder)]
    for folder in differing:
        print(f"{folder}: README.md is not what results.json gives")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
