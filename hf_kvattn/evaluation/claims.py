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
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from hf_kvattn.tools.tables import (
    MISSING,
    Column,
    digits,
    joined,
    markdown_table,
    mib,
    show_spread,
    speedup,
    table_of,
    three_digits,
)

TURN_S = 0.02  # an action is repeated within its turn until this is over, so that short ones are not one call's luck
LAYERS_BYTES = 256 << 20  # decode attention goes round layers that exceed the CPU's caches together, as a model's do
CHUNK = 1024  # queries at once within a window
CACHE_HEADS, CACHE_DIM = 32, 128  # the layer whose cache is measured: that of 7B Llama-style models
KV_HEADS = {"MHA": 32, "GQA": 8, "MQA": 1, "GQA, window": 8}


def _standard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The textbook's causal attention `(B, T, H, D)`, all scores in memory."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2)


def _tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return dispatch.attend(AttendCall(q, k, v, q.shape[-1] ** -0.5))


def _windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    parts = []
    for start in range(0, q.shape[2], CHUNK):
        end, begin = min(start + CHUNK, q.shape[2]), max(0, start - window + 1)
        seen_k, seen_v = k[:, :, begin:end], v[:, :, begin:end]
        parts.append(
            dispatch.attend(AttendCall(q[:, :, start:end], seen_k, seen_v, q.shape[-1] ** -0.5, window=window))
        )
    return torch.cat(parts, 1)


def _time_in_turns(
    actions: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[list[float]]]:
    """Milliseconds of the calls of each action, by round; every round starts with another action."""

    def timed(action: Callable[[], Any]) -> float:
        start_s = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start_s)

    names = list(actions)
    times_ms: dict[str, list[list[float]]] = {name: [] for name in names}
    for action in actions.values():
        timed(action)  # warm-up
    for name in in_turns(names, range(rounds)):
        calls_ms = [timed(actions[name])]
        while sum(calls_ms) < 1e3 * TURN_S:
            calls_ms.append(timed(actions[name]))
        times_ms[name].append(calls_ms)
    return times_ms


def measure_attention(
    heads: Sequence[int],
    length: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    window: int,
    standard: bool,
    rounds: int,
    memory: PeakMemory,
) -> dict[str, Any]:
    """Causal attention of a whole sequence by each method; `standard` says whether that one is among them.

    Returns:
        `methods`: for each its `ms` (median, p20, p80) and `extra_bytes`, how far memory rose above its level before;
        `speedup` of tiled over standard and of windowed over tiled; `max_difference` of standard and tiled results.
    """
    q_heads, kv_heads, dim = heads
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, q_heads, length, dim, generator=generator).to(device, dtype)
    k, v = (torch.randn(1, kv_heads, length, dim, generator=generator).to(device, dtype) for _ in "kv")
    methods: dict[str, Callable[..., torch.Tensor]] = {"standard": _standard} if standard else {}
    methods |= {"tiled": _tiled, "windowed": functools.partial(_windowed, window=window)}
    actions = {name: functools.partial(method, q, k, v) for name, method in methods.items()}
    difference = (_standard(q, k, v) - _tiled(q, k, v)).abs().max().item() if standard else None
    times_ms = _time_in_turns(actions, rounds, device)
    row: dict[str, Any] = {"tokens": length, "methods": {}, "speedup": {}, "max_difference": difference}
    for name, action in actions.items():
        memory.start()
        action()
        row["methods"][name] = {"ms": spread_of(times_ms[name]), "extra_bytes": memory.stop()}
    for slow, fast in (("standard", "tiled"), ("tiled", "windowed")):
        row["speedup"][fast] = ratio(times_ms[slow], times_ms[fast]) if slow in times_ms else None
    return row


