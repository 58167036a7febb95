"""What a calibration gives: its cache beside uncalibrated ones on other text, and the command that makes one."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_kvattn.caches.configs import kv_shape
from hf_kvattn.caches.quantized import QuantizedKVCache
from hf_kvattn.convert import calibrate, output
from hf_kvattn.evaluation import perplexity
from hf_kvattn.evaluation.common import drawing, report
from hf_kvattn.evaluation.common.measurement import Measurement
from hf_kvattn.evaluation.common.variants import BASELINE, MakeCache, Variant
from hf_kvattn.quant.calibration import Calibration, default_group_size, file_name
from hf_kvattn.quant.codecs import codec_for
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import Command, positive_int
from hf_kvattn.tools.conditions import conditions, source_name
from hf_kvattn.tools.files import new_folder
from hf_kvattn.tools.tables import Column, digits, joined, table_of


def compare(
    model: PreTrainedModel,
    calibration: Calibration,
    found: calibrate.Sensitivity,
    bits: int,
    token_ids: torch.Tensor,
    window: int,
    **schedule: Any,
) -> dict[str, Any]:
    """Measure the calibrated cache beside uncalibrated ones on other text; a dict that JSON can hold.

    Args:
        bits: of the uncalibrated caches: one with the default group size, and one with the calibration's.
        token_ids: the text.
        window: tokens of a window; its first half is one prefill.
        schedule: what else `perplexity.measure` takes.
    """
    usual = default_group_size(calibration.head_dim, codec_for(bits))
    sizes = list(dict.fromkeys([usual, calibration.group_size]))
    caches: dict[str, tuple[MakeCache, float]] = {  # and the bits of their codes
        f"int{bits}, groups of {size}": (_make(bits=bits, group_size=size), calibrate.budget_of(bits, size))
        for size in sizes
    }
    caches["calibrated"] = _make(calibration=calibration), calibration.bits_per_element
    variants = [Variant(name, True, make, exact=False) for name, (make, _) in caches.items()]
    results = perplexity.measure(model, token_ids, variants=variants, window=window, prefill=window // 2, **schedule)
    rows = {row["variant"]: row for row in results["rows"]}
    for name, row in rows.items():
        row["code_bits"] = caches[name][1] if name in caches else None
        row["kld_share"] = rows["calibrated"]["kld_mean"] / row["kld_mean"] if row["kld_mean"] else None
    column, layers = calibrate.BITS.index(bits), []
    for i in range(calibration.layers):
        costs = found.keys[i, column].item(), found.values[calibration.group_size][i, column].item()
        chosen = calibration.key_bits[i], calibration.value_bits[i]
        key_bits, value_bits = (None, None) if i in calibration.skip_layers else chosen
        layer = {"layer": i, "key_bits": key_bits, "value_bits": value_bits}
        layers.append(layer | {"predicted_key_kld": costs[0], "predicted_value_kld": costs[1]})
    sizes_and_bits = {"group_size": calibration.group_size, "bits_per_element": calibration.bits_per_element}
    settings = results["settings"] | {"bits": bits, "calibration_tokens": found.tokens} | sizes_and_bits
    return results | {"kind": "calibration", "settings": settings, "layers": layers, "baseline": BASELINE}


def _make(**settings: Any) -> MakeCache:
    return lambda config, capacity: QuantizedKVCache(config, max_cache_len=capacity, **settings)


COLUMNS: list[Column] = [
    perplexity.CACHE_COLUMN,
    ("bits of codes", "code_bits", digits(".3f")),
    perplexity.BITS_COLUMN,
    *perplexity.AGAINST_STOCK,
    ("calibrated KLD over this", "kld_share", digits(".3f")),
    *perplexity.WORST,
]


def _tables(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        f"Bits of each layer's keys and values, and key widths, chosen on {settings['calibration_tokens']} tokens of "
        f"{results['conditions']['calibration_text']}; groups of {settings['group_size']}. Measured on other text: "
        f"{settings['windows']} windows of {settings['window']} tokens, {perplexity.how(settings)} Bits of codes count "
        "their scales; bits a number count exact tokens too, with what this length leaves of them.\n"
    )
    predicted = f"predicted KLD at {settings['bits']} bits"
    layer_columns: list[Column] = [
        ("layer", "layer", str),
        ("key bits", "key_bits", digits("d")),
        ("value bits", "value_bits", digits("d")),
        (f"keys: {predicted}", "predicted_key_kld", digits(".2e")),
        (f"values: {predicted}", "predicted_value_kld", digits(".2e")),
    ]
    return joined(notes, table_of(COLUMNS, results["rows"]), table_of(layer_columns, results["layers"]))


def _draw(results: dict[str, Any]) -> Any:
    """The bits of each layer's keys and values above what each costs at equal bits, and the KLD that this gives."""
    layers, bits = results["layers"], results["settings"]["bits"]
    figure = drawing.new_figure(max(7.0, 3.6 + 0.24 * len(layers)), 5.0, "Bits where they count", results["conditions"])
    panels = figure.subplot_mosaic(
        [["bits", "kld"], ["cost", "kld"]], width_ratios=[3.2, 1], height_ratios=[1, 2], gridspec_kw={"wspace": 0.08}
    )
    shades = {2: "#dbe9f9", 3: "#a9cbf0", 4: "#6ba3e2", 8: "#0b4aa2", None: "#222222"}
    chosen, cost, kld = (panels[name] for name in ("bits", "cost", "kld"))
    for y, part, shift in ((0, "key", -0.2), (1, "value", 0.2)):
        for x, layer_bits in ((layer["layer"], layer[f"{part}_bits"]) for layer in layers):
            chosen.bar(x, 0.9, width=0.92, bottom=0.55 - y, color=shades[layer_bits])
            ink = "white" if layer_bits in (8, None) else drawing.INK
            chosen.text(x, 1 - y, str(layer_bits or "-"), ha="center", va="center", fontsize=8, color=ink)
        costs = [1000 * layer[f"predicted_{part}_kld"] for layer in layers]
        places = [layer["layer"] + shift for layer in layers]
        cost.bar(places, costs, 0.4, color=drawing.OURS[y], label=f"{part}s")
    chosen.set_yticks([1, 0], ["keys", "values"], fontsize=9, color=drawing.INK)
    exact = any(layer["key_bits"] is None for layer in layers)
    drawing.caption(chosen, title="bits chosen" + (" (-: exact)" if exact else ""))
    chosen.tick_params(length=0, labelbottom=False)
    chosen.spines[:].set_visible(False)
    drawing.caption(cost, x="layer", y=f"predicted KLD at {bits} bits, 1e-3 nats")
    cost.legend(fontsize=8, frameon=False)
    drawing.plain(cost)
    for axes in (chosen, cost):
        axes.set_xlim(-0.7, len(layers) - 0.3)
    rows = [row for row in results["rows"] if row["code_bits"] is not None]
    found = [1000 * row["kld_mean"] for row in rows]
    colors = [drawing.OURS[0] if row["variant"] == "calibrated" else drawing.STOCK[1] for row in rows]
    bars = kld.bar(range(len(rows)), found, 0.6, color=colors)
    drawing.label_bars(kld, bars, [f"{value:.2f}" for value in found])
    names = [row["variant"].replace(", groups of ", "\ngroups of ") + f"\n{row['code_bits']:.2f} bits" for row in rows]
    kld.set_xticks(range(len(rows)), names)
    drawing.caption(kld, title="measured KLD, 1e-3 nats a token")
    kld.margins(y=0.08)
    drawing.plain(kld)
    kld.tick_params(axis="x", labelsize=7)
    return figure


