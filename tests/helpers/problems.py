"""Attention problems for the kernel tests: hostile shapes, poisoned slots, every rule."""

import platform
from dataclasses import replace

import torch

from hf_kvattn.kernels.call import AttendCall, SinkKV

POISON = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 6e4}  # finite: 0 * inf would hide in a NaN anyway

# Of the native kernels: those that a library for this machine has. Some jobs load another library, and change the list.
ARM = platform.machine().lower() in ("aarch64", "arm64")
VARIANTS = ["neon_bf16", "neon_dot", "neon", "portable"] if ARM else ["avx512_bf16", "avx512", "avx2", "portable"]

# (G, Tq, Tk, D, rules): odd sizes, one tile of 64 and 32 tokens more or less, Tq != Tk, jobs of 32 rows crossed and,
# from 24 rows on, of 240
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
    "prompt-jobs": (3, 170, 170, 64, {}),
    "prompt-d130": (7, 50, 113, 130, {}),
    "prompt-d7": (5, 40, 70, 7, {}),
    "prompt-g8-d256": (8, 40, 150, 256, {}),
    "prompt-softcap": (2, 40, 130, 80, {"softcap": 1.5, "window": 50}),
    "prompt-not-causal": (2, 133, 201, 64, {"causal": False}),
    "prompt-empty-row": (3, 90, 95, 128, {"leftpad": [0, 95, 40], "window": 31}),
    "not-causal": (2, 6, 70, 64, {"causal": False}),
    "window-1": (3, 4, 90, 64, {"window": 1}),
    "window-crosses-tile": (3, 1, 130, 64, {"window": 65}),
    "window-many-queries": (2, 40, 140, 64, {"window": 33}),
    "window-larger-than-past": (2, 3, 20, 64, {"window": 50}),
    "softcap": (2, 3, 90, 64, {"softcap": 1.5}),
    "softcap-window": (2, 1, 90, 256, {"softcap": 30.0, "window": 17}),
    "padded": (3, 1, 100, 64, {"leftpad": [0, 37, 99]}),
    "padded-prefill": (2, 70, 70, 64, {"leftpad": [0, 69, 3]}),
    "padded-window": (2, 5, 150, 64, {"leftpad": [0, 148, 60], "window": 20}),
    "empty-row": (2, 1, 40, 64, {"leftpad": [0, 40, 39]}),
    "window-long-prefill": (2, 530, 600, 16, {"window": 40}),
    "padded-window-long-prefill": (1, 300, 320, 16, {"window": 50, "leftpad": [0, 319, 33]}),
    "s-aux": (3, 1, 90, 64, {"s_aux": True}),
    "s-aux-padded": (8, 5, 150, 64, {"leftpad": [0, 148, 60], "window": 20, "s_aux": True}),
    "s-aux-empty-row": (2, 1, 40, 80, {"leftpad": [0, 40, 39], "softcap": 2.0, "s_aux": True}),
    "s-aux-long-prefill": (2, 530, 600, 16, {"window": 40, "s_aux": True}),
    "sinks": (3, 1, 90, 64, {"window": 90, "sinks": (4, 7)}),
    "sinks-coming-in": (2, 9, 49, 64, {"window": 41, "sinks": (5, -3)}),
    "sinks-one": (3, 1, 40, 80, {"window": 40, "sinks": (1, 1), "softcap": 2.0}),
    "sinks-many": (8, 3, 130, 33, {"window": 128, "sinks": (63, 4000)}),
    "sinks-long-prefill": (3, 600, 640, 16, {"window": 41, "sinks": (4, -7)}),
    "sinks-padded": (2, 5, 80, 64, {"window": 76, "leftpad": [0, 70, 3], "sinks": (6, 4, [0, 5, 9])}),
}

# (slots, slot of the first token) for a problem's keys in a ring: wraps in and between tiles, nearly empty, full
RINGS = {
    "g3-65": [(65, 1), (65, 64), (70, 69), (300, 40), (300, 270)],
    "g4-d128": [(127, 100), (160, 96), (160, 33)],
    "g5-d80": [(129, 64), (200, 199)],
    "d7": [(66, 31), (90, 60)],
    "long-split": [(3001, 1234), (3100, 3000)],
    "short-query": [(77, 70), (100, 90)],
    "rows-cross-chunk": [(140, 77)],
    "prompt-jobs": [(170, 99), (200, 133)],
    "prompt-g8-d256": [(150, 149)],
    "window-crosses-tile": [(130, 66), (131, 1)],
    "softcap-window": [(90, 80)],
    "padded": [(100, 64), (128, 63)],
    "padded-window": [(160, 70)],
    "empty-row": [(40, 17)],
    "s-aux": [(90, 60)],
    "s-aux-padded": [(160, 70)],
    "sinks": [(90, 50), (154, 100)],
    "sinks-padded": [(80, 8)],
}


def problem(name: str, dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> AttendCall:
    """The named problem as it stands in a cache: transposed queries, and large finite values behind the keys."""
    group, q_len, kv_len, dim, rules = SHAPES[name]
    rules = dict(rules)
    batch = 3 if "leftpad" in rules else 2
    if "leftpad" in rules:
        rules["leftpad"] = torch.tensor(rules["leftpad"], dtype=torch.int32)
    q = torch.randn(batch, q_len, kv_heads * group, dim).to(dtype).transpose(1, 2)
    buffers = [torch.full((batch, kv_heads, kv_len + 13, dim), POISON[dtype], dtype=dtype) for _ in "kv"]
    for buffer in buffers:
        buffer[:, :, :kv_len] = torch.randn(batch, kv_heads, kv_len, dim)
    k, v = (buffer[:, :, :kv_len] for buffer in buffers)
    if "s_aux" in rules:
        rules["s_aux"] = 2 * torch.randn(kv_heads * group)
    sinks = rules.pop("sinks", None)
    call = AttendCall(q, k, v, dim**-0.5, **rules)
    if sinks is not None:
        count, evicted, *leftpad = sinks
        k, v = (torch.randn(batch, kv_heads, count, dim).to(dtype) for _ in "kv")
        own = torch.randn(batch, q_len, kv_heads * group, dim).to(dtype).transpose(1, 2)
        call.sinks = SinkKV(k, v, own, evicted, torch.tensor(leftpad[0], dtype=torch.int32) if leftpad else None)
    return call


def ringed(call: AttendCall, slots: int, slot: int) -> AttendCall:
    """The same problem with its keys and values in rings of `slots`, the first token's in `slot`."""
    batch, kv_heads, tokens, dim = call.k.shape
    at = (slot + torch.arange(tokens)) % slots
    rings = [torch.full((batch, kv_heads, slots, dim), POISON[call.q.dtype], dtype=call.q.dtype) for _ in "kv"]
    rings[0][:, :, at], rings[1][:, :, at] = call.k, call.v
    return replace(call, k=rings[0], v=rings[1], tokens=tokens, slot=slot)
