"""FlashAttention on a GPU, by the first library in `flash_libraries.LIBRARIES` that serves the call.

Every call uses one function of the library, `flash_attn_with_kvcache`, on views of the cache transposed to
`(B, T, Hkv, D)`: nothing is copied. For a decode step it splits the tokens over the GPU and computes the query heads of
a group together. For a prompt it launches the kernel of `flash_attn_func`. Left padding is passed as `cache_leftpad`.
Unpadding would copy keys and values and read lengths back from the GPU. With one query, a ring buffer that wraps is
read in two pieces, and sinks are a piece of their own. The results are merged by their log-sum-exps. Queries that see
nothing get zeros, as the library says.

`append_attend` is a decode step whose lengths are on the GPU: the library appends the new tokens in the same call.
With `attend` the cache has written them before, as for every backend, which takes two small copies a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import flash_libraries
from .call import PIECES, RULES, AttendCall, Feature

SERVED = RULES | PIECES
_LEFT_PADDING = int(Feature.LEFT_PADDING)


def unavailable() -> str | None:
    return flash_libraries.unavailable()


def unsupported(call: AttendCall) -> str | None:
    q, k, v = call.q, call.k, call.v
    if q.device.type != "cuda":
        return f"flash-attn runs on CUDA GPUs, the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"flash-attn takes a head_dim of up to 256 in steps of 8 (it pads others, copying), not {q.shape[-1]}"
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return "flash-attn reads keys and values whose channels lie side by side"
    if beyond := call.beyond(SERVED):
        return f"the flash backend serves {beyond}"
    if q.shape[2] > 1 and (call.sinks is not None or len(_pieces(call, 0)) > 1):
        return f"sinks, and ring buffers that wrap, are joined for one query at a time, not for {q.shape[2]}"
    return flash_libraries.serving(q, call.features())[1]


def _pieces(call: AttendCall, begin: int) -> list[tuple[int, slice]]:
    """The slots of the tokens from `begin` on, in one piece or two, each with the position of its first token."""
    slots = call.k.shape[2]
    everything = call.tokens == slots and not begin and call.leftpad is None
    if not call.slot or (everything and call.q.shape[2] == 1):  # the order of keys does not matter to one query
        return [(begin, slice(begin, call.kv_len))]
    to_wrap = min(call.kv_len, slots - call.slot)
    wrapped = max(begin, to_wrap)
    pieces = [
        (begin, slice(call.slot + begin, call.slot + to_wrap)),
        (wrapped, slice(wrapped - to_wrap, call.kv_len - to_wrap)),
    ]
    return [(start, piece) for start, piece in pieces if piece.start < piece.stop]


def attend(call: AttendCall) -> torch.Tensor:
    """The attention of `call`: `(B, Tq, Hq, D)` in the dtype of `q`. Nothing is read back from the GPU."""
    launch = _launcher(call, call.features())
    q, window, begin = call.q.transpose(1, 2), call.window, 0
    if window is not None and call.q.shape[2] == 1:  # one query: the window is a slice
        begin, window = max(0, call.kv_len - window), None
    # The library does not count the query's own key in the window.
    sides = (-1, -1) if window is None else (window - 1, 0 if call.causal else -1)
    parts, pieces = [], _pieces(call, begin)
    joined = len(pieces) > 1 or call.sinks is not None
    for start, slots in pieces:
        padding, empty = {}, None
        if call.leftpad is not None:
            # The length is passed too: without it the kernels read all tiles, as if nothing were padded.
            length = slots.stop - slots.start
            leftpad = (call.leftpad - start).clamp(0, length)
            if joined:
                leftpad, empty = leftpad.clamp(max=length - 1), leftpad == length
            padding = {"cache_leftpad": leftpad, "cache_seqlens": length}
        k, v = (t[:, :, slots].transpose(1, 2) for t in (call.k, call.v))
        parts.append(_without(empty, launch(q, k, v, causal=call.causal, window_size=sides, **padding)))
    if call.sinks is not None:
        seen = call.sinks.visible().sum((1, 2, 3), dtype=torch.int32).expand(q.shape[0]).contiguous()
        own_q, k, v = (t.transpose(1, 2) for t in (call.sinks.q, call.sinks.k, call.sinks.v))
        parts.append(_without(seen == 0, launch(own_q, k, v, cache_seqlens=seen.clamp(min=1))))
    return _joined(parts, call)


def _without(empty: torch.Tensor | None, part: tuple) -> tuple:
    """The result and log-sum-exp of a piece, without the rows `empty` `(B,)` that have no key in it.

    They were given one: a launch in which no row has any makes FA3's scheduler divide by zero.
    """
    if empty is None:
        return part
    return part[0], part[1].masked_fill(empty[:, None, None], -torch.inf)


def cannot_append(call: AttendCall) -> str | None:
    """Why `append_attend` does not serve the buffers of `call`, or None."""
    if call.q.shape[1] > call.k.shape[2] * call.k.shape[1]:
        return "where flash-attn appends, it needs a slot for each query head of a group"
    return flash_libraries.serving(call.q, _append_features(call))[1]


def _append_features(call: AttendCall) -> int:
    return call.features() | _LEFT_PADDING  # which says where each row begins


def append_attend(
    call: AttendCall, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, begin: torch.Tensor
) -> torch.Tensor:
    """Writes each row's new token into the buffers of `call`, in place, and attends to it and the tokens before it.

    Args:
        call: one query a row over the buffers with all their slots; rings, where `call.tokens` is not None.
        k, v: `(B, Hkv, 1, D)`, the new tokens.
        lengths: `(B,)` int32 on the GPU, the position of each row's new token.
        begin: `(B,)` int32 on the GPU, the first position that each query sees, at most its own.

    Returns:
        `(B, 1, Hq, D)` in the dtype of `q`. Nothing is read back from the GPU.
    """
    launch = _launcher(call, _append_features(call))
    q, k, v, k_buffer, v_buffer = (t.transpose(1, 2) for t in (call.q, k, v, call.k, call.v))
    if call.tokens is None:
        return _joined([launch(q, k_buffer, v_buffer, k=k, v=v, cache_seqlens=lengths, cache_leftpad=begin)], call)
    slots = call.k.shape[2]
    slot, reach = lengths % slots, lengths - begin  # the tokens before slot 0 are in the last slots
    new = launch(q, k_buffer, v_buffer, k=k, v=v, cache_seqlens=slot, cache_leftpad=(slot - reach).clamp(min=0))
    before, ends = reach - slot, torch.full_like(slot, slots)
    old = launch(q, k_buffer, v_buffer, cache_seqlens=ends, cache_leftpad=slots - before.clamp(min=1))
    return _joined([new, _without(before <= 0, old)], call)


def _launcher(call: AttendCall, features: int) -> Callable[..., tuple]:
    """The library's function with the arguments that all pieces of `call` share: it returns results, log-sum-exps."""
    function, reason = flash_libraries.serving(call.q, features)
    if function is None:
        raise ValueError(f"backend 'flash' cannot be used here: {reason}")
    return functools.partial(function, softmax_scale=call.scale, softcap=call.softcap or 0.0, return_softmax_lse=True)


def _joined(parts: list[tuple], call: AttendCall) -> torch.Tensor:
    """One softmax over all parts' keys, and `s_aux`, from each part's result and log-sum-exp `(B, Hq, Tq)`."""
    if len(parts) == 1 and call.s_aux is None:
        return parts[0][0]
    scores = torch.stack([part[1] for part in parts])
    scores = scores.masked_fill(scores == torch.inf, -torch.inf)  # FA2 returns inf for a part without keys
    if call.s_aux is not None:
        own = call.s_aux.float()[:, None].expand_as(scores[:1])
        scores = torch.cat([scores, own])
    shares = torch.nan_to_num(torch.softmax(scores, 0)).transpose(2, 3)[..., None]
    return sum(part[0] * share for part, share in zip(parts, shares, strict=False)).to(call.q.dtype)
