"""How fast is a decode step inside the real `model.generate()`, and what does its memory cost.

For every context length and batch size, each variant gets its own cache and is prefilled with the same prompt. Then
the variants decode in turns, a short block of steps each, round after round, so that a slow minute of the machine hits
all of them. Two numbers compare a variant with a stock cache: the ratio of the median step times, and the median of
the ratios within each round, where the noise of the machine cancels.

A step is the time from one chosen token to the next, taken inside generate() by a stopping criterion. The first steps
of a block carry generate()'s own set-up and caches gone cold while the others ran, so they are dropped.

Memory: `PeakMemory` watches the prompt and its first token, the filling of the cache included, and, after the timing, a
few more untimed steps, where transient copies of the past and the growth of a cache show up. What glibc keeps of freed
tensors can make the same prompt peak at twice its usual memory. So a prompt is measured several times, in turns, into
fresh caches, as often as `prompts_s` allows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, groupby, product
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from hf_kvattn.evaluation import llama_cpp as llama
from hf_kvattn.evaluation.common import drawing
from hf_kvattn.evaluation.common import variants as caches
from hf_kvattn.evaluation.common.measurement import Figure, Measurement, Results, skipped_limits, skipped_list
from hf_kvattn.evaluation.common.memory import PeakMemory, cache_bytes
from hf_kvattn.evaluation.common.running import model_command
from hf_kvattn.evaluation.common.timing import in_turns, ratio, spread
from hf_kvattn.evaluation.common.tokens import NEAR_TIE_FP32, NEAR_TIE_ULPS, Lane, compare_tokens
from hf_kvattn.evaluation.common.variants import BASELINE, STATIC_BASELINE, Variant
from hf_kvattn.tools.command_line import positive_int
from hf_kvattn.tools.conditions import source_name
from hf_kvattn.tools.tables import Column, digits, joined, mib, show_spread, speedup, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DROPPED_STEPS = 1  # of every block
WARM_UP_STEPS = 2  # decoded after the prefill and thrown away: a compiling cache does it here
MEMORY_STEPS = 3  # of the untimed memory pass
WARM_UP_CONTEXT = 32
STOCK = (BASELINE, STATIC_BASELINE)
NEAR_TIE = (
    f"within {NEAR_TIE_FP32:g} of each other in float32, within {NEAR_TIE_ULPS} units in the last place of the larger "
    "logit in 16-bit dtypes"
)


@contextmanager
def _plain_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Only greedy search: none of the sampling, penalties or cache that the model's own defaults may ask for."""
    saved = model.generation_config
    end = saved.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    padding = next((i for i in (saved.pad_token_id, tokenizer.pad_token_id, first_end) if i is not None), 0)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=padding)
    try:
        yield
    finally:
        model.generation_config = saved


