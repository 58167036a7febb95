"""What is said of attention and KV caches, measured on the reader's own machine, with the stated figure beside it.

- Prefill attention of one layer: standard (the T x T scores written to memory), tiled (what this package's dispatch
  takes), and tiled within a sliding window, in chunks that read no more than they see. Time and peak memory.
- Decoding with the real model: a step without a cache (a forward over everything) against steps with one, by
  `throughput.py`.
- One layer's cache with 32, 8 and 1 KV heads for 32 query heads, and with 8 and a window: bytes, and the time of a
  decode step's attention.

Everything is timed in turns within one process. `stated.py` then puts each stated figure beside the measured one.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kvattn.caches.static import StaticKVCache
from hf_kvattn.evaluation import stated, throughput
from hf_kvattn.evaluation.common import drawing
from hf_kvattn.evaluation.common.measurement import Figure, Measurement, skipped_limits, skipped_list
from hf_kvattn.evaluation.common.memory import PeakMemory
from hf_kvattn.evaluation.common.running import model_command
from hf_kvattn.evaluation.common.timing import in_turns, ratio, spread_of
from hf_kvattn.evaluation.common.variants import BASELINE, Variant
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.modules import CachedSelfAttention
from hf_kvattn.tools.command_line import positive_int
from hf_kvattn.tools.tables import Column, digits, joined, mib, show_spread, speedup, table_of, three_digits

TURN_S = 0.02  # an action is repeated within its turn until this is over, so that short ones are not one call's luck
LAYERS_BYTES = 256 << 20  # decode attention goes round layers that exceed the CPU's caches together, as a model's do
CHUNK = 1024  # queries at once within a window
METHODS = ("standard", "tiled", "windowed")
CACHE_HEADS, CACHE_DIM = 32, 128  # the layer whose cache is measured: that of 7B Llama-style models
KV_HEADS = {"MHA": 32, "GQA": 8, "MQA": 1, "GQA, window": 8}


def _standard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The textbook's causal attention `(B, T, H, D)`, all scores in memory."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2)


def _tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    return dispatch.attend(AttendCall(q, k, v, q.shape[-1] ** -0.5, window=window))


def _windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    parts = []
    for start in range(0, q.shape[2], CHUNK):
        end = min(start + CHUNK, q.shape[2])
        seen = slice(max(0, start - window + 1), end)
        parts.append(_tiled(q[:, :, start:end], k[:, :, seen], v[:, :, seen], window))
    return torch.cat(parts, 1)


def _time_in_turns(
    actions: Mapping[str, Sequence[Callable[[], Any]]], rounds: int, device: torch.device
) -> dict[str, list[list[float]]]:
    """Milliseconds of the calls of each action, by round; every round starts with another action.

    An action's calls are timed together, one after the other, and each time is that of one of them.
    """

    def turn(calls: Sequence[Callable[[], Any]], until_s: float) -> list[float]:
        times_s: list[float] = []
        while not times_s or sum(times_s) < until_s:
            start_s = time.perf_counter()
            for call in calls:
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times_s.append(time.perf_counter() - start_s)
        return [1e3 * time_s / len(calls) for time_s in times_s]

    for calls in actions.values():
        turn(calls, 0.0)  # warm-up
    times_ms: dict[str, list[list[float]]] = {name: [] for name in actions}
    for name in in_turns(list(actions), range(rounds)):
        times_ms[name].append(turn(actions[name], TURN_S))
    return times_ms


def _attention(
    model: PreTrainedModel, heads: Sequence[int], length: int, window: int, rounds: int, standard: bool
) -> dict[str, Any]:
    """Causal attention of a whole sequence by each method; `standard` says whether that one is among them.

    Returns:
        `methods`: for each its `ms` (median, p20, p80) and `extra_bytes`, how far memory rose above its level before;
        `speedup` of tiled over standard and of windowed over tiled; `max_difference` of standard and tiled results.
    """
    q_heads, kv_heads, dim = heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n_heads, length, dim) for n_heads in (q_heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator).to(model.device, model.dtype) for shape in shapes)
    actions = {"standard": partial(_standard, q, k, v)} if standard else {}
    actions |= {"tiled": partial(_tiled, q, k, v), "windowed": partial(_windowed, q, k, v, window)}
    difference = (_standard(q, k, v) - _tiled(q, k, v)).abs().max().item() if standard else None
    times_ms = _time_in_turns({name: [action] for name, action in actions.items()}, rounds, model.device)
    memory, methods = PeakMemory(model.device), {}
    for name, action in actions.items():
        memory.start()
        action()
        methods[name] = {"ms": spread_of(times_ms[name]), "extra_bytes": memory.stop()}
    speedups = {
        fast: ratio(times_ms[slow], times_ms[fast]) if slow in times_ms else None
        for slow, fast in (("standard", "tiled"), ("tiled", "windowed"))
    }
    return {"tokens": length, "methods": methods, "speedup": speedups, "max_difference": difference}


def _caches(model: PreTrainedModel, length: int, window: int, rounds: int) -> dict[str, Any]:
    """One layer's cache of `length` tokens for each number of KV heads: bytes, and the attention of a decode step.

    Returns:
        `layouts`: for each its `kv_heads`, `window`, `cache_bytes` and `step_ms`, how many `copies` of the cache a step
        went round, and `faster_than_mha`, the ratio of the times.
    """
    layouts: dict[str, dict[str, Any]] = {}
    actions: dict[str, list[Callable[[], Any]]] = {}
    q = torch.randn(1, CACHE_HEADS, 1, CACHE_DIM).to(model.device, model.dtype)
    for name, kv_heads in KV_HEADS.items():
        limit = window if name.endswith("window") else None
        config = CachedSelfAttention(CACHE_HEADS * CACHE_DIM, CACHE_HEADS, kv_heads, window=limit).config
        keys = torch.randn(1, kv_heads, length, CACHE_DIM, dtype=model.dtype, device=model.device)
        copies = LAYERS_BYTES // (2 * keys.nbytes) + 1
        caches = [StaticKVCache(config, max_cache_len=length) for _ in range(copies)]
        for cache in caches:
            cache.kv_layers[0].append(keys, keys)
            cache.kv_layers[0].finish_attention()
        layouts[name] = {"kv_heads": kv_heads, "window": limit, "cache_bytes": caches[0].nbytes, "copies": copies}
        stored = [cache.kv_layers[0].dense() for cache in caches]
        calls = [AttendCall(q, k, v, CACHE_DIM**-0.5, window=limit) for k, v in stored]
        actions[name] = [partial(dispatch.attend, call) for call in calls]
    times_ms = _time_in_turns(actions, rounds, model.device)
    for name, layout in layouts.items():
        layout["step_ms"] = spread_of(times_ms[name])
        layout["faster_than_mha"] = ratio(times_ms["MHA"], times_ms[name])
    return {"tokens": length, "layouts": layouts}


def _decoding(cell: dict[str, Any]) -> dict[str, Any]:
    """Of a cell of `throughput.measure`, what decoding without a cache costs against decoding with one."""
    rounds_ms = {row["variant"]: [[each] for each in row["round_median_ms"]] for row in cell["rows"]}
    rows = []
    for row in cell["rows"]:
        faster = ratio(rounds_ms["none"], rounds_ms[row["variant"]]) if "none" in rounds_ms else None
        known = {key: row[key] for key in ("variant", "hooked", "step_ms")}
        rows.append(known | {"verdict": row["tokens"]["verdict"], "speedup": faster})
    return {"context": cell["context"], "rows": rows}


def _standard_bytes(heads: Sequence[int], length: int, dtype: torch.dtype) -> int:
    """What standard attention needs at once, at most: the scores, the masked ones, the weights and a mask."""
    return length * length * (3 * heads[0] * dtype.itemsize + 1)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: torch.Tensor,
    *,
    variants: Sequence[Variant],
    contexts: Sequence[int],
    lengths: Sequence[int],
    cache_lengths: Sequence[int],
    heads: Sequence[int],
    window: int,
    standard_bytes: int,
    rounds: int = 5,
    new_tokens: int = 20,
    none_limit_s: float = 60.0,
    progress: bool = False,
) -> dict[str, Any]:
    """All claims on one machine and model, as a dict that JSON can hold; `_add_options` says what the sizes are.

    Args:
        model: what decodes; its dtype and device are those of the other measurements too.
        token_ids: the text as a 1-D tensor, at least as long as the longest context.
        variants: caches that decode; `none` must be among them.
        new_tokens: a multiple of `rounds`.
        progress: show bars on stderr.
    """
    q_heads, kv_heads, dim = heads
    if min(heads) < 1 or q_heads % kv_heads:
        raise ValueError(f"impossible heads: {q_heads=}, {kv_heads=}, {dim=}")
    if not lengths or not cache_lengths or min(*lengths, *cache_lengths, window, rounds) < 1:
        raise ValueError(f"sizes start at 1: {lengths=}, {cache_lengths=}, {window=}, {rounds=}")
    if "none" not in (names := [variant.name for variant in variants]):
        raise ValueError(f"decoding without a cache is what caches are compared with: 'none' is not among {names}")
    times: dict[str, Any] = {"new_tokens": new_tokens, "rounds": rounds, "none_limit_s": none_limit_s}
    decoded = throughput.measure(
        model, tokenizer, token_ids, variants=variants, contexts=contexts, batch_sizes=[1], progress=progress, **times
    )
    needed = {length: _standard_bytes(heads, length, model.dtype) for length in sorted(set(lengths))}
    limit = f"the limit is {standard_bytes / 2**30:.1f} GiB"
    skipped = [
        {"variant": "standard attention", "context": length, "batch": 1}
        | {"reason": f"the scores would take {size / 2**30:.1f} GiB, {limit}"}
        for length, size in needed.items()
        if size > standard_bytes
    ]
    with torch.no_grad():
        bar = tqdm(needed.items(), desc="prefill attention", disable=not progress)
        attention = [_attention(model, heads, length, window, rounds, size <= standard_bytes) for length, size in bar]
        bar = tqdm(sorted(set(cache_lengths)), desc="caches", disable=not progress)
        caches = [_caches(model, length, window, rounds) for length in bar]
    results = {
        "kind": "claims",
        "settings": {"rounds": rounds, "new_tokens": new_tokens, "heads": list(heads), "window": window}
        | {"cache_heads": CACHE_HEADS, "cache_dim": CACHE_DIM, "memory_method": PeakMemory(model.device).method}
        | {"near_tie": decoded["settings"]["near_tie"]},
        "attention": attention,
        "decoding": list(map(_decoding, decoded["cells"])),
        "caches": caches,
        "skipped": skipped + decoded["skipped"],
        "mismatches": decoded["mismatches"],
    }
    return results | {"claims": stated.judge(results)}


def _stated(bounds: list[float]) -> str:
    low, high = bounds
    return f"{low:.3g}" + (" or more" if high is None else "" if high == low else f" to {high:.3g}")


CLAIM_COLUMNS: list[Column] = [
    ("claim", "claim", str),
    ("stated by", "source", str),
    ("stated", "stated", _stated),
    ("measured", "measured", three_digits),
    ("agrees", "agrees", {True: "yes", False: "**no**"}.__getitem__),
]
ATTENTION_COLUMNS: list[Column] = [
    ("tokens", "tokens", str),
    *((f"{name} {unit}", f"methods.{name}.{key}", show) for name in METHODS
      for unit, key, show in (("ms", "ms", show_spread), ("MiB", "extra_bytes", mib))),
    ("tiled faster", "speedup.tiled", speedup),
    ("difference", "max_difference", digits(".1g")),
]  # fmt: skip
STEP_COLUMNS: list[Column] = [
    ("cache", "variant", str),
    ("context", "context", str),
    ("step ms (p20 to p80)", "step_ms", show_spread),
    ("faster than none", "speedup", speedup),
    ("tokens", "verdict", str),
]
LAYOUT_COLUMNS: list[Column] = [
    ("heads", "name", str),
    ("KV heads", "kv_heads", str),
    ("tokens", "tokens", str),
    ("cache MiB", "cache_bytes", mib),
    ("step ms (p20 to p80)", "step_ms", show_spread),
    ("faster than MHA", "faster_than_mha", speedup),
]


def _tables(results: dict[str, Any]) -> str:
    settings = results["settings"]
    steps = [{**row, **cell} for cell in results["decoding"] for row in cell["rows"]]
    layouts = [{**row, **cell, "name": name} for cell in results["caches"] for name, row in cell["layouts"].items()]
    return joined(
        f"Times are medians (p20 to p80) of {settings['rounds']} turns. Memory: {settings['memory_method']}.\n",
        "### Stated and measured\n\nA figure within a fifth of the stated one agrees with it.\n",
        table_of(CLAIM_COLUMNS, results["claims"]),
        "".join(
            f"- {row['claim']}, measured {three_digits(row['measured'])}: {row['why']}.\n"
            for row in stated.disagreements(results)
        ),
        "### Prefill attention of one layer, {} query and {} KV heads of {}\n\n".format(*settings["heads"])
        + "Standard writes all scores to memory, tiled is what this package takes, windowed is tiled in a window of "
        f"{settings['window']}.\n",
        table_of(ATTENTION_COLUMNS, results["attention"]),
        "### A decode step with and without a cache\n",
        table_of(STEP_COLUMNS, steps),
        f"### One layer's cache, {settings['cache_heads']} query heads of {settings['cache_dim']}\n\n"
        "The step is the layer's decode attention alone.\n",
        table_of(LAYOUT_COLUMNS, layouts),
        skipped_list(results),
    )


def _draw(results: dict[str, Any]) -> Any:
    """Panels of prefill attention's time and memory, decoding with and without a cache, and one layer's cache."""
    title = "What is said of attention and KV caches, measured"
    figure = drawing.new_figure(10.0, 10.5, title, results["conditions"])
    panels = figure.subplot_mosaic([["time", "memory"], ["decoding", "decoding"], ["caches", "steps"]])
    attention = [(name, row["tokens"], each) for row in results["attention"] for name, each in row["methods"].items()]
    steps = [(row["variant"], cell["context"], row) for cell in results["decoding"] for row in cell["rows"]]
    caches = [(name, cell["tokens"], each) for cell in results["caches"] for name, each in cell["layouts"].items()]
    palette, of_variants = ("#444444", *drawing.OURS), drawing.colors_of([row for *_, row in steps])
    of_methods = dict(zip(METHODS, palette, strict=False))
    of_layouts = dict(zip(results["caches"][0]["layouts"], itertools.cycle(palette), strict=False))
    of_variants = {name: of_variants[name] for name, *_ in steps}

    def panel(
        place: str, title: str, rows: list[tuple], value: Callable[[dict], float], colors: dict[str, str]
    ) -> None:
        lines: dict[str, list[tuple[float, float]]] = {name: [] for name in colors}
        for name, tokens, row in rows:
            if value(row):  # memory that did not rise has no place on a logarithmic axis
                lines[name].append((tokens, value(row)))
        drawing.plot_lines(panels[place], lines, colors, title)
        drawing.caption(panels[place], x="tokens")

    layer = "prefill attention of one layer"
    panel("time", f"{layer}: ms", attention, lambda row: row["ms"]["median"], of_methods)
    panel("memory", f"{layer}: peak MiB", attention, lambda row: row["extra_bytes"] / 2**20, of_methods)
    panel("decoding", "a decode step of the model: ms", steps, lambda row: row["step_ms"]["median"], of_variants)
    panel("caches", "one layer's cache: MiB", caches, lambda row: row["cache_bytes"] / 2**20, of_layouts)
    panel("steps", "one layer's decode attention: ms", caches, lambda row: row["step_ms"]["median"], of_layouts)
    return figure


def _limits(results: dict[str, Any]) -> list[str]:
    wrong = stated.disagreements(results)
    lines = [f"{len(wrong)} of {len(results['claims'])} stated figures were not confirmed: see the reasons under them."]
    return lines + skipped_limits(results)


def _figures(results: dict[str, Any]) -> Iterator[Figure]:
    for row in results["claims"]:
        yield Figure("stated figures", "measured", row["claim"], row["measured"])


MEASUREMENT = Measurement("claims", "Claims", _tables, "claims.png", _draw, _limits, _figures)

HELP = """What is said of attention and KV caches, measured on your machine: the stated figure beside the measured one.

    hf-kvattn claims
    hf-kvattn claims --output results --rounds 7 --new-tokens 21
    hf-kvattn claims --model ./my-model --lengths 512 2048 --cache-lengths 8192 --contexts 128 1024

