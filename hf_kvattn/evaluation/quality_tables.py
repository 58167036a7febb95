"""What the reports say of predictions: of caches, calibrated bits, converted models and endless streams."""

from __future__ import annotations

from typing import Any

from hf_kvattn.evaluation.markdown import Column, digits, joined, mib, skipped_list, speedup, spread, table_of
from hf_kvattn.evaluation.variants import BASELINE

_CACHE: Column = ("cache", "variant", str)
_BITS: Column = ("bits a number", "bits_per_element", digits(".2f"))
_AGAINST_STOCK: list[Column] = [
    ("perplexity", "perplexity", digits(".3f")),
    ("change %", "perplexity_change_pct", digits("+.2f")),
    ("KLD", "kld_mean", digits(".5f")),
]
_WORST: list[Column] = [("KLD p99", "kld_p99", digits(".4f")), ("same top-1 %", "same_top1_pct", digits(".2f"))]


def _schedule(settings: dict[str, Any]) -> str:
    """How `perplexity.measure` goes through a window, and what is compared."""
    return (
        f"a prefill of {settings['prefill']}, then strides of {settings['stride']} through the cache; "
        f"{settings['scored_tokens']} predictions scored. KLD is KL({BASELINE} || variant) in nats a token."
    )


def perplexity(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        f"{settings['windows']} windows of {settings['window']} tokens: {_schedule(settings)} `none` is one forward "
        "pass without a cache: what it differs by is noise of the arithmetic, not of a cache.\n"
    )
    columns = [_CACHE, *_AGAINST_STOCK, *_WORST, _BITS, ("cache MiB", "cache_bytes", mib)]
    return joined(notes, table_of(columns, results["rows"]), skipped_list(results["skipped"]))


def calibration(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        f"Bits of each layer's keys and values, chosen on {settings['calibration_tokens']} tokens of "
        f"{results['conditions']['calibration_text']}; groups of {settings['group_size']}. Measured on other text: "
        f"{settings['windows']} windows of {settings['window']} tokens, {_schedule(settings)} Bits of codes count "
        "their scales; bits a number count exact tokens too, with what this length leaves of them.\n"
    )
    bits: Column = ("bits of codes", "code_bits", digits(".3f"))
    share: Column = ("calibrated KLD over this", "kld_share", digits(".3f"))
    predicted = f"predicted KLD at {settings['bits']} bits"
    layer_columns: list[Column] = [
        ("layer", "layer", str),
        ("key bits", "key_bits", digits("d")),
        ("value bits", "value_bits", digits("d")),
        (f"keys: {predicted}", "predicted_key_kld", digits(".2e")),
        (f"values: {predicted}", "predicted_value_kld", digits(".2e")),
    ]
    return joined(
        notes,
        table_of([_CACHE, bits, _BITS, *_AGAINST_STOCK, share, *_WORST], results["rows"]),
        table_of(layer_columns, results["layers"]),
    )


def conversion(results: dict[str, Any]) -> str:
    settings = results["settings"]
    cache = (
        "{cache_bytes_per_token_before} bytes of keys and values a token before, {cache_bytes_per_token_after} after"
    )
    notes = (
        f"Made from {results['conditions']['model']} by the method `{results['rows'][0]['method']}`: "
        f"{settings['kv_heads_before']} to {settings['kv_heads_after']} KV heads for {settings['query_heads']} query "
        f"heads in {settings['layers']} layers: {cache.format(**results)}. Perplexity in float32 on "
        f"{settings['scored_tokens']} tokens of held-out text, in windows of {settings['window']}; the loss is that "
        f"after minus that before, and in nats the logarithm of their ratio. `activation` was calibrated on "
        f"{settings['calibration_tokens']} tokens of other text; uptraining is {settings['uptrain_steps']} steps, "
        f"{settings['uptrain_tokens']} tokens, of distillation from the original on that text. The checkpoint as it is "
        f"written, in {results['written']['dtype']}, has a perplexity of {results['written']['perplexity']:.3f}.\n"
    )
    three = digits(".3f")
    losses = (("perplexity", "perplexity"), ("loss", "loss"), ("loss, nats", "loss_nats"))
    columns: list[Column] = [
        ("method", "method", str),
        *((title, key, three) for title, key in losses),
        ("share of mean's loss", "share_of_mean_loss", three),
        ("uptrained perplexity", "uptrained_perplexity", three),
        ("loss", "uptrained_loss", three),
        ("loss, nats", "uptrained_loss_nats", three),
    ]
    nothing = dict.fromkeys(key for _, key, _ in columns)
    rows = [{**nothing, "method": "original", "perplexity": results["perplexity_before"]}]
    for row in results["rows"]:
        uptrained = {f"uptrained_{key}": value for key, value in row.get("uptrained", {}).items()}
        rows.append({**nothing, **row, **uptrained})
    return joined(notes, table_of(columns, rows))


def stream(results: dict[str, Any]) -> str:
    settings, steps = results["settings"], results["steps"]
    notes = (
        f"One text of {settings['tokens']} tokens through one cache, {settings['chunk']} at a time; the model was "
        f"trained on {settings['trained_positions']} positions. The last {settings['last']} tokens are compared with a "
        f"recomputation without a cache, each predicted from a fresh window of "
        f"{settings['window'] - settings['stride'] + 1} to {settings['window']} tokens: perplexity "
        f"{results['recomputed_perplexity']:.3f}. Cache bytes: when the window is full, at their highest after that, "
        "at the end.\n"
    )
    columns: list[Column] = [
        _CACHE,
        ("tokens", "tokens", str),
        ("perplexity", "perplexity", digits(".3f")),
        (f"of the last {settings['last']}", "last_perplexity", digits(".3f")),
        ("against recomputed %", "last_over_recomputed_pct", digits("+.2f")),
        ("bytes when full", "bytes_when_full", str),
        ("highest", "bytes_peak", str),
        ("at the end", "bytes_at_the_end", str),
    ]
    step_columns: list[Column] = [
        ("position", "position", str),
        ("step ms (p20 to p80)", "step_ms", spread),
        ("times the first", "late_over_early", speedup),
    ]
    prompt_columns: list[Column] = [
        ("tokens", "tokens", str),
        ("in the window, ms", "windowed_ms", spread),
        ("in full, ms", "full_ms", spread),
        ("windowed faster", "windowed_faster", speedup),
        ("windowed, times half the tokens", "windowed_over_half", speedup),
    ]
    times = zip(settings["steps_at"], (None, steps["late_over_early"]), strict=True)
    step_rows = [{"position": at, "step_ms": steps["step_ms"][str(at)], "late_over_early": late} for at, late in times]
    return joined(
        notes,
        table_of(columns, results["rows"]),
        "### A decode step along the stream\n",
        table_of(step_columns, step_rows),
        "### A prompt at once\n",
        table_of(prompt_columns, results["prompts"]),
    )