MEASUREMENT = Measurement(
    "calibration", "Calibration", _tables, "calibrated_bits.png", _draw, perplexity.limits, perplexity.figures
)

HELP = """Choose how many bits each layer's keys and values get in a quantized cache, and each key channel, on text.

    hf-kvattn calibrate --model ./my-model
    hf-kvattn calibrate --output smollm2-int4.json --report results
    hf-kvattn calibrate --model ./my-model --bits 2 --budget 3.5 --report results --text book.txt
    hf-kvattn calibrate --model ./my-model --export-scales my-model-fp8-cache

The file goes into the model's folder, where enable(model, cache="int4") finds it, or to --output, for
QuantizedKVCache(config, calibration=FILE). --report measures the cache beside uncalibrated ones on other text.
--export-scales writes the model with the scales that vLLM reads for its fp8 cache (compressed-tensors).
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=inputs.SMOLLM2, help=f"hub id, folder, .gguf file or {inputs.SMOLLM2}")
    parser.add_argument("--output", metavar="FILE", help="the file to write; None means the model's own folder")
    parser.add_argument("--bits", type=int, choices=(8, 4, 3, 2), default=4, help="of the cache it stands in for")
    parser.add_argument("--budget", type=float, help="bits a number, scales included; None means what --bits take")
    parser.add_argument("--group-size", type=positive_int, help="of values; None means the usual one")
    parser.add_argument("--calibration-text", default="pydoc", help="a file, wikitext or pydoc")
    parser.add_argument("--calibration-windows", type=positive_int, default=4, help="of it, evenly spread")
    parser.add_argument("--window", type=positive_int, default=1024, help="tokens of a window")
    parser.add_argument("--report", metavar="DIR", help="measure, and write results.json, report.md and a plot there")
    parser.add_argument("--text", default="wikitext", help="other text for --report: a file, wikitext or pydoc")
    parser.add_argument("--windows", type=positive_int, default=4, help="of it")
    parser.add_argument("--stride", type=positive_int, default=32, help="tokens at once; 1 is exact decoding")
    parser.add_argument("--export-scales", metavar="DIR", help="write the model with k_scale and v_scale there")
    parser.add_argument("--scales", choices=calibrate.SCALES, default="tensor", help="one each, or one a KV head")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="to measure and to export in")
    parser.add_argument("--threads", type=positive_int, help="CPU threads; None leaves it to torch")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in the last line of stdout")
    parser.set_defaults(backend="auto")


def _output_path(args: argparse.Namespace) -> Path:
    if args.output is None and not Path(args.model).is_dir():
        raise ValueError(f"{args.model!r} is no local folder to put the calibration in: give --output FILE")
    path = Path(args.output or Path(args.model, file_name(f"int{args.bits}")))
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already: move it away or choose another --output")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the output {path.name}")
    return path


def _main(args: argparse.Namespace) -> int:
    path = _output_path(args)
    report.check_out_dir(args.report)
    if args.report is not None and args.text == args.calibration_text:
        raise ValueError(f"--text and --calibration-text are both {args.text!r}: measure on text it has not seen")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(new_folder(args.export_scales)) if args.export_scales else None
        calibration_text = inputs.load_text(args.calibration_text)
        text = inputs.load_text(args.text) if args.report else ""
        model, tokenizer = inputs.load_model(args.model, torch.float32)
        calibrate.kept_layers(model)
        head_dim = kv_shape(model.config.get_text_config(decoder=True))[1]
        assert head_dim is not None  # checked
        sizes = calibrate.group_sizes(head_dim)
        if not sizes or args.group_size not in (None, *sizes):
            raise ValueError(f"the group size of a head_dim of {head_dim} is one of {sizes}, not {args.group_size}")
        group_size = args.group_size or default_group_size(head_dim, codec_for(args.bits))
        sizes, uncalibrated = [group_size], calibrate.budget_of(args.bits, group_size)
        budget = uncalibrated if args.budget is None else args.budget
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
            schedule = {"windows": args.windows, "stride": args.stride, "progress": True}
            results = compare(model, calibration, found, args.bits, heldout, args.window, **schedule)
            results["conditions"] = conditions(model, args) | {"calibration_text": source_name(args.calibration_text)}
            print(report.table(results))
        if folder is not None:
            calibrate.export_scales(model, tokenizer, found, folder, args.scales)
        if results is not None:
            report.write(results, args.report)
        calibrate.save(calibration, path)
    print("written: " + ", ".join(str(each) for each in (path, args.report, args.export_scales) if each))
    if args.json:
        print(json.dumps(results, allow_nan=False))
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