Standard against tiled and windowed attention, decoding with and without a cache, the caches of MHA, GQA, MQA and a
sliding window. Exits with status 1 when a cache that must be exact gives other tokens than the stock one.
"""


def _gib(text: str) -> int:
    """An argparse type: whole gibibytes as bytes."""
    return positive_int(text) * 2**30


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = partial(parser.add_argument, type=positive_int)
    lengths = [512, 1024, 2048, 4096, 8192, 16384, 32768]
    add("--contexts", nargs="+", default=[128, 512, 1024, 2048], help="prompt tokens, for decoding")
    add("--lengths", nargs="+", default=lengths, help="tokens of the prefill attention")
    add("--cache-lengths", nargs="+", default=lengths[3:], help="tokens of the caches compared")
    add("--heads", nargs=3, default=[8, 8, 64], help="of the prefill: query, KV, head_dim")
    add("--window", default=4096, help="visible tokens of the windowed rows")
    help = "skip standard attention where it needs more memory"
    add("--standard-gib", type=_gib, default="8", dest="standard_bytes", metavar="GIB", help=help)
    add("--rounds", default=5, help="turns of everything that is timed")
    add("--new-tokens", default=20, help="decoded in all rounds together")
    add("--none-limit-s", type=float, default=60.0, help="skip decoding without a cache when a step takes longer")


COMMAND = model_command(
    HELP,
    ["none", BASELINE, "kvattn-static"],
    _add_options,
    measure,
    lambda args: max(args.contexts),
    failed=lambda results: results["mismatches"] > 0,
)
