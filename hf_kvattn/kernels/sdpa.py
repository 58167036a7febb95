"""PyTorch's `scaled_dot_product_attention` over the filled part of the cache.

For one query token the query heads of a group become rows of their KV head, `(B, Hkv, G, D)`: no KV copies, and each
key is read once for its group. That is what makes it fast on a CPU, where `enable_gqa` reads K and V for every query
head, and it keeps a GPU's SDPA off the slow math kernel.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .call import AttendCall


def unavailable() -> str | None:
    return None


def unsupported(call: AttendCall) -> str | None:
    if call.softcap is not None:
        return f"torch's scaled_dot_product_attention has no softcap (asked: {call.softcap})"
    return None


def attend(call: AttendCall) -> torch.Tensor:
    """The attention of `call`: `(B, Tq, Hq, D)` in the dtype of `q`."""
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    if call.mask is not None:
        return _grouped(call, call.k, call.v, call.mask)
    everything_but_causal = call.first is None and (call.window is None or call.window >= kv_len)
    if q_len == 1 and call.first is None:
        begin = max(0, kv_len - (call.window or kv_len))  # one query: the window is a slice
        return _grouped(call, call.k[:, :, begin:], call.v[:, :, begin:], None)
    if everything_but_causal and (q_len == kv_len or not call.causal):
        out = scaled_dot_product_attention(
            call.q, call.k, call.v, dropout_p=call.dropout, is_causal=call.causal, scale=call.scale, enable_gqa=True
        )
        return out.transpose(1, 2)
    return _grouped(call, call.k, call.v, call.visible())


def _grouped(call: AttendCall, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention with the queries as `(B, Hkv, G * Tq, D)`; `mask` is `(B or 1, Hq or 1, Tq, Tk)`."""
    batch, q_heads, q_len, dim = call.q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    q = call.q.reshape(batch, kv_heads, group * q_len, dim)
    if mask is not None and group > 1:
        if mask.shape[1] == 1:
            mask = mask.unsqueeze(2).expand(-1, 1, group, -1, -1)
        else:
            mask = mask.unflatten(1, (kv_heads, group))
        mask = mask.flatten(2, 3)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=call.dropout, scale=call.scale)
    return out.reshape(batch, q_heads, q_len, dim).transpose(1, 2)
