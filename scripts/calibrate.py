"""Choose how many bits each layer's keys and values get in a quantized cache, on text.

    python scripts/calibrate.py --model ./my-model
    python scripts/calibrate.py --output smollm2-int4.json --report results
    python scripts/calibrate.py --model ./my-model --bits 2 --budget 3.5 --report results --text book.txt
    python scripts/calibrate.py --model ./my-model --export-scales my-model-fp8-cache

The file goes into the model's folder, where enable(model, cache="int4") finds it, or to --output, for
QuantizedKVCache(config, calibration=FILE). --report measures the cache beside uncalibrated ones on other text.
--export-scales writes the model with the scales that vLLM reads for its fp8 cache (compressed-tensors).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch

from hf_kvattn.caches.configs import check_config, kv_shape
from hf_kvattn.convert import calibrate, output
from hf_kvattn.evaluation import inputs, report
from hf_kvattn.quant.calibration import file_name


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    parser.add_argument("--model", default=inputs.SMOLLM2, help=f"hub id, folder, .gguf file or {inputs.SMOLLM2}")
    parser.add_argument("--output", metavar="FILE", help="the file to write; None means the model's own folder")
    parser.add_argument("--bits", type=int, choices=(8, 4, 2), default=4, help="of the cache it stands in for")
    parser.add_argument("--budget", type=float, help="bits a number, scales included; None means what --bits take")
    parser.add_argument("--group-size", type=inputs.positive_int, help="of values; None means the best")
    parser.add_argument("--calibration-text", default="pydoc", help="a file, wikitext or pydoc")
    parser.add_argument("--calibration-windows", type=inputs.positive_int, default=8, help="of it, evenly spread")
    parser.add_argument("--window", type=inputs.positive_int, default=1024, help="tokens of a window")
    parser.add_argument("--report", metavar="DIR", help="measure, and write results.json, report.md and a plot there")
    parser.add_argument("--text", default="wikitext", help="other text for --report: a file, wikitext or pydoc")
    parser.add_argument("--windows", type=inputs.positive_int, default=4, help="of it")
    parser.add_argument("--stride", type=inputs.positive_int, default=32, help="tokens at once; 1 is exact decoding")
    parser.add_argument("--export-scales", metavar="DIR", help="write the model with k_scale and v_scale there")
    parser.add_argument("--scales", choices=calibrate.SCALES, default="tensor", help="one each, or one a KV head")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="to measure and to export in")
    parser.add_argument("--threads", type=inputs.positive_int, help="CPU threads; None leaves it to torch")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in the last line of stdout")
    parser.set_defaults(backend="auto")
    return parser.parse_args(arguments)


def output_path(args: argparse.Namespace) -> Path:
    if args.output is None and not Path(args.model).is_dir():
        raise ValueError(f"{args.model!r} is no local folder to put the calibration in: give --output FILE")
    path = Path(args.output or Path(args.model, file_name(f"int{args.bits}")))
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already: move it away or choose another --output")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the output {path.name}")
    return path


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    path = output_path(args)
    report.check_out_dir(args.report)
    if args.report is not None and args.text == args.calibration_text:
        raise ValueError(f"--text and --calibration-text are both {args.text!r}: measure on text it has not seen")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(output.new_folder(args.export_scales)) if args.export_scales else None
        calibration_text = inputs.load_text(args.calibration_text)
        text = inputs.load_text(args.text) if args.report else ""
        model, tokenizer = inputs.load_model(args.model, torch.float32)
        check_config(model.config)
        head_dim = kv_shape(model.config.get_text_config(decoder=True))[1]
        sizes = calibrate.group_sizes(head_dim)
        if not sizes or args.group_size not in (None, *sizes):
            raise ValueError(f"the group size of a head_dim of {head_dim} is one of {sizes}, not {args.group_size}")
        sizes = [args.group_size] if args.group_size else sizes
        budget = args.budget
        if budget is None:
            budget = calibrate.budget_of(args.bits, args.group_size or calibrate.default_group_size(head_dim))
        calibrate.check_budget(budget, sizes)
        heldout = inputs.load_tokens(tokenizer, text, args.windows * args.window) if args.report else None
        windows = calibrate.spread(tokenizer, calibration_text, args.calibration_windows, args.window)
        found = calibrate.measure(model, windows, sizes, progress=True)
        calibration, predicted = calibrate.choose(model, found, budget)
        print(
            f"{calibration.bits_per_element:.3f} bits a number in groups of {calibration.group_size}; "
            f"predicted KLD {predicted:.5f} nats a token"
        )
        print(f"keys   {calibration.key_bits}\nvalues {calibration.value_bits}")
        if calibration.skip_layers:
            print(f"exact layers {calibration.skip_layers}")
        output.cast(model, inputs.DTYPES[args.dtype])
        results = None
        if heldout is not None:
            results = calibrate.compare(
                model,
                calibration,
                found,
                args.bits,
                heldout,
                window=args.window,
                windows=args.windows,
                stride=args.stride,
                progress=True,
            )
            results["conditions"] = inputs.conditions(model, args) | {
                "calibration_text": inputs.source_name(args.calibration_text)
            }
            print(report.table(results))
        if folder is not None:
            calibrate.export_scales(model, tokenizer, found, folder, args.scales)
        if results is not None:
            report.write(results, args.report)
        calibration.save(path)
    print("written: " + ", ".join(str(each) for each in (path, args.report, args.export_scales) if each))
    if args.json:
        print(json.dumps(results, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
