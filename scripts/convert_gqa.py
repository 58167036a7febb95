"""Give a Llama-style model fewer KV heads, or as many as it has query heads, and measure what that costs.

    python scripts/convert_gqa.py --model ./my-mha --kv-heads 8 --output my-gqa
    python scripts/convert_gqa.py --kv-heads 1 --compare mean cluster --text book.txt --output smollm2-mqa
    python scripts/convert_gqa.py --model ./my-mha --kv-heads 2 --compare mean --uptrain-steps 100 --output my-gqa
    python scripts/convert_gqa.py --model ./my-gqa --expand --output my-mha

The folder holds config, safetensors and tokenizer of the model converted by --method, results.json, report.md, a plot
and a card. The checkpoint is loaded back, and gets its name only when its logits are equal. --compare measures other
methods beside it, and --uptrain-steps distils each from the original on the calibration text.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from hf_kvattn.convert import compare, gqa, output
from hf_kvattn.evaluation import cards, inputs, report


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    parser.add_argument("--model", default=inputs.SMOLLM2, help=f"hub id, folder, .gguf file or {inputs.SMOLLM2}")
    heads = parser.add_mutually_exclusive_group(required=True)
    heads.add_argument(
        "--kv-heads", type=inputs.positive_int, help="how many there shall be; a divisor of what there are"
    )
    heads.add_argument("--expand", action="store_true", help="one KV head for each query head, exact")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--method", choices=gqa.METHODS, help="of the written model; None means activation")
    parser.add_argument("--compare", nargs="*", choices=gqa.METHODS, default=[], help="methods measured beside it")
    parser.add_argument(
        "--calibration-text", default="pydoc", help="to calibrate and train on: a file, wikitext or pydoc"
    )
    parser.add_argument(
        "--calibration-windows", type=inputs.positive_int, default=16, help="of it, evenly spread, for 'activation'"
    )
    parser.add_argument("--text", default="wikitext", help="other text to measure on: a file, wikitext or pydoc")
    parser.add_argument("--windows", type=inputs.positive_int, default=8, help="of it")
    parser.add_argument("--window", type=inputs.positive_int, default=512, help="tokens of a window")
    parser.add_argument("--uptrain-steps", type=int, default=0, help="of distillation from the original")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the distillation, at its highest")
    parser.add_argument("--batch-size", type=inputs.positive_int, default=4, help="windows of a distillation step")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="of the written weights")
    parser.add_argument("--max-shard-size", default="5GB", help="of one safetensors file")
    parser.add_argument("--threads", type=inputs.positive_int, help="CPU threads; None leaves it to torch")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in the last line of stdout")
    parser.set_defaults(backend="stock attention")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.text == args.calibration_text:
        raise ValueError(
            f"--text and --calibration-text are both {args.text!r}: measure on text the method has not seen"
        )
    if args.uptrain_steps < 0:
        raise ValueError(f"--uptrain-steps is {args.uptrain_steps}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.expand and (args.method or args.compare):
        raise ValueError("--expand is exact: it takes no --method and nothing to --compare")
    methods = [compare.EXPAND] if args.expand else list(dict.fromkeys([args.method or "activation", *args.compare]))
    with output.new_folder(args.output) as folder:
        report.require_plotting()
        calibration_text, text = inputs.load_text(args.calibration_text), inputs.load_text(args.text)
        model, tokenizer = inputs.load_model(args.model, torch.float32)
        heldout = inputs.load_tokens(tokenizer, text, args.windows * args.window).view(args.windows, args.window)
        converted, results = compare.compare(
            model,
            methods,
            kv_heads=args.kv_heads,
            text_windows=inputs.load_windows(tokenizer, calibration_text, args.window),
            calibration_windows=args.calibration_windows,
            heldout_windows=heldout,
            uptrain_steps=args.uptrain_steps,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            progress=True,
        )
        output.cast(converted, inputs.DTYPES[args.dtype])
        output.save(converted, tokenizer, folder, args.max_shard_size)
        compare.complete(results, model, converted, heldout)
        results["conditions"] = inputs.conditions(model, args)
        report.write(results, folder)
        cards.write(folder)
    print(report.table(results))
    print(f"written: {args.output}")
    if args.json:
        print(json.dumps(results, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