def _decode(model: PreTrainedModel, lane: Lane, steps: int) -> list[float]:
    """Decode `steps` tokens, and give the seconds from the call to each of them."""
    if isinstance(lane.cache, llama.LlamaCpp):
        lane.ids, taken_s = lane.cache.decode(lane.ids, steps)
        return taken_s
    times_s: list[float] = []

    def clock(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """A stopping criterion that never stops."""
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        times_s.append(time.perf_counter() - start_s)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    generator: Any = caches.generator(model, lane.variant)  # a model; its methods are typed as tensors
    with caches.running(model, lane.variant):
        start_s = time.perf_counter()
        lane.ids = generator.generate(
            input_ids=lane.ids,
            attention_mask=torch.ones_like(lane.ids),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
            **({"use_cache": False} if lane.cache is None else {"past_key_values": lane.cache}),
        )
    return times_s


def _run_prompt(model: PreTrainedModel, lane: Lane, memory: PeakMemory) -> None:
    memory.start()
    lane.ttft_s += _decode(model, lane, 1)
    lane.prompt_peak_bytes.append(memory.stop())


def _time_round(model: PreTrainedModel, lane: Lane, steps: int) -> None:
    # Without a cache every step is a whole prefill, so one timed step a round must do.
    times_s = _decode(model, lane, steps if lane.cache is not None else DROPPED_STEPS + 1)
    # times_s[0] ends the first step, so step i lasts from times_s[i - 1] to times_s[i].
    lane.rounds_s.append([b - a for a, b in zip(times_s[DROPPED_STEPS - 1 :], times_s[DROPPED_STEPS:], strict=False)])


def _warm_up(model: PreTrainedModel, token_ids: torch.Tensor, variants: list[Variant]) -> None:
    """Run every variant once, unmeasured: imports, extensions that compile and thread pools happen here."""
    prompt = token_ids[None, :WARM_UP_CONTEXT].to(model.device)
    for variant in variants:
        cache, reason = caches.try_make(variant, model.config, prompt.shape[1] + 1 + WARM_UP_STEPS)
        if reason is None:
            lane = Lane(variant, cache, prompt)
            _decode(model, lane, 1)
            _decode(model, lane, WARM_UP_STEPS)


def _measure_cell(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    variants: list[Variant],
    settings: dict[str, Any],
    memory: PeakMemory,
    progress: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The variants on one prompt `(batch, context)`, the stock one first; and those that cannot run, with reasons."""
    batch_size, context = prompt.shape
    rounds, block, limit_s = settings["rounds"], settings["block_steps"], settings["none_limit_s"]
    capacity = context + 1 + WARM_UP_STEPS + rounds * block + MEMORY_STEPS
    lanes: list[Lane] = []
    skipped: list[dict[str, Any]] = []
    for variant in variants:
        cache, reason = caches.try_make(variant, model.config, capacity)
        # A step without cache is a forward over the whole prompt, which the stock prefill has just timed.
        if reason is None and cache is None and lanes[0].ttft_s[0] > limit_s:
            reason = f"a step would take about {lanes[0].ttft_s[0]:.1f} s, the limit is {limit_s:g} s"
        if isinstance(cache, llama.LlamaCpp) and batch_size > 1:
            reason = "llama.cpp is measured with one row"
        if reason is not None:
            skipped.append({"variant": variant.name, "context": context, "batch": batch_size, "reason": reason})
            continue
        lanes.append(Lane(variant, cache, prompt))
        _run_prompt(model, lanes[-1], memory)
        if cache is not None:
            _decode(model, lanes[-1], WARM_UP_STEPS)
    prompts = int(max(1, min(rounds, settings["prompts_s"] / lanes[0].ttft_s[0])))
    for lane in in_turns(lanes, range(1, prompts)):
        # A copy of the lane shares its lists of times and bytes; its cache is gone before the next is measured.
        _run_prompt(model, replace(lane, cache=lane.variant.make(model.config, capacity), ids=prompt), memory)
    label = f"context {context}, batch {batch_size}"
    for lane in in_turns(lanes, tqdm(range(rounds), desc=label, unit="round", disable=not progress)):
        _time_round(model, lane, block)
    for lane in lanes:
        lane.bytes = cache_bytes(lane.cache)
        memory.start()
        _decode(model, lane, MEMORY_STEPS if lane.cache is not None else 1)
        lane.extra_bytes = memory.stop()
    tokens = compare_tokens(model, lanes[0], lanes, context)
    stock = {lane.variant.name: lane for lane in lanes if lane.variant.name in STOCK}
    rows = [_row(lane, stock, found, context) for lane, found in zip(lanes, tokens, strict=True)]
    return {"context": context, "batch": batch_size, "prompts": prompts, "rows": rows}, skipped


def _row(lane: Lane, stock: dict[str, Lane], tokens: dict[str, Any], context: int) -> dict[str, Any]:
    batch_size, ttft_s = lane.ids.shape[0], statistics.median(lane.ttft_s)
    steps_s = list(chain.from_iterable(lane.rounds_s))
    return {
        "variant": lane.variant.name,
        "hooked": lane.variant.hooked,
        "ttft_ms": 1e3 * ttft_s,
        "prefill_tok_s": batch_size * context / ttft_s,
        "step_ms": spread(1e3 * step_s for step_s in steps_s),
        "round_median_ms": [1e3 * statistics.median(round_s) for round_s in lane.rounds_s],
        "decode_tok_s": batch_size / statistics.median(steps_s),
        "steps_timed": len(steps_s),
        "steps_dropped": DROPPED_STEPS * len(lane.rounds_s),
        "cache_bytes": lane.bytes,
        "decode_extra_bytes": lane.extra_bytes,
        "prompt_peak_bytes": spread(lane.prompt_peak_bytes),
        "speedup": {name: ratio(stock[name].rounds_s, lane.rounds_s) if name in stock else None for name in STOCK},
        "tokens": tokens,
    }


def _price_of_context(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the largest context costs a step over the smallest one, for each batch size and variant."""
    prices: list[dict[str, Any]] = []
    for batch_size, group in groupby(cells, itemgetter("batch")):
        small, *others = group
        if not others:
            continue
        ends = (small, others[-1])
        before_ms, after_ms = ({row["variant"]: row["step_ms"]["median"] for row in cell["rows"]} for cell in ends)
        extra_ms = {name: after_ms[name] - before_ms[name] for name in after_ms if name in before_ms}
        prices += [
            {
                "batch": batch_size,
                "contexts": [cell["context"] for cell in ends],
                "variant": name,
                "extra_ms": extra,
                "growth": after_ms[name] / before_ms[name],
                "share_of": {other: extra / extra_ms[other] if extra_ms.get(other, 0) > 0 else None for other in STOCK},
            }
            for name, extra in extra_ms.items()
        ]
    return prices


def _over_limit(context: int, batch_size: int, max_batch_tokens: int) -> bool:
    """The limit is there to leave out large batches of long prompts; single rows may be as long as asked."""
    return batch_size > 1 and batch_size * context > max_batch_tokens


def tokens_needed(contexts: Sequence[int], batch_sizes: Sequence[int], max_batch_tokens: int) -> int:
    """How much text `measure` reads."""
    sizes = product(contexts, batch_sizes)
    return max((c * b for c, b in sizes if not _over_limit(c, b, max_batch_tokens)), default=0)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: torch.Tensor,
    *,
    variants: Sequence[Variant],
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    new_tokens: int = 45,
    rounds: int = 5,
    none_limit_s: float = 4.0,
    prompts_s: float = 10.0,
    max_batch_tokens: int = 16384,
    llama_cpp: str | None = None,
    progress: bool = False,
) -> Results:
    """Time the variants against each other on one model.

    Args:
        token_ids: the text as a 1-D tensor; see `tokens_needed`. The rows of a batch are consecutive pieces of it.
        variants: what to compare; the stock baseline is added in front when it is not among them.
        new_tokens: tokens decoded in the timed rounds together; `new_tokens / rounds` steps are one block.
        rounds: turns that each variant gets.
        prompts_s: seconds for the prompts of one cache, of one context and batch size: their memory and first token are
            measured as often as prompts of the stock baseline fit in, once a round at most, and once at least.
        max_batch_tokens: batches of two rows and more with more prompt tokens together are skipped.
        llama_cpp: a .gguf file that llama.cpp decodes in turns with the variants, with keys and values of each type.
        contexts, batch_sizes, none_limit_s: as on the command line.
        progress: show bars on stderr.
    """
    needed = tokens_needed(contexts, batch_sizes, max_batch_tokens)
    if not variants or not needed:
        sizes = f"{contexts=} x {batch_sizes=} within {max_batch_tokens=}"
        raise ValueError(f"nothing to measure: {len(variants)} variants, {sizes}")
    if min(contexts) < 2 or min(batch_sizes) < 1 or rounds < 1:
        raise ValueError(f"contexts start at 2, batch sizes and rounds at 1: {contexts=}, {batch_sizes=}, {rounds=}")
    if not prompts_s >= 0:
        raise ValueError(f"prompts_s must be a number of seconds from 0 on, got {prompts_s!r}")
    if new_tokens % rounds or new_tokens // rounds <= DROPPED_STEPS:
        raise ValueError(f"{new_tokens=} is not {rounds=} times at least {DROPPED_STEPS + 1} steps")
    if len(token_ids) < needed:
        raise ValueError(f"{contexts=} x {batch_sizes=} need {needed} tokens, the text has {len(token_ids)}")
    ordered = [caches.VARIANTS[BASELINE]] + [variant for variant in variants if variant.name != BASELINE]
    ordered += [] if llama_cpp is None else llama.variants(llama_cpp)
    memory = PeakMemory(model.device)
    settings: dict[str, Any] = {
        **{"new_tokens": new_tokens, "rounds": rounds, "block_steps": new_tokens // rounds},
        **{"dropped_steps_per_block": DROPPED_STEPS, "warm_up_steps": WARM_UP_STEPS},
        **{"none_limit_s": none_limit_s, "prompts_s": prompts_s, "max_batch_tokens": max_batch_tokens},
        **{"memory_method": memory.method, "near_tie": NEAR_TIE},
        **({} if llama_cpp is None else {"llama_cpp": {"model": source_name(llama_cpp), **llama.SETTINGS}}),
    }
    cells: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    with _plain_greedy(model, tokenizer):
        _warm_up(model, token_ids, ordered)
        for batch_size, context in product(sorted(set(batch_sizes)), sorted(set(contexts))):
            if _over_limit(context, batch_size, max_batch_tokens):
                reason = f"{batch_size * context} prompt tokens are over the limit of {max_batch_tokens}"
                skipped.append({"variant": "all", "context": context, "batch": batch_size, "reason": reason})
                continue
            prompt = token_ids[: batch_size * context].view(batch_size, context).to(model.device)
            cell, left_out = _measure_cell(model, prompt, ordered, settings, memory, progress)
            cells.append(cell)
            skipped += left_out
    return {
        "kind": "throughput",
        "settings": settings,
        "cells": cells,
        "price_of_context": _price_of_context(cells),
        "skipped": skipped,
        "mismatches": sum(row["tokens"]["verdict"] == "MISMATCH" for cell in cells for row in cell["rows"]),
    }


def _peak(value: dict[str, float] | float) -> str:
    """The memory of prompts; one number in results of before they were repeated."""
    if not isinstance(value, dict):
        return mib(value)
    return mib(value["median"]) if value["p20"] == value["p80"] else show_spread(value, mib)


COLUMNS: list[Column] = [
    ("cache", "variant", str),
    ("step ms (p20 to p80)", "step_ms", lambda value: show_spread(value, digits(".1f"))),
    ("tok/s", "decode_tok_s", digits(".1f")),
    *((f"faster than {name}", f"speedup.{name}", speedup) for name in STOCK),
    ("first token ms", "ttft_ms", digits(".0f")),
    ("prefill tok/s", "prefill_tok_s", digits(".0f")),
    ("cache MiB", "cache_bytes", mib),
    ("prompt MiB", "prompt_peak_bytes", _peak),
    ("extra MiB", "decode_extra_bytes", mib),
    ("tokens", "tokens", "{0[verdict]} ({0[compared]})".format),
]
PRICE_COLUMNS: list[Column] = [
    ("cache", "variant", str),
    ("batch", "batch", str),
    ("contexts", "contexts", "{0[0]} to {0[1]}".format),
    ("extra ms a step", "extra_ms", digits(".1f")),
    ("growth", "growth", digits(".2f")),
    *((f"share of {name}'s", f"share_of.{name}", digits(".2f")) for name in STOCK),
]


def _tables(results: Results) -> str:
    settings = results["settings"]
    prompts = "The first token and the prefill were timed once."
    if "prompts_s" in settings:  # not in results of before they were repeated
        prompts = (
            "The first token, the prefill and the memory of a prompt are medians of several prompts, one a round as "
            f"far as they fit in {settings['prompts_s']:g} s; memory with p20 to p80."
        )
    notes = (
        "A step is the time between two tokens inside `generate()`, the median of all timed steps. Every variant had "
        f"{settings['rounds']} turns of {settings['block_steps']} steps, of which the first "
        f'{settings["dropped_steps_per_block"]} carries set-up and was dropped. "Faster than" is the ratio of the '
        f"medians; then the median of the ratios within each round, with p20 to p80. {prompts} Memory that the prompt "
        "takes at its peak, the cache included (prompt MiB), and decoding beyond it (extra MiB): "
        f"{settings['memory_method']}. Tokens are compared with those of {BASELINE}, in brackets how many a row; a "
        f"near tie is {settings['near_tie']}; `differs` is said of lossy caches.\n"
    )
    if "llama_cpp" in settings:
        notes += (
            f"\nThe rows of llama.cpp have the weights of {settings['llama_cpp']['model']}, flash attention and the "
            "same threads and tokens; it takes the memory of its cache before the prompt, which does not count it.\n"
        )
    prices = results["price_of_context"]
    price_notes = "### The price of context\n\nA step at the largest context minus a step at the smallest.\n"
    price = [price_notes, table_of(PRICE_COLUMNS, prices)] if prices else []
    return joined(notes, *map(_cell, results["cells"]), *price, skipped_list(results))


def _cell(cell: dict[str, Any]) -> str:
    title = f"### Context {cell['context']}, batch {cell['batch']}\n"
    prompts = f"Prompts of each cache: {cell['prompts']}.\n" if "prompts" in cell else ""
    differences = "".join(
        f"- {row['variant']}, row {found['row']}: differs from new token {found['new_token'] + 1} on; the stock logits"
        f" of the two tokens are {found['margin']:.4g} apart, a near tie is up to {found['tolerance']:.4g}\n"
        for row in cell["rows"]
        for found in row["tokens"]["differences"]
        if "margin" in found
    )
    return joined(title, prompts, table_of(COLUMNS, cell["rows"]), differences)


def _draw_steps(axes: Axes, cells: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """One panel: step time against context, for one batch size."""
    contexts = [cell["context"] for cell in cells]
    hooked = {row["variant"] for cell in cells for row in cell["rows"] if row["hooked"]}
    lines: dict[str, list[tuple[int, dict[str, float]]]] = defaultdict(list)
    for cell in cells:
        for row in cell["rows"]:
            lines[row["variant"]].append((cell["context"], row["step_ms"]))
    # Decoding without a cache would flatten all the others: its line leaves the panel.
    top = 1.15 * max(step["median"] for name, line in lines.items() if name != "none" for _, step in line)
    ends: list[tuple[str, float, float]] = []
    for name, line in lines.items():
        x = [context for context, _ in line]
        median, low, high = ([step[key] for _, step in line] for key in ("median", "p20", "p80"))
        style: dict[str, Any] = {"color": colors[name], "zorder": 3 if name in hooked else 2}
        axes.plot(x, median, marker="o", markersize=4, linewidth=2.4 if name in hooked else 1.3, **style)
        axes.fill_between(x, low, high, alpha=0.18, linewidth=0, **style)
        ends.append((name, x[-1], median[-1]))
    axes.set_xscale("log")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    axes.set_xlim(contexts[0] / 1.15, contexts[-1] * 1.15)
    axes.set_ylim(0, top)
    drawing.caption(axes, x="tokens of context", title=f"batch {cells[0]['batch']}")
    drawing.label_ends(axes, ends, contexts[-1], top, colors, hooked)
    drawing.plain(axes)


def _draw(results: Results) -> Any:
    """Step time against context, one panel a batch size."""
    batches = [list(cells) for _, cells in groupby(results["cells"], itemgetter("batch"))]
    title = "Time of a decode step inside generate()"
    figure = drawing.new_figure(6.4 * len(batches), 4.6, title, results["conditions"])
    colors = drawing.colors_of([row for cell in results["cells"] for row in cell["rows"]])
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, cells in zip(panels, batches, strict=True):
        _draw_steps(axes, cells, colors)
    drawing.caption(panels[0], y="ms a step: median, p20 to p80")
    return figure


NOTABLE = 0.97  # a share below this is said in a card, one above it is the noise of the machine
VERDICTS = {
    "MISMATCH": "wrong tokens",
    "near_tie": "other tokens than stock from a near tie on",
    "differs": "other tokens than stock, as lossy caches may",
}


def limits(results: Results) -> list[str]:
    """Where ours are slower or larger, the worst case of each, and whose tokens differ."""
    worse: dict[str, dict[str, float]] = defaultdict(dict)
    differing: dict[str, list[str]] = defaultdict(list)
    for cell in results["cells"]:
        stock = next(row for row in cell["rows"] if row["variant"] == BASELINE)
        fastest_ms = min(row["step_ms"]["median"] for row in cell["rows"])
        where = f"{cell['context']} x {cell['batch']}"
        for row in (row for row in cell["rows"] if row["hooked"]):
            shares = {
                "decodes at {} of the fastest cache's speed": fastest_ms / row["step_ms"]["median"],
                f"prefills at {{}} of {BASELINE}'s speed": row["prefill_tok_s"] / stock["prefill_tok_s"],
                f"{BASELINE} allocates {{}} of its bytes": stock["cache_bytes"] / row["cache_bytes"],
            }
            for text, share in shares.items():
                if share < NOTABLE:
                    worse[f"{row['variant']}: {text}"][where] = share
        for row in cell["rows"]:
            if row["tokens"]["verdict"] in VERDICTS:
                differing[f"{row['variant']}: {VERDICTS[row['tokens']['verdict']]}"].append(where)
    found = {f"{text.format(f'{min(shares.values()):.2f}')} or more": list(shares) for text, shares in worse.items()}
    lines = [f"{text} (context x batch: {', '.join(places)})." for text, places in (found | differing).items()]
    return lines + skipped_limits(results)


def _figures(results: Results) -> Iterator[Figure]:
    for cell in results["cells"]:
        settings = {key: cell[key] for key in ("context", "batch")}
        for row in cell["rows"]:
            name, step_ms = f"median decode step, ms: {row['variant']}", row["step_ms"]["median"]
            yield Figure("{context} tokens x {batch}".format(**cell), "step_ms", name, step_ms, settings)


MEASUREMENT = Measurement("throughput", "Throughput", _tables, "step_ms.png", _draw, limits, _figures)

HELP = """Compare the speed and memory of caches inside the real generate(), on your model.

    hf-kvattn throughput
    hf-kvattn throughput --out results --contexts 128 2048 --batch-sizes 1
    hf-kvattn throughput --model ./my-model --dtype float32 --variants stock-dynamic kvattn-static
    hf-kvattn throughput --model ./my-model --weights int8 --variants kvattn-static-fit kvattn-static-compiled
    hf-kvattn throughput --model ./my-model --llama-cpp my-model.gguf --batch-sizes 1

Exits with status 1 when a cache that must be exact gives other tokens than the stock one, near ties excepted.
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    sizes: dict[str, Any] = {"nargs": "+", "type": positive_int}
    parser.add_argument("--contexts", default=[128, 2048, 7900], help="prompt tokens", **sizes)
    parser.add_argument("--batch-sizes", default=[1, 8], help="prompts at once", **sizes)
    parser.add_argument("--new-tokens", type=positive_int, default=45, help="decoded in all rounds together")
    parser.add_argument("--rounds", type=positive_int, default=5, help="turns of each cache")
    help = "skip batches with more prompt tokens"
    parser.add_argument("--max-batch-tokens", type=positive_int, default=16384, help=help)
    help = "skip decoding without a cache when a step takes longer"
    parser.add_argument("--none-limit-s", type=float, default=4.0, help=help)
    help = "seconds for each cache's prompts: one a round, as far as they fit"
    parser.add_argument("--prompts-s", type=float, default=10.0, help=help)
    help = "a .gguf file of the same model: measure llama.cpp too, by llama-cpp-python"
    parser.add_argument("--llama-cpp", metavar="MODEL.gguf", help=help)


COMMAND = model_command(
    HELP,
    caches.default_names(),
    _add_options,
    measure,
    lambda args: tokens_needed(args.contexts, args.batch_sizes, args.max_batch_tokens),
    failed=lambda results: results["mismatches"] > 0,
)
