"""What a conversion costs: perplexity on other text than it was calibrated on, method by method, and after uptraining.

Perplexity is measured in float32, so that rounding the weights is no part of it; `written_perplexity` is that of the
checkpoint as it is written. A loss is perplexity after minus perplexity before; in nats, the logarithm of their ratio.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_kvattn.convert import gqa, output, training
from hf_kvattn.evaluation import cards, perplexity
from hf_kvattn.evaluation.common import drawing, report
from hf_kvattn.evaluation.common.measurement import Figure, Measurement
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import Command, positive_int
from hf_kvattn.tools.conditions import conditions
from hf_kvattn.tools.files import new_folder
from hf_kvattn.tools.tables import Column, digits, joined, table_of

EXPAND = "expand"
REFERENCE = "mean"  # the method whose loss the others are compared with


def perplexity_of(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Of all tokens but the first of each window; `windows` are token ids, (windows, tokens)."""
    count, window = windows.shape
    sizes: dict[str, Any] = {"window": window, "prefill": 1, "stride": window, "windows": count}
    return float(perplexity.measure(model, windows.flatten(), variants=[], **sizes)["rows"][0]["perplexity"])


def _loss(after: float, before: float) -> dict[str, float]:
    return {"perplexity": after, "loss": after - before, "loss_nats": math.log(after / before)}