def measure_caches(
    length: int, *, dtype: torch.dtype, device: torch.device, window: int, rounds: int
) -> dict[str, Any]:
    """One layer's cache of `length` tokens for each number of KV heads: bytes, and the attention of a decode step.

    Returns:
        `layouts`: for each its `kv_heads`, `window`, `cache_bytes` and `step_ms`, how many `copies` of the cache a step
        went round, and `faster_than_mha`, the ratio of the times.
    """
    layouts: dict[str, dict[str, Any]] = {}
    actions: dict[str, Callable[[], Any]] = {}
    q = torch.randn(1, CACHE_HEADS, 1, CACHE_DIM).to(device, dtype)
    for name, kv_heads in KV_HEADS.items():
        limit = window if name.endswith("window") else None
        config = CachedSelfAttention(CACHE_HEADS * CACHE_DIM, CACHE_HEADS, kv_heads, window=limit).config
        keys = torch.randn(1, kv_heads, length, CACHE_DIM, dtype=dtype, device=device)
        copies = LAYERS_BYTES // (2 * keys.nbytes) + 1
        caches = [StaticKVCache(config, max_cache_len=length) for _ in range(copies)]
        for cache in caches:
            cache.layers[0].append(keys, keys)
            cache.layers[0].finish_attention()
        layouts[name] = {"kv_heads": kv_heads, "window": limit, "cache_bytes": caches[0].nbytes, "copies": copies}
        stored = [cache.layers[0].dense() for cache in caches]
        calls = [AttendCall(q, k, v, CACHE_DIM**-0.5, window=limit) for k, v in stored]
        actions[name] = functools.partial(_attend_all, calls)
    times_ms = {
        name: [[call_ms / layouts[name]["copies"] for call_ms in calls_ms] for calls_ms in rounds_ms]
        for name, rounds_ms in _time_in_turns(actions, rounds, device).items()
    }
    for name, layout in layouts.items():
        layout["step_ms"] = spread_of(times_ms[name])
        layout["faster_than_mha"] = ratio(times_ms["MHA"], times_ms[name])
    return {"tokens": length, "layouts": layouts}


def _attend_all(calls: list[AttendCall]) -> None:
    for call in calls:
        dispatch.attend(call)


