"""How near decode attention comes to the memory's speed: one layer, one query token, keys and values read once.

A decode step must read every stored key and value, and does little else with them, so the machine's read bandwidth is
the limit. Both are measured in turns: reading one large buffer with the same threads, and attention over layers that
together exceed the CPU's caches, as the layers of a model do; with more query tokens, a chunk of a prompt over a past.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig

from hf_kvattn.caches.base import KVCache
from hf_kvattn.caches.quantized import QuantizedKVCache
from hf_kvattn.caches.static import StaticKVCache
from hf_kvattn.evaluation.common import drawing, report
from hf_kvattn.evaluation.common.measurement import Figure, Measurement
from hf_kvattn.evaluation.common.running import add_output_arguments
from hf_kvattn.evaluation.common.timing import ratio, spread_of
from hf_kvattn.kernels import dispatch, native
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.tools.command_line import Command, positive_int
from hf_kvattn.tools.conditions import conditions
from hf_kvattn.tools.inputs import DTYPES
from hf_kvattn.tools.tables import Column, digits, joined, mib, speedup, table_of

READ_BYTES = 256 << 20
LAYERS_BYTES = 256 << 20
BASE = "native"
# Name to backend and bits; None is the dtype asked for, uncoded.
ROWS: dict[str, tuple[str, int | None]] = {
    BASE: ("native", None),
    "sdpa": ("sdpa", None),
    "native int8": ("native", 8),
    "native int4": ("native", 4),
    "native int2": ("native", 2),
}


def measure(
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 20,
    queries: int = 1,
) -> dict[str, Any]:
    """Times one layer's attention over stored tokens against reading memory; a dict that JSON can hold.

    `context` tokens are stored, and the last `queries` of them attend; `dtype` is that of queries, keys and values.
    `head_dim` is a multiple of 16. In each of `rounds` turns the bandwidth and every row are measured once; medians
    are reported.
    """
    if min(q_heads, kv_heads, head_dim, context, rounds, queries) < 1 or q_heads % kv_heads or queries > context:
        raise ValueError(f"impossible sizes: {q_heads=}, {kv_heads=}, {head_dim=}, {context=}, {rounds=}, {queries=}")
    if head_dim % 16:
        raise ValueError(f"quantized caches need a head_dim that is a multiple of 16, got {head_dim}")
    layer_bytes = 2 * kv_heads * context * head_dim * dtype.itemsize
    layers = LAYERS_BYTES // layer_bytes + 1
    heads: dict[str, Any] = {"num_attention_heads": q_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    config = LlamaConfig(num_hidden_layers=layers, hidden_size=q_heads * head_dim, **heads)
    q = torch.randn(1, q_heads, queries, head_dim).to(dtype)
    kept: dict[int | None, KVCache] = {None: StaticKVCache(config, max_cache_len=context)}
    group_size = math.gcd(head_dim, 64)
    kept |= {bits: QuantizedKVCache(config, bits, group_size=group_size, max_cache_len=context) for bits in (8, 4, 2)}
    calls: dict[int | None, list[AttendCall]] = {bits: [] for bits in kept}
    for bits, cache in kept.items():
        for layer in cache.kv_layers:
            layer.append(*torch.randn(2, 1, kv_heads, context, head_dim).to(dtype))
            layer.finish_attention(dispatch.quantize_blocks)
            k, v, packed, *_ = layer.stored_kv()
            calls[bits].append(AttendCall(q, k, v, head_dim**-0.5, packed=packed))
    buffer = torch.ones(READ_BYTES // 4)
    read_bytes_s: list[float] = []
    times_ms: dict[str, list[list[float]]] = {name: [] for name in ROWS}
    for _ in range(rounds):
        read_bytes_s.append(read_bandwidth_bytes_s(buffer, seconds=0.05))
        for name, (backend, bits) in ROWS.items():
            module = dispatch.BACKENDS[backend]
            start_s = time.perf_counter()
            for call in calls[bits]:
                module.attend(call)
            times_ms[name].append([(time.perf_counter() - start_s) * 1e3 / layers])
    bandwidth = torch.tensor(read_bytes_s).median().item()
    rows = {}
    for name, (_, bits) in ROWS.items():
        row_bytes, ms = kept[bits].nbytes / layers, spread_of(times_ms[name])
        moved = row_bytes / ms["median"] * 1e3
        rows[name] = {f"{key}_ms": value for key, value in ms.items()} | {
            "bytes": row_bytes,
            "bytes_s": moved,
            "share": moved / bandwidth,
            "faster_than_base": ratio(times_ms[BASE], times_ms[name]),
        }
    sizes = {"context": context, "queries": queries, "layer_bytes": layer_bytes, "read_bytes_s": bandwidth}
    return {"kind": "bandwidth"} | sizes | {"base": BASE, "backends": rows}


def read_bandwidth_bytes_s(data: torch.Tensor, seconds: float) -> float:
    """Bytes a second at which this machine reads `data` (contiguous, larger than its caches), the best of many runs."""
    end, best_s = time.perf_counter() + seconds, math.inf
    while time.perf_counter() < end:
        start = time.perf_counter()
        native.read_bytes(data)
        best_s = min(best_s, time.perf_counter() - start)
    return data.nbytes / best_s


def _tables(results: dict[str, Any]) -> str:
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


def _draw(results: dict[str, Any]) -> Any:
    """What each backend reads a second, and what the machine can."""
    figure = drawing.new_figure(6.4, 2.8, TITLE, results["conditions"])
    axes = figure.subplots()
    rows, limit = results["backends"], results["read_bytes_s"] / 1e9
    axes.barh(list(rows), [row["bytes_s"] / 1e9 for row in rows.values()], color=drawing.OURS[0], height=0.5)
    drawing.mark(axes, limit, "reading memory ", (4, 3), ha="right")
    drawing.caption(axes, x="GB/s")
    axes.invert_yaxis()
    drawing.plain(axes)
    return figure


def _limits(results: dict[str, Any]) -> list[str]:
    share = max(row["share"] for row in results["backends"].values())
    return [f"No backend reads keys and values at more than {share:.2f} of the memory's speed."]


def _figures(results: dict[str, Any]) -> Iterator[Figure]:
    part = f"decode attention over {results['context']} tokens"
    for backend, row in results["backends"].items():
        name = f"share of the memory's read bandwidth: {backend}"
        yield Figure(part, "share_of_read_bandwidth", name, row["share"])


TITLE = "Decode attention against the memory's speed"
MEASUREMENT = Measurement("bandwidth", TITLE, _tables, "bandwidth.png", _draw, _limits, _figures)

HELP = """One layer's decode attention against the speed at which this machine reads memory.

    hf-kvattn bandwidth
    hf-kvattn bandwidth --heads 32 8 128 --context 4096 --output results
    hf-kvattn bandwidth --queries 512 --rounds 5
    hf-kvattn bandwidth --native-variant avx2
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "query heads, KV heads, head_dim"
    parser.add_argument("--heads", nargs=3, type=positive_int, default=[9, 3, 64], help=help)
    parser.add_argument("--context", type=positive_int, default=8192, help="stored tokens")
    parser.add_argument("--queries", type=positive_int, default=1, help="query tokens: more are a prompt's chunk")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of queries, keys and values")
    parser.add_argument("--rounds", type=positive_int, default=20, help="turns")
    help = "of the native kernels, avx2 for example; None takes the CPU's best"
    parser.add_argument("--native-variant", help=help)
    add_output_arguments(parser)


def _main(args: argparse.Namespace) -> int:
    report.check_out_dir(args.out)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    native.select_variant(args.native_variant)
    q_heads, kv_heads, head_dim = args.heads
    dtype = DTYPES[args.dtype]
    results = measure(q_heads, kv_heads, head_dim, args.context, dtype, args.rounds, args.queries)
    args.model = "one layer, {} query and {} KV heads of {}".format(*args.heads)
    args.text, args.backend = "random numbers", "each in turn"
    report.finish(results | {"conditions": conditions(None, args)}, args.out, args.json)
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