def compare(
    model: PreTrainedModel,
    methods: Sequence[str],
    *,
    kv_heads: int | None,
    text_windows: torch.Tensor,
    calibration_windows: int,
    heldout_windows: torch.Tensor,
    uptrain_steps: int = 0,
    learning_rate: float = 2e-4,
    batch_size: int = 4,
    progress: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Convert a model by each method and measure; the model made by the first, and a dict that JSON can hold.

    Args:
        model: the original, in float32.
        methods: of `gqa.METHODS`, or `expand` alone, with which `kv_heads` is None.
        text_windows: token ids to calibrate and train on, (windows, tokens).
        calibration_windows: how many of them, evenly spread, the method `activation` sees; a text's beginning may be
            about one thing.
        heldout_windows: token ids to measure on, (windows, tokens).
        uptrain_steps: steps of distillation from the original after each conversion; 0 for none.
        progress: show bars on stderr.
    """
    if (kv_heads is None) != (list(methods) == [EXPAND]) or not methods:
        raise ValueError(f"{methods=} do not go with {kv_heads=}: {EXPAND!r} alone needs none, all others do")
    if calibration_windows > len(text_windows):
        raise ValueError(f"the calibration text has {len(text_windows)} windows, not {calibration_windows}")
    gqa.check(model)
    spread = torch.arange(calibration_windows) * len(text_windows) // calibration_windows
    before = perplexity_of(model, heldout_windows)

    def converted_by(method: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        if kv_heads is None:
            converted = gqa.expand(model)
        else:
            calibration = text_windows[spread] if method == "activation" else None
            converted = gqa.convert(model, kv_heads, method, calibration, progress)
        row: dict[str, Any] = {"method": method, **_loss(perplexity_of(converted, heldout_windows), before)}
        if uptrain_steps:
            steps: dict[str, Any] = {"steps": uptrain_steps, "learning_rate": learning_rate, "batch_size": batch_size}
            losses = training.train(converted, text_windows, teacher=model, progress=progress, **steps)
            row["uptrained"] = _loss(perplexity_of(converted, heldout_windows), before) | {"training_kl_nats": losses}
        return converted, row

    chosen, first = converted_by(methods[0])
    rows = [first, *(converted_by(method)[1] for method in methods[1:])]
    reference = next((row["loss"] for row in rows if row["method"] == REFERENCE), None)
    for row in rows:
        row["share_of_mean_loss"] = row["loss"] / reference if reference else None
    config = model.config
    settings = {
        "layers": config.num_hidden_layers,
        "query_heads": config.num_attention_heads,
        "kv_heads_before": config.num_key_value_heads,
        "kv_heads_after": chosen.config.num_key_value_heads,
        "calibration_tokens": text_windows[spread].numel(),
        "window": heldout_windows.shape[1],
        "scored_tokens": heldout_windows[:, 1:].numel(),
        "uptrain_steps": uptrain_steps,
        "uptrain_tokens": uptrain_steps * batch_size * text_windows.shape[1],
        "learning_rate": learning_rate,
    }
    return chosen, {"kind": "conversion", "settings": settings, "perplexity_before": before, "rows": rows}


COLUMNS: list[Column] = [
    ("method", "method", str),
    ("perplexity", "perplexity", digits(".3f")),
    ("loss", "loss", digits(".3f")),
    ("loss, nats", "loss_nats", digits(".3f")),
    ("share of mean's loss", "share_of_mean_loss", digits(".3f")),
    ("uptrained perplexity", "uptrained.perplexity", digits(".3f")),
    ("loss", "uptrained.loss", digits(".3f")),
    ("loss, nats", "uptrained.loss_nats", digits(".3f")),
]


def _tables(results: dict[str, Any]) -> str:
    notes = (
        "Made from {conditions[model]} by the method `{rows[0][method]}`: {kv_heads_before} to {kv_heads_after} KV "
        "heads for {query_heads} query heads in {layers} layers: {cache_bytes_per_token_before} bytes of keys and "
        "values a token before, {cache_bytes_per_token_after} after. Perplexity in float32 on {scored_tokens} tokens "
        "of held-out text, in windows of {window}; the loss is that after minus that before, and in nats the logarithm "
        "of their ratio. `activation` was calibrated on {calibration_tokens} tokens of other text; uptraining is "
        "{uptrain_steps} steps, {uptrain_tokens} tokens, of distillation from the original on that text. The "
        "checkpoint as it is written, in {written[dtype]}, has a perplexity of {written[perplexity]:.3f}.\n"
    ).format(**results, **results["settings"])
    original = {"method": "original", "perplexity": results["perplexity_before"]}
    return joined(notes, table_of(COLUMNS, [original, *results["rows"]]))


def _perplexity(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _draw(results: dict[str, Any]) -> Any:
    """What converting costs by method, before and after uptraining: bars in nats a token, labelled with perplexity."""
    settings, rows = results["settings"], results["rows"]
    title = f"{settings['kv_heads_before']} to {settings['kv_heads_after']} KV heads: perplexity on held-out text"
    figure = drawing.new_figure(7.0, 4.4, title, results["conditions"])
    axes = figure.subplots()
    uptrained = {i + 0.2: row["uptrained"] for i, row in enumerate(rows) if "uptrained" in row}
    for label, color, found in (
        ("converted", drawing.OURS[0], {i - 0.2: row for i, row in enumerate(rows)}),
        (f"after {settings['uptrain_steps']} steps of uptraining", drawing.OURS[2], uptrained),
    ):
        if found:
            bars = axes.bar(list(found), [row["loss_nats"] for row in found.values()], 0.38, color=color, label=label)
            drawing.label_bars(axes, bars, [_perplexity(row["perplexity"]) for row in found.values()])
    axes.axhline(0, color="#777777", linewidth=1, label=f"original: {_perplexity(results['perplexity_before'])}")
    axes.set_xticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.margins(y=0.1)
    drawing.caption(axes, y="loss, nats a token; the labels are perplexities")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    drawing.plain(axes)
    return figure


LOSS_NATS = 0.005  # a loss above this is said in a card: half a percent of perplexity


def limits(results: dict[str, Any]) -> list[str]:
    """What each method costs, before and after uptraining, and whether the written one is the best of them."""
    settings, rows = results["settings"], results["rows"]
    last = {row["method"]: row.get("uptrained", row)["loss_nats"] for row in rows}
    lines = [f"{settings['scored_tokens']} predictions of one text were scored: other texts may lose more."]
    for row in (row for row in rows if row["loss_nats"] > LOSS_NATS):
        after = f", {last[row['method']]:.3f} after uptraining" if "uptrained" in row else ""
        lines.append(f"{row['method']} loses {row['loss_nats']:.3f} nats a token{after}.")
    written, best = rows[0]["method"], min(last, key=last.__getitem__)
    if written != best:
        lines.append(f"The checkpoint was made by {written}, though {best} loses less.")
    if not settings["uptrain_steps"]:
        lines.append("It was not trained after the conversion.")
    return lines


def _figures(results: dict[str, Any]) -> Iterator[Figure]:
    settings, written = results["settings"], results["written"]
    part = "{kv_heads_before} to {kv_heads_after} KV heads".format(**settings)
    values = [("original", results["perplexity_before"])]
    for row in results["rows"]:
        values.append((row["method"], row["perplexity"]))
        if "uptrained" in row:
            values.append((f"{row['method']}, uptrained", row["uptrained"]["perplexity"]))
    values.append((f"as written, {written['dtype']}", written["perplexity"]))
    for name, value in values:
        yield Figure(part, "perplexity", f"perplexity: {name}", value, settings)
    for when in ("before", "after"):
        name, value = f"bytes of keys and values a token, {when}", results[f"cache_bytes_per_token_{when}"]
        yield Figure(part, "cache_bytes_per_token", name, value, settings)


MEASUREMENT = Measurement("conversion", "Conversion", _tables, "perplexity_by_method.png", _draw, limits, _figures)

HELP = """Give a Llama-style model fewer KV heads, or as many as it has query heads, and measure what that costs.

    hf-kvattn convert-gqa --model ./my-mha --kv-heads 8 --output my-gqa
    hf-kvattn convert-gqa --kv-heads 1 --compare mean cluster --text book.txt --output smollm2-mqa
    hf-kvattn convert-gqa --model ./my-mha --kv-heads 2 --compare mean --uptrain-steps 100 --output my-gqa
    hf-kvattn convert-gqa --model ./my-gqa --expand --output my-mha

The folder holds config, safetensors and tokenizer of the model converted by --method, results.json, report.md, a plot
and a card. The checkpoint is loaded back, and gets its name only when its logits are equal. --compare measures other
methods beside it, and --uptrain-steps distils each from the original on the calibration text.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default=inputs.SMOLLM2, help=f"hub id, folder, .gguf file or {inputs.SMOLLM2}")
    heads = parser.add_mutually_exclusive_group(required=True)
    heads.add_argument("--kv-heads", type=positive_int, help="how many there shall be; a divisor of what there are")
    heads.add_argument("--expand", action="store_true", help="one KV head for each query head, exact")
    add("--output", required=True, metavar="DIR", help="the folder to write; it must not exist")
    add("--method", choices=gqa.METHODS, help="of the written model; None means activation")
    add("--compare", nargs="*", choices=gqa.METHODS, default=[], help="methods measured beside it")
    add("--calibration-text", default="pydoc", help="to calibrate and train on: a file, wikitext or pydoc")
    add("--calibration-windows", type=positive_int, default=16, help="of it, evenly spread, for 'activation'")
    add("--text", default="wikitext", help="other text to measure on: a file, wikitext or pydoc")
    add("--windows", type=positive_int, default=8, help="of it")
    add("--window", type=positive_int, default=512, help="tokens of a window")
    add("--uptrain-steps", type=int, default=0, help="of distillation from the original")
    add("--learning-rate", type=float, default=2e-4, help="of the distillation, at its highest")
    add("--batch-size", type=positive_int, default=4, help="windows of a distillation step")
    add("--dtype", choices=inputs.DTYPES, default="bfloat16", help="of the written weights")
    add("--max-shard-size", default="5GB", help="of one safetensors file")
    add("--threads", type=positive_int, help="CPU threads; None leaves it to torch")
    add("--json", action="store_true", help="print the results as JSON in the last line of stdout")
    parser.set_defaults(backend="stock attention")


