"""PyTorch's `scaled_dot_product_attention` over the filled part of the cache.

For one query token the query heads of a group become rows of their KV head, `(B, Hkv, G, D)`: no KV copies, and each
key is read once for its group. That is what makes it fast on a CPU, where `enable_gqa` reads K and V for every query
head, and it keeps a GPU's SDPA off the slow math kernel.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .call import AttendCall

TILE = 1024  # tokens dequantized at once, a multiple of 32


def unavailable() -> str | None:
    return None


def unsupported(call: AttendCall) -> str | None:
    if call.softcap is not None:
        return f"torch's scaled_dot_product_attention has no softcap (asked: {call.softcap})"
    if call.packed is not None and (call.dropout > 0 or call.needs_grad):
        return "quantized keys and values are for inference: no dropout, no gradients"
    return None


def attend(call: AttendCall) -> torch.Tensor:
    """The attention of `call`: `(B, Tq, Hq, D)` in the dtype of `q`."""
    if call.packed is not None:
        return _tiled(call)
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


def _tiled(call: AttendCall) -> torch.Tensor:
    """Attention over quantized tokens, dequantized a tile at a time, with an online softmax in fp32."""
    batch, q_heads, q_len, dim = call.q.shape
    kv_heads = call.k.shape[1]
    group = q_heads // kv_heads
    q = call.q.reshape(batch, kv_heads, group * q_len, dim).float() * call.scale
    mask = call.visible() if call.mask is None else call.mask
    top = q.new_full((*q.shape[:3], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for start, k, v in call.tiles(TILE):
        scores = q @ k.transpose(-1, -2)
        if mask is not None:
            tile = mask[..., start : start + k.shape[2]].expand(-1, q_heads, -1, -1)
            tile = tile.reshape(-1, kv_heads, group * q_len, k.shape[2])
            scores = scores.masked_fill(~tile, -torch.inf) if tile.dtype == torch.bool else scores + tile
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        finite = torch.where(new_top == -torch.inf, 0, new_top)  # nothing visible yet: no inf - inf
        weights, shrink = torch.exp(scores - finite), torch.exp(top - finite)
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights @ v
        top = new_top
    out = torch.where(total > 0, out / total, 0).to(call.q.dtype)
    return out.reshape(batch, q_heads, q_len, dim).transpose(1, 2)
