"""What the reports say of time and bytes: of decode steps, attention, saved prefixes and beam search."""

from __future__ import annotations

from typing import Any

from hf_kvattn.evaluation.markdown import (
    MISSING,
    Column,
    digits,
    joined,
    markdown_table,
    mib,
    skipped_list,
    speedup,
    spread,
    table_of,
    three_digits,
)
from hf_kvattn.evaluation.stated import disagreements
from hf_kvattn.evaluation.variants import BASELINE, STATIC_BASELINE

_METHODS = ("standard", "tiled", "windowed")


def throughput(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        "A step is the time between two tokens inside `generate()`, the median of all timed steps. Every variant had "
        f"{settings['rounds']} turns of {settings['block_steps']} steps, of which the first "
        f'{settings["dropped_steps_per_block"]} carries set-up and was dropped. "Faster than" is the ratio of the '
        f"medians; then the median of the ratios within each round, with p20 to p80. {_prompts(settings)} Memory "
        "that the prompt takes at its peak, the cache included (prompt MiB), and decoding "
        f"beyond it (extra MiB): {settings['memory_method']}. Tokens are compared with those of "
        f"{BASELINE}, in brackets how many a row; a near tie is {settings['near_tie']}; `differs` is said of lossy "
        "caches.\n"
    )
    cells = [_cell(cell) for cell in results["cells"]]
    return joined(notes, *cells, _price(results["price_of_context"]), skipped_list(results["skipped"]))


def _prompts(settings: dict[str, Any]) -> str:
    if "prompts_s" not in settings:  # results of before they were repeated
        return "The first token and the prefill were timed once."
    return (
        "The first token, the prefill and the memory of a prompt are medians of several prompts, one a round as far as "
        f"they fit in {settings['prompts_s']:g} s; memory with p20 to p80."
    )


def _cell(cell: dict[str, Any]) -> str:
    columns: list[Column] = [
        ("cache", "variant", str),
        ("step ms (p20 to p80)", "step_ms", lambda value: spread(value, digits(".1f"))),
        ("tok/s", "decode_tok_s", digits(".1f")),
        *((f"faster than {name}", name, speedup) for name in (BASELINE, STATIC_BASELINE)),
        ("first token ms", "ttft_ms", digits(".0f")),
        ("prefill tok/s", "prefill_tok_s", digits(".0f")),
        ("cache MiB", "cache_bytes", mib),
        ("prompt MiB", "prompt_peak_bytes", _peak),
        ("extra MiB", "decode_extra_bytes", mib),
        ("tokens", "tokens", "{0[verdict]} ({0[compared]})".format),
    ]
    rows = [{"prompt_peak_bytes": None, **row, **row["speedup"]} for row in cell["rows"]]
    title = f"### Context {cell['context']}, batch {cell['batch']}\n"
    prompts = f"Prompts of each cache: {cell['prompts']}.\n" if "prompts" in cell else ""
    return joined(title, prompts, table_of(columns, rows), _differences(cell))


def _peak(value: dict[str, float] | float | None) -> str:
    """The memory of prompts; one number in results of before they were repeated."""
    if not isinstance(value, dict):
        return mib(value)
    return mib(value["median"]) if value["p20"] == value["p80"] else spread(value, mib)


def _differences(cell: dict[str, Any]) -> str:
    return "".join(
        f"- {row['variant']}, row {found['row']}: differs from new token {found['new_token'] + 1} on; the stock logits"
        f" of the two tokens are {found['margin']:.4g} apart, a near tie is up to {found['tolerance']:.4g}\n"
        for row in cell["rows"]
        for found in row["tokens"]["differences"]
        if "margin" in found
    )


def _price(prices: list[dict[str, Any]]) -> str:
    if not prices:
        return ""
    columns: list[Column] = [
        ("cache", "variant", str),
        ("batch", "batch", str),
        ("contexts", "contexts", "{0[0]} to {0[1]}".format),
        ("extra ms a step", "extra_ms", digits(".1f")),
        ("growth", "growth", digits(".2f")),
        *((f"share of {name}'s", name, digits(".2f")) for name in (BASELINE, STATIC_BASELINE)),
    ]
    return joined(
        "### The price of context\n",
        "A step at the largest context minus a step at the smallest.\n",
        table_of(columns, [{**price, **price["share_of"]} for price in prices]),
    )


def bandwidth(results: dict[str, Any]) -> str:
    notes = (
        f"One layer's attention of {results['queries']} query tokens over {results['context']} stored ones: "
        f"{mib(results['layer_bytes'])} MiB of keys and values when not quantized. Reading memory with the same "
        f"threads: {results['read_bytes_s'] / 1e9:.1f} GB/s. Ratios of medians; then the median of the ratios within "
        "each round, with p20 to p80.\n"
    )
    columns: list[Column] = [
        ("backend", "name", str),
        ("ms a layer (p20 to p80)", "ms", "{0[median_ms]:.3f} ({0[p20_ms]:.3f} to {0[p80_ms]:.3f})".format),
        ("MiB", "bytes", mib),
        ("GB/s", "bytes_s", lambda value: f"{value / 1e9:.1f}"),
        ("share of the bandwidth", "share", digits(".2f")),
        (f"faster than {results['base']}", "faster_than_base", speedup),
    ]
    rows = [{**row, "name": name, "ms": row} for name, row in results["backends"].items()]
    return joined(notes, table_of(columns, rows))


