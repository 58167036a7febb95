"""The Markdown of the reports: what each kind of measurement says, in notes and tables."""

from __future__ import annotations

from typing import Any

from hf_kvattn.evaluation.stated import disagreements
from hf_kvattn.evaluation.variants import BASELINE, STATIC_BASELINE


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column at the left and the others at the right."""
    marks = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, marks, *rows]) + "\n"


def _number(value: float | None, pattern: str = "{:.1f}") -> str:
    return "-" if value is None else pattern.format(value)


def _mib(size_bytes: float | None) -> str:
    return _number(None if size_bytes is None else size_bytes / 2**20)


def _speedup(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    return "{of_medians:.2f}; {paired_median:.2f} ({paired_p20:.2f} to {paired_p80:.2f})".format(**value)


def _cell_table(cell: dict[str, Any]) -> str:
    header = ["cache", "step ms (p20 to p80)", "tok/s", f"faster than {BASELINE}", f"faster than {STATIC_BASELINE}"]
    header += ["first token ms", "prefill tok/s", "cache MiB", "prompt MiB", "extra MiB", "tokens"]
    rows = [
        [
            row["variant"],
            "{median:.1f} ({p20:.1f} to {p80:.1f})".format(**row["step_ms"]),
            _number(row["decode_tok_s"]),
            *(_speedup(row["speedup"][name]) for name in (BASELINE, STATIC_BASELINE)),
            _number(row["ttft_ms"], "{:.0f}"),
            _number(row["prefill_tok_s"], "{:.0f}"),
            _mib(row["cache_bytes"]),
            _mib(row.get("prompt_peak_bytes")),
            _mib(row["decode_extra_bytes"]),
            "{verdict} ({compared})".format(**row["tokens"]),
        ]
        for row in cell["rows"]
    ]
    return (
        f"### Context {cell['context']}, batch {cell['batch']}\n\n" + markdown_table(header, rows) + _differences(cell)
    )


def _differences(cell: dict[str, Any]) -> str:
    lines = [
        f"- {row['variant']}, row {found['row']}: differs from new token {found['new_token'] + 1} on; the stock logits"
        f" of the two tokens are {found['margin']:.4g} apart, a near tie is up to {found['tolerance']:.4g}"
        for row in cell["rows"]
        for found in row["tokens"]["differences"]
        if "margin" in found
    ]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _price_table(prices: list[dict[str, Any]]) -> str:
    if not prices:
        return ""
    header = ["cache", "batch", "contexts", "extra ms a step", "growth", f"share of {BASELINE}'s"]
    header += [f"share of {STATIC_BASELINE}'s"]
    rows = [
        [
            price["variant"],
            str(price["batch"]),
            "{} to {}".format(*price["contexts"]),
            _number(price["extra_ms"]),
            _number(price["growth"], "{:.2f}"),
            *(_number(price["share_of"][name], "{:.2f}") for name in (BASELINE, STATIC_BASELINE)),
        ]
        for price in prices
    ]
    return (
        "### The price of context\n\nA step at the largest context minus a step at the smallest.\n\n"
        + markdown_table(header, rows)
    )


def _skipped_list(skipped: list[dict[str, Any]]) -> str:
    if not skipped:
        return ""
    lines = [f"- {item['variant']} at context {item['context']}, batch {item['batch']}: {item['reason']}"
             for item in skipped]  # fmt: skip
    return "### Skipped\n\n" + "\n".join(lines) + "\n"


def throughput(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        "A step is the time between two tokens inside `generate()`, the median of all timed steps. Every variant had "
        f"{settings['rounds']} turns of {settings['block_steps']} steps, of which the first "
        f'{settings["dropped_steps_per_block"]} carries set-up and was dropped. "Faster than" is the ratio of the '
        "medians; then the median of the ratios within each round, with p20 to p80. The first token and the prefill "
        "were timed once. Memory that the prompt takes at its peak, the cache included (prompt MiB), and decoding "
        f"beyond it (extra MiB): {settings['memory_method']}. Tokens are compared with those of "
        f"{BASELINE}, in brackets how many a row; a near tie is {settings['near_tie']}; `differs` is said of lossy "
        "caches.\n"
    )
    tables = [_cell_table(cell) for cell in results["cells"]]
    parts = [notes, *tables, _price_table(results["price_of_context"]), _skipped_list(results["skipped"])]
    return "\n".join(part for part in parts if part)


def perplexity(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        f"{settings['windows']} windows of {settings['window']} tokens: a prefill of {settings['prefill']}, then "
        f"strides of {settings['stride']} through the cache; {settings['scored_tokens']} predictions scored. KLD is "
        f"KL({BASELINE} || variant) in nats a token. `none` is one forward pass without a cache: what it differs by "
        "is noise of the arithmetic, not of a cache.\n"
    )
    header = ["cache", "perplexity", "change %", "KLD", "KLD p99", "same top-1 %", "bits a number", "cache MiB"]
    rows = [
        [
            row["variant"],
            _number(row["perplexity"], "{:.3f}"),
            _number(row["perplexity_change_pct"], "{:+.2f}"),
            _number(row["kld_mean"], "{:.5f}"),
            _number(row["kld_p99"], "{:.4f}"),
            _number(row["same_top1_pct"], "{:.2f}"),
            _number(row["bits_per_element"], "{:.2f}"),
            _mib(row["cache_bytes"]),
        ]
        for row in results["rows"]
    ]
    return "\n".join(part for part in [notes, markdown_table(header, rows), _skipped_list(results["skipped"])] if part)


def bandwidth(results: dict[str, Any]) -> str:
    notes = (
        f"One layer's attention of {results['queries']} query tokens over {results['context']} stored ones: "
        f"{_mib(results['layer_bytes'])} MiB of keys and values when not quantized. Reading memory with the same "
        f"threads: {results['read_bytes_s'] / 1e9:.1f} GB/s. Ratios of medians; then the median of the ratios within "
        "each round, with p20 to p80.\n"
    )
    header = ["backend", "ms a layer (p20 to p80)", "MiB", "GB/s", "share of the bandwidth"]
    header += [f"faster than {results['base']}"]
    rows = [
        [
            name,
            "{median_ms:.3f} ({p20_ms:.3f} to {p80_ms:.3f})".format(**row),
            _mib(row["bytes"]),
            _number(row["bytes_s"] / 1e9),
            _number(row["share"], "{:.2f}"),
            _speedup(row["faster_than_base"]),
        ]
        for name, row in results["backends"].items()
    ]
    return notes + "\n" + markdown_table(header, rows)


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _spread(value: dict[str, float]) -> str:
    return "{} ({} to {})".format(*(_three_digits(value[key]) for key in ("median", "p20", "p80")))


def claims(results: dict[str, Any]) -> str:
    settings = results["settings"]
    q_heads, kv_heads, dim = settings["heads"]
    parts = [
        f"Times are medians (p20 to p80) of {settings['rounds']} turns. Memory: {settings['memory_method']}.\n",
        "### Stated and measured\n\nA figure within a fifth of the stated one agrees with it.\n",
        markdown_table(
            ["claim", "stated by", "stated", "measured", "agrees"],
            [
                [row["claim"], row["source"], _stated(row), _three_digits(row["measured"]), _yes(row["agrees"])]
                for row in results["claims"]
            ],
        ),
        "".join(
            f"- {row['claim']}, measured {_three_digits(row['measured'])}: {row['why']}.\n"
            for row in disagreements(results)
        ),
        f"### Prefill attention of one layer, {q_heads} query and {kv_heads} KV heads of {dim}\n\n"
        "Standard writes all scores to memory, tiled is what this package takes, windowed is tiled in a window of "
        f"{settings['window']}.\n",
        markdown_table(
            [
                "tokens",
                *(f"{name} {unit}" for name in _METHODS for unit in ("ms", "MiB")),
                "tiled faster",
                "difference",
            ],
            [_attention_cells(row) for row in results["attention"]],
        ),
        "### A decode step with and without a cache\n",
        markdown_table(
            ["cache", "context", "step ms (p20 to p80)", "faster than none", "tokens"],
            [
                [
                    row["variant"],
                    str(cell["context"]),
                    _spread(row["step_ms"]),
                    _speedup(row["speedup"]),
                    row["verdict"],
                ]
                for cell in results["decoding"]
                for row in cell["rows"]
            ],
        ),
        f"### One layer's cache, {settings['cache_heads']} query heads of {settings['cache_dim']}\n\n"
        "The step is the layer's decode attention alone.\n",
        markdown_table(
            ["heads", "KV heads", "tokens", "cache MiB", "step ms (p20 to p80)", "faster than MHA"],
            [
                [
                    name,
                    str(layout["kv_heads"]),
                    str(cell["tokens"]),
                    _mib(layout["cache_bytes"]),
                    _spread(layout["step_ms"]),
                    _speedup(layout["faster_than_mha"]),
                ]
                for cell in results["caches"]
                for name, layout in cell["layouts"].items()
            ],
        ),
        _skipped_list(results["skipped"]),
    ]
    return "\n".join(part for part in parts if part)


_METHODS = ("standard", "tiled", "windowed")


def _attention_cells(row: dict[str, Any]) -> list[str]:
    cells = [str(row["tokens"])]
    for name in _METHODS:
        found = row["methods"].get(name)
        cells += ["-", "-"] if found is None else [_spread(found["ms"]), _mib(found["extra_bytes"])]
    return [*cells, _speedup(row["speedup"]["tiled"]), _number(row["max_difference"], "{:.1g}")]


def _stated(row: dict[str, Any]) -> str:
    low, high = row["stated"]
    return f"{low:.3g}" + (" or more" if high is None else "" if high == low else f" to {high:.3g}")


def _yes(agrees: bool) -> str:
    return "yes" if agrees else "**no**"


def conversion(results: dict[str, Any]) -> str:
    settings, before = results["settings"], results["perplexity_before"]
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
    header = ["method", "perplexity", "loss", "loss, nats", "share of mean's loss"]
    header += ["uptrained perplexity", "loss", "loss, nats"]
    rows = [["original", _number(before, "{:.3f}"), *["-"] * 6]]
    for row in results["rows"]:
        uptrained = row.get("uptrained", {})
        rows.append(
            [row["method"], *(_number(row[key], "{:.3f}") for key in ("perplexity", "loss", "loss_nats"))]
            + [_number(row["share_of_mean_loss"], "{:.3f}")]
            + [_number(uptrained.get(key), "{:.3f}") for key in ("perplexity", "loss", "loss_nats")]
        )
    return notes + "\n" + markdown_table(header, rows)


def calibration(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        f"Bits of each layer's keys and values, chosen on {settings['calibration_tokens']} tokens of "
        f"{results['conditions']['calibration_text']}; groups of {settings['group_size']}. Measured on other text: "
        f"{settings['windows']} windows of {settings['window']} tokens, a prefill of {settings['prefill']}, then "
        f"strides of {settings['stride']} through the cache; {settings['scored_tokens']} predictions scored. KLD is "
        f"KL({BASELINE} || variant) in nats a token. Bits of codes count their scales; bits a number count exact "
        "tokens too, with what this length leaves of them.\n"
    )
    header = ["cache", "bits of codes", "bits a number", "perplexity", "change %", "KLD", "calibrated KLD over this"]
    header += ["KLD p99", "same top-1 %"]
    rows = [
        [
            row["variant"],
            _number(row["code_bits"], "{:.3f}"),
            _number(row["bits_per_element"], "{:.2f}"),
            _number(row["perplexity"], "{:.3f}"),
            _number(row["perplexity_change_pct"], "{:+.2f}"),
            _number(row["kld_mean"], "{:.5f}"),
            _number(row["kld_share"], "{:.3f}"),
            _number(row["kld_p99"], "{:.4f}"),
            _number(row["same_top1_pct"], "{:.2f}"),
        ]
        for row in results["rows"]
    ]
    predicted = f"predicted KLD at {settings['bits']} bits"
    layers = [
        [
            str(layer["layer"]),
            *(_number(layer[f"{part}_bits"], "{:d}") for part in ("key", "value")),
            *(_number(layer[f"predicted_{part}_kld"], "{:.2e}") for part in ("key", "value")),
        ]
        for layer in results["layers"]
    ]
    layer_header = ["layer", "key bits", "value bits", f"keys: {predicted}", f"values: {predicted}"]
    return "\n".join([notes, markdown_table(header, rows), markdown_table(layer_header, layers)])


def prefix(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        f"A prefix of {settings['context']} tokens, computed, saved, and loaded from the page cache: medians (p20 to "
        f"p80) of {settings['rounds']} rounds; how many times faster loading is than computing, of medians, then "
        f"paired within each round. Tokens: {settings['new_tokens']} greedy ones after the prefix, with the loaded "
        "cache and with the one that was saved.\n"
    )
    header = ["cache", "prefill ms", "save ms", "load ms", "loading faster", "file MiB", "tokens"]
    rows = [
        [
            row["variant"],
            *(_spread(row[key]) for key in ("prefill_ms", "save_ms", "load_ms")),
            _speedup(row["speedup"]),
            _mib(row["file_bytes"]),
            "same" if row["same_tokens"] else "**differ**",
        ]
        for row in results["rows"]
    ]
    return notes + "\n" + markdown_table(header, rows)


def stream(results: dict[str, Any]) -> str:
    settings, steps = results["settings"], results["steps"]
    early, late = (str(position) for position in settings["steps_at"])
    notes = (
        f"One text of {settings['tokens']} tokens through one cache, {settings['chunk']} at a time; the model was "
        f"trained on {settings['trained_positions']} positions. The last {settings['last']} tokens are compared with a "
        f"recomputation without a cache, each predicted from a fresh window of "
        f"{settings['window'] - settings['stride'] + 1} to {settings['window']} tokens: perplexity "
        f"{results['recomputed_perplexity']:.3f}. Cache bytes: when the window is full, at their highest after that, "
        "at the end.\n"
    )
    header = ["cache", "tokens", "perplexity", f"of the last {settings['last']}", "against recomputed %"]
    header += ["bytes when full", "highest", "at the end"]
    rows = [
        [
            row["variant"],
            str(row["tokens"]),
            _number(row["perplexity"], "{:.3f}"),
            _number(row["last_perplexity"], "{:.3f}"),
            _number(row["last_over_recomputed_pct"], "{:+.2f}"),
            *(str(row[key]) for key in ("bytes_when_full", "bytes_peak", "bytes_at_the_end")),
        ]
        for row in results["rows"]
    ]
    step_rows = [[early, _spread(steps["step_ms"][early]), "-"]]
    step_rows.append([late, _spread(steps["step_ms"][late]), _speedup(steps["late_over_early"])])
    prompts = [
        [
            str(row["tokens"]),
            _spread(row["windowed_ms"]),
            _spread(row["full_ms"]),
            _speedup(row["windowed_faster"]),
            _speedup(row["windowed_over_half"]),
        ]
        for row in results["prompts"]
    ]
    return "\n".join(
        [
            notes,
            markdown_table(header, rows),
            "### A decode step along the stream\n",
            markdown_table(["position", "step ms (p20 to p80)", "times the first"], step_rows),
            "### A prompt at once\n",
            markdown_table(
                ["tokens", "in the window, ms", "in full, ms", "windowed faster", "windowed, times half the tokens"],
                prompts,
            ),
        ]
    )


def beams(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        f"{settings['batch']} prompts of {settings['context']} tokens, {settings['beams']} beams, "
        f"{settings['new_tokens']} steps. Bytes are those that a step's `reorder_cache` writes, temporaries included, "
        f"mean; times are medians (p20 to p80) over {settings['rounds']} rounds; how many times less than "
        f"{BASELINE}: bytes; times, of medians, then paired within each round. Tokens: against {BASELINE}.\n"
    )
    header = ["cache", "MiB a step", "fewer bytes", "reordering ms", "faster", "tokens"]
    rows = [
        [
            row["variant"],
            _number(row["written_bytes"] / 2**20, "{:.2f}"),
            _number(row["fewer_bytes"]),
            _spread(row["reorder_ms"]),
            _speedup(row["faster"]),
            {True: "same", False: "**differ**", None: "lossy"}[row["same_tokens"]],
        ]
        for row in results["rows"]
    ]
    return notes + "\n" + markdown_table(header, rows)


def conditions(found: dict[str, Any]) -> str:
    lines = [f"- {key}: `{value}`" for key, value in found.items() if key != "describe"]
    return "\n".join(lines) + f"\n\n```\n{found['describe']}\n```\n"
