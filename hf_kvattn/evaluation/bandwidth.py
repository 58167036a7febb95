"""How near decode attention comes to the memory's speed: one layer, one query token, keys and values read once.

A decode step must read every stored key and value, and does little else with them, so the machine's read bandwidth is
the limit. Both are measured in turns: reading one large buffer with the same threads, and attention over layers that
together exceed the CPU's caches, as the layers of a model do; with more query tokens, a chunk of a prompt over a past.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import LlamaConfig

from hf_kvattn.caches.quantized import QuantizedKVCache
from hf_kvattn.caches.static import StaticKVCache
from hf_kvattn.evaluation.throughput import ratio
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import AttendCall

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

    Args:
        q_heads: query heads, a multiple of `kv_heads`.
        kv_heads: KV heads.
        head_dim: numbers of a head, a multiple of 16.
        context: stored tokens, those of the queries included.
        dtype: of queries, keys and values.
        rounds: turns, in each of which the bandwidth and every row are measured once; medians are reported.
        queries: query tokens, the last of the stored ones.
    """
    if min(q_heads, kv_heads, head_dim, context, rounds, queries) < 1 or q_heads % kv_heads or queries > context:
        raise ValueError(f"impossible sizes: {q_heads=}, {kv_heads=}, {head_dim=}, {context=}, {rounds=}, {queries=}")
    if head_dim % 16:
        raise ValueError(f"quantized caches need a head_dim that is a multiple of 16, got {head_dim}")
    layer_bytes = 2 * kv_heads * context * head_dim * dtype.itemsize
    config = LlamaConfig(
        num_hidden_layers=LAYERS_BYTES // layer_bytes + 1,
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=q_heads * head_dim,
    )
    q = torch.randn(1, q_heads, queries, head_dim).to(dtype)
    shape = (1, kv_heads, context, head_dim)
    filled = {bits: _filled(config, bits, shape, dtype) for bits in {bits for _, bits in ROWS.values()}}
    calls = {bits: [_call(q, layer) for layer in cache.layers] for bits, cache in filled.items()}
    buffer = torch.ones(READ_BYTES // 4)
    read_bytes_s: list[float] = []
    times_ms: dict[str, list[list[float]]] = {name: [] for name in ROWS}
    for _ in range(rounds):
        read_bytes_s.append(dispatch.native.read_bandwidth_bytes_s(buffer, seconds=0.05))
        for name, (backend, bits) in ROWS.items():
            module = dispatch.BACKENDS[backend]
            start_s = time.perf_counter()
            for call in calls[bits]:
                module.attend(call)
            times_ms[name].append([(time.perf_counter() - start_s) * 1e3 / len(calls[bits])])
    bandwidth = torch.tensor(read_bytes_s).median().item()
    rows = {}
    for name, (_, bits) in ROWS.items():
        p20, median, p80 = torch.quantile(torch.tensor(times_ms[name]), torch.tensor([0.2, 0.5, 0.8])).tolist()
        row_bytes = filled[bits].nbytes / config.num_hidden_layers
        moved = row_bytes / median * 1e3
        rows[name] = {
            "median_ms": median,
            "p20_ms": p20,
            "p80_ms": p80,
            "bytes": row_bytes,
            "bytes_s": moved,
            "share": moved / bandwidth,
            "faster_than_base": ratio(times_ms[BASE], times_ms[name]),
        }
    sizes = {"context": context, "queries": queries, "layer_bytes": layer_bytes, "read_bytes_s": bandwidth}
    return sizes | {"base": BASE, "backends": rows}


def _filled(
    config: LlamaConfig, bits: int | None, shape: tuple[int, ...], dtype: torch.dtype
) -> StaticKVCache | QuantizedKVCache:
    """A cache whose layers hold random numbers of `shape`, each its own."""
    cache: StaticKVCache | QuantizedKVCache
    if bits is None:
        cache = StaticKVCache(config, max_cache_len=shape[2])
    else:
        group_size = next(size for size in (64, 32, 16) if shape[3] % size == 0)
        cache = QuantizedKVCache(config, bits, group_size=group_size, max_cache_len=shape[2])
    for layer in cache.layers:
        layer.append(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
        layer.finish_attention()
    return cache


def _call(q: torch.Tensor, layer: Any) -> AttendCall:
    k, v, packed, *_ = layer.stored_kv()
    return AttendCall(q, k, v, q.shape[-1] ** -0.5, packed=packed)