# Arguments that `compare` takes by the same names.
SIZES = ("kv_heads", "calibration_windows", "uptrain_steps", "learning_rate", "batch_size")


def _main(args: argparse.Namespace) -> int:
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
    methods = [EXPAND] if args.expand else list(dict.fromkeys([args.method or "activation", *args.compare]))
    with new_folder(args.output) as folder:
        drawing.require_plotting()
        calibration_text, text = inputs.load_text(args.calibration_text), inputs.load_text(args.text)
        model, tokenizer = inputs.load_model(args.model, torch.float32)
        heldout = inputs.load_tokens(tokenizer, text, args.windows * args.window).view(args.windows, args.window)
        sizes = {name: getattr(args, name) for name in SIZES}
        text_windows = inputs.load_windows(tokenizer, calibration_text, args.window)
        converted, results = compare(
            model, methods, text_windows=text_windows, heldout_windows=heldout, progress=True, **sizes
        )
        output.cast(converted, inputs.DTYPES[args.dtype])
        output.save(converted, tokenizer, folder, args.max_shard_size)
        for when, one in (("before", model), ("after", converted)):
            results[f"cache_bytes_per_token_{when}"] = gqa.cache_bytes_per_token(one, converted.dtype)
        results["written"] = {"dtype": args.dtype, "perplexity": perplexity_of(converted, heldout)}
        results["conditions"] = conditions(model, args)
        report.write(results, folder)
        cards.write(folder)
    print(report.table(results))
    print(f"written: {args.output}")
    if args.json:
        print(json.dumps(results, allow_nan=False))
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
