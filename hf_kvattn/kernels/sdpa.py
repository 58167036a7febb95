"""PyTorch's `scaled_dot_product_attention` over the filled part of the cache.

For one query token the query heads of a group become rows of their KV head, `(B, Hkv, G, D)`: nothing is copied, and
each key is read once for its group. It is fast on a CPU for that reason: `enable_gqa` reads K and V for every query
head. On a GPU it keeps SDPA from choosing the slow math kernel. There, queries that see nothing get zeros whatever
kernel PyTorch takes, and cuDNN, which makes a plan for each new length, is left out unless the prompt is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention, cudnn_sdp_enabled, enable_cudnn_sdp
from torch.nn.functional import scaled_dot_product_attention

from .call import BATCHES, MASKS, QUANTIZED, TRAINING, AttendCall, Feature

# What torch's function has, with masks where it has no argument, and what is computed here a tile of keys at a time.
PLAIN = int(Feature.BIDIRECTIONAL_ATTENTION | Feature.LEFT_PADDING | Feature.RING_BUFFERS | Feature.WINDOW) | MASKS
TILED = int(Feature.LEARNED_SINKS | Feature.WINDOW_SINKS | Feature.SOFTCAP) | QUANTIZED | BATCHES
TILE = 1024  # tokens dequantized at once, a multiple of 32
WINDOW_BLOCK = 256  # queries of a long prompt that share a slice of the keys
# What torch.nn.attention.bias.causal_lower_right ends in on a GPU. It cannot be made under a TorchDispatchMode.
_flash = torch.ops.aten._scaled_dot_product_flash_attention


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
    if call.leftpad is None and not windowed:
        if q_len == kv_len or not call.causal:
            return _attention(call, call.q, call.k, call.v, is_causal=call.causal, enable_gqa=True).transpose(1, 2)
        if q_len < kv_len and _has_flash(call):  # a prompt continued: no mask for each head of a group
            # Here, causal means the lower right corner of queries and keys.
            out = _flash(call.q, call.k, call.v, call.dropout, is_causal=True, scale=call.scale)[0]
            return out.transpose(1, 2)
    return _grouped(call, call.k, call.v, call.visible())


def _has_flash(call: AttendCall) -> bool:
    """Whether PyTorch's own flash kernel serves `call`, with its heads in groups and without a mask."""
    if call.q.device.type != "cuda" or torch.version.hip is not None or call.q.shape[-1] % 8:
        return False
    return can_use_flash_attention(SDPAParams(call.q, call.k, call.v, None, call.dropout, False, True))


def _attention(call: AttendCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs) -> torch.Tensor:
    """PyTorch's function, on a GPU without cuDNN where lengths grow from call to call."""
    growing = q.device.type == "cuda" and call.q.shape[2] != k.shape[2]
    if not growing or not cudnn_sdp_enabled():
        return scaled_dot_product_attention(q, k, v, dropout_p=call.dropout, scale=call.scale, **kwargs)
    # The switch is the process's. One who reads it off leaves it so: threads cannot switch it off for good.
    enable_cudnn_sdp(False)
    try:
        return scaled_dot_product_attention(q, k, v, dropout_p=call.dropout, scale=call.scale, **kwargs)
    finally:
        enable_cudnn_sdp(True)


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
    blind = None
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        if q.device.type != "cpu" and (call.mask is not None or call.leftpad is not None or q_len > call.kv_len):
            # Kernels may give NaN to a query that sees nothing: it sees all, and its result is left out.
            blind = ~(mask if mask.dtype == torch.bool else mask > -torch.inf).any(-1, keepdim=True)
            mask = mask | blind if mask.dtype == torch.bool else mask.masked_fill(blind, 0)
        one_or_all = min(mask.shape[1], kv_heads)
        mask = mask.unflatten(1, (one_or_all, -1)).expand(-1, -1, group, -1, -1).flatten(2, 3)
    out = _attention(call, q, k, v, attn_mask=mask).reshape(batch, q_heads, q_len, dim)
    return (out if blind is None else out.masked_fill(blind, 0)).transpose(1, 2)


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
