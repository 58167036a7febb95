"""Attention problems for the kernel tests: hostile shapes, poisoned slots, every rule."""

import torch

from hf_kvattn.kernels.call import AttendCall

POISON = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 6e4}  # finite: 0 * inf would hide in a NaN anyway

VARIANTS = ["avx512_bf16", "avx512", "avx2", "portable"]  # of the native kernels

# (G, Tq, Tk, D, rules): odd sizes, one tile of 64 and 32 tokens more or less, chunks of 32 rows crossed, Tq != Tk
SHAPES = {
    "one-token": (3, 1, 1, 64, {}),
    "g1-31": (1, 1, 31, 64, {}),
    "g2-64": (2, 1, 64, 33, {}),
    "g3-65": (3, 1, 65, 64, {}),
    "g4-d128": (4, 1, 127, 128, {}),
    "g5-d80": (5, 1, 129, 80, {}),
    "g8-d96": (8, 1, 200, 96, {}),
    "d1": (2, 1, 70, 1, {}),
    "d7": (3, 2, 66, 7, {}),
    "d256": (2, 1, 97, 256, {}),
    "d130": (7, 3, 40, 130, {}),
    "long-split": (3, 1, 3001, 64, {}),
    "short-query": (3, 5, 77, 64, {}),
    "rows-cross-chunk": (4, 9, 140, 64, {}),
    "prefill": (3, 67, 67, 64, {}),
    "prefill-after-past": (2, 45, 173, 64, {}),
    "not-causal": (2, 6, 70, 64, {"causal": False}),
    "window-1": (3, 4, 90, 64, {"window": 1}),
    "window-crosses-tile": (3, 1, 130, 64, {"window": 65}),
    "window-many-queries": (2, 40, 140, 64, {"window": 33}),
    "window-larger-than-past": (2, 3, 20, 64, {"window": 50}),
    "softcap": (2, 3, 90, 64, {"softcap": 1.5}),
    "softcap-window": (2, 1, 90, 256, {"softcap": 30.0, "window": 17}),
    "padded": (3, 1, 100, 64, {"first": [0, 37, 99]}),
    "padded-prefill": (2, 70, 70, 64, {"first": [0, 69, 3]}),
    "padded-window": (2, 5, 150, 64, {"first": [0, 148, 60], "window": 20}),
    "empty-row": (2, 1, 40, 64, {"first": [0, 40, 39]}),
}


def problem(name: str, dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> AttendCall:
    """The named problem as it stands in a cache: transposed queries, and large finite values behind the keys."""
    group, q_len, kv_len, dim, rules = SHAPES[name]
    rules = dict(rules)
    batch = 3 if "first" in rules else 2
    if "first" in rules:
        rules["first"] = torch.tensor(rules["first"], dtype=torch.int32)
    q = torch.randn(batch, q_len, kv_heads * group, dim).to(dtype).transpose(1, 2)
    buffers = [torch.full((batch, kv_heads, kv_len + 13, dim), POISON[dtype], dtype=dtype) for _ in "kv"]
    for buffer in buffers:
        buffer[:, :, :kv_len] = torch.randn(batch, kv_heads, kv_len, dim)
    k, v = (buffer[:, :, :kv_len] for buffer in buffers)
    return AttendCall(q, k, v, dim**-0.5, **rules)
