"""PyTorch's `scaled_dot_product_attention` over the filled part of the cache.

For one query token the query heads of a group become rows of their KV head, `(B, Hkv, G, D)`: nothing is copied, and
each key is read once for its group. It is fast on a CPU for that reason: `enable_gqa` reads K and V for every query
head. On a GPU it keeps SDPA from choosing the slow math kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch.nn.functional import scaled_dot_product_attention

from .call import BATCHES, MASKS, QUANTIZED, TRAINING, AttendCall, Feature

# What torch's function has, with masks where it has no argument, and what is computed here a tile of keys at a time.
PLAIN = int(Feature.BIDIRECTIONAL_ATTENTION | Feature.LEFT_PADDING | Feature.RING_BUFFERS | Feature.WINDOW) | MASKS
TILED = int(Feature.LEARNED_SINKS | Feature.WINDOW_SINKS | Feature.SOFTCAP) | QUANTIZED | BATCHES
TILE = 1024  # tokens dequantized at once, a multiple of 32
WINDOW_BLOCK = 256  # queries of a long prompt that share a slice of the keys


def unavailable() -> str | None:
    return None


def is_plain(call: AttendCall) -> bool:
    """Whether torch's function has all that `call` asks for."""
    dense = call.packed is None and call.requests is None
    return dense and call.sinks is None and call.s_aux is None and call.softcap is None


def unsupported(call: AttendCall) -> str | None:
    if is_plain(call):
        beyond = call.beyond(PLAIN | TRAINING)
        return beyond and f"sdpa serves {beyond}"
    beyond = call.beyond(PLAIN | TILED)
    return beyond and f"sdpa serves {beyond}; softcap, sinks, quantized tokens and requests in inference only"


def attend(call: AttendCall) -> torch.Tensor:
    """The attention of `call`: `(B, Tq, Hq, D)` in the dtype of `q`."""
    if call.requests is not None:
        return call.by_request(attend)
    q_len, kv_len = call.q.shape[2], call.kv_len
    windowed = call.window is not None and call.window < kv_len and call.mask is None
    if windowed and call.causal and q_len > WINDOW_BLOCK and call.packed is None and call.tokens is None:
        return torch.cat([attend(block) for block in _blocks(call)], 1)
    if not is_plain(call):
        return _tiled(call)
    if call.tokens is not None:
        return _ring(call)
    if call.mask is not None:
        return _grouped(call, call.k, call.v, call.mask)
    if q_len == 1 and call.leftpad is None:
        begin = max(0, kv_len - (call.window or kv_len))  # one query: the window is a slice
        return _grouped(call, call.k[:, :, begin:], call.v[:, :, begin:], None)
    if call.leftpad is None and not windowed and (q_len == kv_len or not call.causal):
        out = scaled_dot_product_attention(
            call.q, call.k, call.v, dropout_p=call.dropout, is_causal=call.causal, scale=call.scale, enable_gqa=True
        )
        return out.transpose(1, 2)
    return _grouped(call, call.k, call.v, call.visible())


def _blocks(call: AttendCall) -> Iterator[AttendCall]:
    """Splits `call` into blocks of queries with the keys that they see: time and masks grow with the window only."""
    q_len, kv_len, window = call.q.shape[2], call.kv_len, call.window
    assert window is not None
    for start in range(0, q_len, WINDOW_BLOCK):
        stop = min(start + WINDOW_BLOCK, q_len)
        begin = max(0, kv_len - q_len + start - window + 1)
        keys, queries = slice(begin, kv_len - q_len + stop), slice(start, stop)
        block = replace(call, q=call.q[:, :, queries], k=call.k[:, :, keys], v=call.v[:, :, keys])
        if call.leftpad is not None:
            block.leftpad = call.leftpad - begin
        if call.sinks is not None:
            sinks = call.sinks
            block.sinks = replace(sinks, q=sinks.q[:, :, queries], evicted=sinks.evicted + start)
        yield block


def _ring(call: AttendCall) -> torch.Tensor:
    """Attention over a ring buffer in place: the order of keys does not matter, so the mask is rolled instead."""
    slots, tokens = call.k.shape[2], call.kv_len
    if call.slot == 0:
        return attend(replace(call, k=call.k[:, :, :tokens], v=call.v[:, :, :tokens], tokens=None))
    mask = call.visible() if call.mask is None else call.mask
    if mask is None and tokens == slots:
        return _grouped(call, call.k, call.v, None)
    if mask is None:
        mask = torch.ones(1, 1, call.q.shape[2], tokens, dtype=torch.bool, device=call.q.device)
    hidden = False if mask.dtype == torch.bool else -torch.inf
    mask = torch.nn.functional.pad(mask, (0, slots - tokens), value=hidden)
    return _grouped(call, call.k, call.v, mask.roll(call.slot, -1))


def _grouped(call: AttendCall, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention with the queries as `(B, Hkv, G * Tq, D)`; `mask` is `(B or 1, Hq or 1, Tq, Tk)`."""
    batch, q_heads, q_len, dim = call.q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    q = call.q.reshape(batch, kv_heads, group * q_len, dim)
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        one_or_all = min(mask.shape[1], kv_heads)
        mask = mask.unflatten(1, (one_or_all, -1)).expand(-1, -1, group, -1, -1).flatten(2, 3)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=call.dropout, scale=call.scale)
    return out.reshape(batch, q_heads, q_len, dim).transpose(1, 2)


def _tiled(call: AttendCall) -> torch.Tensor:
    """What torch's function has not: a tile of keys at a time, dequantized if need be, an online softmax in fp32."""
    batch, q_heads, q_len, dim = call.q.shape
    kv_heads = call.k.shape[1]
    group = q_heads // kv_heads

    def rows(q: torch.Tensor) -> torch.Tensor:
        return q.reshape(batch, kv_heads, group * q_len, dim).float() * call.scale

    q, mask = rows(call.q), call.visible() if call.mask is None else call.mask
    dense = ((q, k, v, None if mask is None else mask[..., t : t + k.shape[2]]) for t, k, v in call.tiles(TILE))
    sinks = call.sinks
    sink_part = [] if sinks is None else [(rows(sinks.q), sinks.k.float(), sinks.v.float(), sinks.visible())]
    top = q.new_full((*q.shape[:3], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for queries, k, v, seen in chain(sink_part, dense):
        scores = queries @ k.transpose(-1, -2)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if seen is not None:
            seen = seen.expand(-1, q_heads, -1, -1).reshape(-1, kv_heads, group * q_len, k.shape[2])
            scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        finite = torch.where(new_top == -torch.inf, 0, new_top)  # nothing visible yet: no inf - inf
        weights, shrink = torch.exp(scores - finite), torch.exp(top - finite)
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights @ v
        top = new_top
    out = torch.where(total > 0, out / total, 0).reshape(batch, q_heads, q_len, dim).transpose(1, 2)
    lse = (top + total.log()).reshape(batch, q_heads, q_len)
    return call.after_s_aux(out, lse)[0].to(call.q.dtype)