def _decoding(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each cell of `throughput.measure`, what decoding without a cache costs against decoding with one."""
    found = []
    for cell in cells:
        rounds_ms = {row["variant"]: [[each] for each in row["round_median_ms"]] for row in cell["rows"]}
        none_ms = rounds_ms.get("none")
        rows = [
            {key: row[key] for key in ("variant", "hooked", "step_ms")}
            | {"verdict": row["tokens"]["verdict"]}
            | {"speedup": None if none_ms is None else ratio(none_ms, rounds_ms[row["variant"]])}
            for row in cell["rows"]
        ]
        found.append({"context": cell["context"], "rows": rows})
    return found


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
    """All claims on one machine and model, as a dict that JSON can hold.

    Args:
        model: what decodes; its dtype and device are those of the other measurements too.
        token_ids: the text as a 1-D tensor, at least as long as the longest context.
        variants: caches that decode; `none` must be among them.
        contexts: prompt tokens, for decoding.
        lengths: tokens of the prefill attention.
        cache_lengths: tokens of the caches whose bytes and step are measured.
        heads: query heads, KV heads and head_dim of the prefill attention.
        window: visible tokens of the windowed rows.
        standard_bytes: standard attention is skipped where it would need more memory than this.
        rounds: turns that each action gets.
        new_tokens: tokens decoded in all rounds together, a multiple of `rounds`.
        none_limit_s: decoding without a cache is skipped when a step would take longer.
        progress: show bars on stderr.
    """
    q_heads, kv_heads, dim = heads
    if min(heads) < 1 or q_heads % kv_heads:
        raise ValueError(f"impossible heads: {q_heads=}, {kv_heads=}, {dim=}")
    if not lengths or not cache_lengths or min(*lengths, *cache_lengths, window, rounds) < 1:
        raise ValueError(f"sizes start at 1: {lengths=}, {cache_lengths=}, {window=}, {rounds=}")
    if "none" not in (names := [variant.name for variant in variants]):
        raise ValueError(f"decoding without a cache is what caches are compared with: 'none' is not among {names}")
    times: dict[str, Any] = {
        "new_tokens": new_tokens,
        "rounds": rounds,
        "none_limit_s": none_limit_s,
        "progress": progress,
    }
    decoded = throughput.measure(
        model, tokenizer, token_ids, variants=variants, contexts=contexts, batch_sizes=[1], **times
    )
    memory = PeakMemory(model.device)
    layer: dict[str, Any] = {"dtype": model.dtype, "device": model.device, "window": window, "rounds": rounds}
    skipped: list[dict[str, Any]] = []
    attention: list[dict[str, Any]] = []
    with torch.no_grad():
        for length in tqdm(sorted(set(lengths)), desc="prefill attention", disable=not progress):
            needed = _standard_bytes(heads, length, model.dtype)
            fits = needed <= standard_bytes
            if not fits:
                sizes = f"{needed / 2**30:.1f} GiB, the limit is {standard_bytes / 2**30:.1f} GiB"
                reason = f"the scores would take {sizes}"
                skipped.append({"variant": "standard attention", "context": length, "batch": 1, "reason": reason})
            attention.append(measure_attention(heads, length, standard=fits, memory=memory, **layer))
        layers = [
            measure_caches(length, **layer)
            for length in tqdm(sorted(set(cache_lengths)), desc="caches", disable=not progress)
        ]
    results = {
        "kind": "claims",
        "settings": {"rounds": rounds, "new_tokens": new_tokens, "heads": list(heads), "window": window}
        | {"cache_heads": CACHE_HEADS, "cache_dim": CACHE_DIM, "memory_method": memory.method}
        | {"near_tie": decoded["settings"]["near_tie"]},
        "attention": attention,
        "decoding": _decoding(decoded["cells"]),
        "caches": layers,
        "skipped": skipped + decoded["skipped"],
        "mismatches": decoded["mismatches"],
    }
    return results | {"claims": stated.judge(results)}


METHODS = ("standard", "tiled", "windowed")


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
    q_heads, kv_heads, dim = settings["heads"]
    layouts = [
        {**layout, "name": name, "tokens": cell["tokens"]}
        for cell in results["caches"]
        for name, layout in cell["layouts"].items()
    ]
    return joined(
        f"Times are medians (p20 to p80) of {settings['rounds']} turns. Memory: {settings['memory_method']}.\n",
        "### Stated and measured\n\nA figure within a fifth of the stated one agrees with it.\n",
        table_of(CLAIM_COLUMNS, results["claims"]),
        "".join(
            f"- {row['claim']}, measured {three_digits(row['measured'])}: {row['why']}.\n"
            for row in stated.disagreements(results)
        ),
        f"### Prefill attention of one layer, {q_heads} query and {kv_heads} KV heads of {dim}\n\n"
        "Standard writes all scores to memory, tiled is what this package takes, windowed is tiled in a window of "
        f"{settings['window']}.\n",
        _attention_table(results["attention"]),
        "### A decode step with and without a cache\n",
        table_of(STEP_COLUMNS, [{**row, **cell} for cell in results["decoding"] for row in cell["rows"]]),
        f"### One layer's cache, {settings['cache_heads']} query heads of {settings['cache_dim']}\n\n"
        "The step is the layer's decode attention alone.\n",
        table_of(LAYOUT_COLUMNS, layouts),
        skipped_list(results),
    )


def _attention_table(measured: list[dict[str, Any]]) -> str:
    of_methods = [f"{name} {unit}" for name in METHODS for unit in ("ms", "MiB")]
    rows = []
    for row in measured:
        cells = [str(row["tokens"])]
        for found in map(row["methods"].get, METHODS):
            cells += [MISSING, MISSING] if found is None else [show_spread(found["ms"]), mib(found["extra_bytes"])]
        rows.append([*cells, speedup(row["speedup"]["tiled"]), digits(".1g")(row["max_difference"])])
    return markdown_table(["tokens", *of_methods, "tiled faster", "difference"], rows)


def _draw(results: dict[str, Any]) -> Any:
    """Panels of prefill attention's time and memory, decoding with and without a cache, and one layer's cache."""
    title = "What is said of attention and KV caches, measured"
    figure = drawing.new_figure(10.0, 10.5, title, results["conditions"])
    panels = figure.subplot_mosaic([["time", "memory"], ["decoding", "decoding"], ["caches", "steps"]])
    palette = ("#444444", *drawing.OURS)
    methods = {name: [(row["tokens"], row["methods"][name]) for row in results["attention"] if name in row["methods"]]
               for name in METHODS}  # fmt: skip
    colors = dict(zip(METHODS, palette, strict=False))
    lines = {name: [(x, found["ms"]["median"]) for x, found in line] for name, line in methods.items()}
    drawing.plot_lines(panels["time"], lines, colors, "prefill attention of one layer: ms")
    lines = {name: [(x, found["extra_bytes"] / 2**20) for x, found in line if found["extra_bytes"]]
             for name, line in methods.items()}  # fmt: skip
    drawing.plot_lines(panels["memory"], lines, colors, "prefill attention of one layer: peak MiB")
    rows = [(cell["context"], row) for cell in results["decoding"] for row in cell["rows"]]
    lines = {row["variant"]: [] for _, row in rows}
    for context, row in rows:
        lines[row["variant"]].append((context, row["step_ms"]["median"]))
    colors = drawing.colors_of([row for _, row in rows])
    drawing.plot_lines(panels["decoding"], lines, colors, "a decode step of the model: ms")
    layouts = {name: [(cell["tokens"], cell["layouts"][name]) for cell in results["caches"]]
               for name in results["caches"][0]["layouts"]}  # fmt: skip
    colors = {name: palette[i % len(palette)] for i, name in enumerate(layouts)}
    lines = {name: [(x, found["cache_bytes"] / 2**20) for x, found in line] for name, line in layouts.items()}
    drawing.plot_lines(panels["caches"], lines, colors, "one layer's cache: MiB")
    lines = {name: [(x, found["step_ms"]["median"]) for x, found in line] for name, line in layouts.items()}
    drawing.plot_lines(panels["steps"], lines, colors, "one layer's decode attention: ms")
    for axes in panels.values():
        drawing.caption(axes, x="tokens")
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
    sizes: dict[str, Any] = {"nargs": "+", "type": positive_int}
    lengths = [512, 1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--contexts", default=[128, 512, 1024, 2048], help="prompt tokens, for decoding", **sizes)
    parser.add_argument("--lengths", default=lengths, help="tokens of the prefill attention", **sizes)
    parser.add_argument("--cache-lengths", default=lengths[3:], help="tokens of the caches compared", **sizes)
    help = "of the prefill: query, KV, head_dim"
    parser.add_argument("--heads", nargs=3, type=positive_int, default=[8, 8, 64], help=help)
    parser.add_argument("--window", type=positive_int, default=4096, help="visible tokens of the windowed rows")
    help = "skip standard attention where it needs more memory"
    parser.add_argument("--standard-gib", type=_gib, default="8", dest="standard_bytes", metavar="GIB", help=help)
    parser.add_argument("--rounds", type=positive_int, default=5, help="turns of everything that is timed")
    parser.add_argument("--new-tokens", type=positive_int, default=20, help="decoded in all rounds together")
    help = "skip decoding without a cache when a step takes longer"
    parser.add_argument("--none-limit-s", type=float, default=60.0, help=help)


COMMAND = model_command(
    HELP,
    ["none", BASELINE, "kvattn-static"],
    _add_options,
    measure,
    lambda args: max(args.contexts),
    failed=lambda results: results["mismatches"] > 0,
)
