"""How near decode attention comes to the memory's speed: one layer, one query token, keys and values read once.

A decode step must read every stored key and value, and does little else with them, so the machine's read bandwidth is
the limit. Both are measured in turns: reading one large buffer with the same threads, and attention over layers that
together exceed the CPU's caches, as the layers of a model do.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from hf_kvattn.kernels import native, sdpa
from hf_kvattn.kernels.call import AttendCall

READ_BYTES = 256 << 20
LAYERS_BYTES = 256 << 20
BACKENDS = {"native": native, "sdpa": sdpa}


def measure(
    q_heads: int, kv_heads: int, head_dim: int, context: int, dtype: torch.dtype = torch.bfloat16, rounds: int = 20
) -> dict[str, Any]:
    """Times one layer's decode attention against reading memory; a dict that JSON can hold.

    Args:
        q_heads: query heads, a multiple of `kv_heads`.
        kv_heads: KV heads.
        head_dim: numbers of a head.
        context: stored tokens.
        dtype: of queries, keys and values.
        rounds: turns, in each of which the bandwidth and every backend are measured once; medians are reported.
    """
    if min(q_heads, kv_heads, head_dim, context, rounds) < 1 or q_heads % kv_heads:
        raise ValueError(f"impossible sizes: {q_heads=}, {kv_heads=}, {head_dim=}, {context=}, {rounds=}")
    layer_bytes = 2 * kv_heads * context * head_dim * dtype.itemsize
    shape = (1, kv_heads, context, head_dim)
    layers = [
        (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in range(LAYERS_BYTES // layer_bytes + 1)
    ]
    q = torch.randn(1, q_heads, 1, head_dim).to(dtype)
    calls = [AttendCall(q, k, v, head_dim**-0.5) for k, v in layers]
    buffer = torch.ones(READ_BYTES // 4)
    read_bytes_s: list[float] = []
    layer_ms: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for _ in range(rounds):
        read_bytes_s.append(native.read_bandwidth_bytes_s(buffer, seconds=0.05))
        for name, module in BACKENDS.items():
            start_s = time.perf_counter()
            for call in calls:
                module.attend(call)
            layer_ms[name].append((time.perf_counter() - start_s) * 1e3 / len(calls))
    bandwidth = torch.tensor(read_bytes_s).median().item()
    rows = {}
    for name, times in layer_ms.items():
        p20, median, p80 = torch.quantile(torch.tensor(times), torch.tensor([0.2, 0.5, 0.8])).tolist()
        moved = layer_bytes / median * 1e3
        rows[name] = {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "bytes_s": moved, "share": moved / bandwidth}
    return {"context": context, "layer_bytes": layer_bytes, "read_bytes_s": bandwidth, "backends": rows}