def claims(results: dict[str, Any]) -> str:
    settings = results["settings"]
    q_heads, kv_heads, dim = settings["heads"]
    claim_columns: list[Column] = [
        ("claim", "claim", str),
        ("stated by", "source", str),
        ("stated", "stated", _stated),
        ("measured", "measured", three_digits),
        ("agrees", "agrees", {True: "yes", False: "**no**"}.__getitem__),
    ]
    step_columns: list[Column] = [
        ("cache", "variant", str),
        ("context", "context", str),
        ("step ms (p20 to p80)", "step_ms", spread),
        ("faster than none", "speedup", speedup),
        ("tokens", "verdict", str),
    ]
    layout_columns: list[Column] = [
        ("heads", "name", str),
        ("KV heads", "kv_heads", str),
        ("tokens", "tokens", str),
        ("cache MiB", "cache_bytes", mib),
        ("step ms (p20 to p80)", "step_ms", spread),
        ("faster than MHA", "faster_than_mha", speedup),
    ]
    layouts = [
        {**layout, "name": name, "tokens": cell["tokens"]}
        for cell in results["caches"]
        for name, layout in cell["layouts"].items()
    ]
    return joined(
        f"Times are medians (p20 to p80) of {settings['rounds']} turns. Memory: {settings['memory_method']}.\n",
        "### Stated and measured\n\nA figure within a fifth of the stated one agrees with it.\n",
        table_of(claim_columns, results["claims"]),
        "".join(
            f"- {row['claim']}, measured {three_digits(row['measured'])}: {row['why']}.\n"
            for row in disagreements(results)
        ),
        f"### Prefill attention of one layer, {q_heads} query and {kv_heads} KV heads of {dim}\n\n"
        "Standard writes all scores to memory, tiled is what this package takes, windowed is tiled in a window of "
        f"{settings['window']}.\n",
        _attention(results["attention"]),
        "### A decode step with and without a cache\n",
        table_of(step_columns, [{**row, **cell} for cell in results["decoding"] for row in cell["rows"]]),
        f"### One layer's cache, {settings['cache_heads']} query heads of {settings['cache_dim']}\n\n"
        "The step is the layer's decode attention alone.\n",
        table_of(layout_columns, layouts),
        skipped_list(results["skipped"]),
    )


def _attention(measured: list[dict[str, Any]]) -> str:
    header = [
        "tokens",
        *(f"{name} {unit}" for name in _METHODS for unit in ("ms", "MiB")),
        "tiled faster",
        "difference",
    ]
    rows = []
    for row in measured:
        cells = [str(row["tokens"])]
        for found in map(row["methods"].get, _METHODS):
            cells += [MISSING, MISSING] if found is None else [spread(found["ms"]), mib(found["extra_bytes"])]
        rows.append([*cells, speedup(row["speedup"]["tiled"]), digits(".1g")(row["max_difference"])])
    return markdown_table(header, rows)


def _stated(bounds: list[float]) -> str:
    low, high = bounds
    return f"{low:.3g}" + (" or more" if high is None else "" if high == low else f" to {high:.3g}")


def prefix(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        f"A prefix of {settings['context']} tokens, computed, saved, and loaded from the page cache: medians (p20 to "
        f"p80) of {settings['rounds']} rounds; how many times faster loading is than computing, of medians, then "
        f"paired within each round. Tokens: {settings['new_tokens']} greedy ones after the prefix, with the loaded "
        "cache and with the one that was saved.\n"
    )
    columns: list[Column] = [
        ("cache", "variant", str),
        *((f"{name} ms", f"{name}_ms", spread) for name in ("prefill", "save", "load")),
        ("loading faster", "speedup", speedup),
        ("file MiB", "file_bytes", mib),
        ("tokens", "same_tokens", _same),
    ]
    return joined(notes, table_of(columns, results["rows"]))


def beams(results: dict[str, Any]) -> str:
    settings = results["settings"]
    notes = (
        f"{settings['batch']} prompts of {settings['context']} tokens, {settings['beams']} beams, "
        f"{settings['new_tokens']} steps. Bytes are those that a step's `reorder_cache` writes, temporaries included, "
        f"mean; times are medians (p20 to p80) over {settings['rounds']} rounds; how many times less than "
        f"{BASELINE}: bytes; times, of medians, then paired within each round. Tokens: against {BASELINE}.\n"
    )
    columns: list[Column] = [
        ("cache", "variant", str),
        ("MiB a step", "written_bytes", lambda value: f"{value / 2**20:.2f}"),
        ("fewer bytes", "fewer_bytes", digits(".1f")),
        ("reordering ms", "reorder_ms", spread),
        ("faster", "faster", speedup),
        ("tokens", "same_tokens", _same),
    ]
    return joined(notes, table_of(columns, results["rows"]))


def _same(tokens: bool | None) -> str:
    return {True: "same", False: "**differ**", None: "lossy"}[tokens]
