"""The attention function that transformers calls under the name `kvattn`: its arguments become one `AttendCall`."""

from __future__ import annotations

from dataclasses import replace

import torch

from .autograd import cut_graph
from .kernels import dispatch
from .kernels.call import AttendCall, SinkKV
from .masks import is_compact, read_compact_mask

NAME = "kvattn"
_UNSERVED = ("position_bias", "cache", "block_table", "head_mask")


def kvattn_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    kv_layer=None,
    kv_ticket: tuple[torch.Tensor, int] | None = None,
    kv_step: tuple | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` over `kv_layer`'s stored tokens, or over `key` and `value` where there is no such layer.

    Args:
        module: the attention module; `is_causal` is read from it when not given.
        query: `(B, Hq, Tq, D)`.
        key: `(B, Hkv, Tk, D)`; with `kv_layer` the new tokens only, which the layer already holds.
        value: as `key`.
        attention_mask: what `kvattn_mask` returned, or a custom 4-D mask `(B or 1, Hq or 1, Tq, Tk)`, bool or float.
        scaling: factor of the scores; None means `D ** -0.5`.
        s_aux: learned attention sinks, `(Hq,)` scores without values (gpt-oss).
        kv_layer: a layer of one of this package's caches, put here by the hook of `enable`.
        kv_ticket: while a model is traced, in the place of `kv_layer`: the cache's ticket and the layer's index. The
            new tokens are not stored yet.
        kv_step: in a step that a CUDA graph is to hold, in the place of `kv_layer`: the `graphs.DecodeSteps` and
            the layer's index. The new token is not stored yet.

    Returns:
        `(B, Tq, Hq, D)`, contiguous, and None (no attention weights).

    Raises:
        ValueError: an argument that changes the result and cannot be served, or a mask of another length than the keys.
    """
    for name in _UNSERVED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attention implementation {NAME!r} does not serve {name!r} (layer {module.layer_idx})")
    if kwargs.get("output_attentions"):
        raise ValueError(f"attention implementation {NAME!r} keeps no weights: output_attentions needs 'eager'")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if kv_ticket is not None or kv_step is not None:
        if dropout or (torch.is_grad_enabled() and query.requires_grad):
            raise ValueError(f"a compiled step through a cache is for inference: torch.no_grad(), no {dropout=}")
        if kv_step is not None:
            steps, index = kv_step
            return steps.attend(index, query, key, value, attention_mask, scaling, softcap, s_aux), None
        assert kv_ticket is not None
        step = torch.ops.hf_kvattn.step
        rules = (attention_mask, scaling, is_causal, sliding_window, softcap, s_aux)
        return step(*kv_ticket, query, key, value, *rules), None
    call = AttendCall(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap=softcap)
    call.dropout, call.s_aux = dropout, s_aux
    if torch.compiler.is_dynamo_compiling() and kv_layer is None and not dropout and not call.needs_grad:
        rules = (attention_mask, scaling, is_causal, sliding_window, softcap, s_aux)
        return torch.ops.hf_kvattn.attend(query, key, value, *rules), None
    if kv_layer is not None:
        call.k, call.v, call.packed, call.tokens, call.slot = kv_layer.stored_kv()
    if attention_mask is None:
        call.causal = is_causal
        call.window = sliding_window if call.causal else None
    elif is_compact(attention_mask):
        call.leftpad, call.window = read_compact_mask(attention_mask)
    else:
        q_len, kv_len = query.shape[2], call.kv_len
        if attention_mask.shape[-2:] != (q_len, kv_len):
            raise ValueError(f"mask {tuple(attention_mask.shape)} does not fit {q_len} queries and {kv_len} keys")
        call.mask = attention_mask
    if kv_layer is not None:
        _apply_layer_window(call, kv_layer)
    out = dispatch.attend(call)
    if kv_layer is not None:
        kv_layer.finish_attention()
        out = cut_graph(out, query, key, value)
    return out.contiguous(), None


def _apply_layer_window(call: AttendCall, kv_layer) -> None:
    """The window that a cache forces on the model, and the sinks beside it."""
    if kv_layer.forces_window:
        if not call.causal:
            raise ValueError(f"a window of {kv_layer.sliding_window} is forced on causal attention only")
        if call.mask is None:
            call.window = kv_layer.sliding_window
        elif (seen := replace(call, mask=None, leftpad=None, window=kv_layer.sliding_window).visible()) is not None:
            is_bool = call.mask.dtype == torch.bool
            call.mask = call.mask & seen if is_bool else call.mask.masked_fill(~seen, -torch.inf)
    sink_inputs = kv_layer.sink_inputs(call.q, call.leftpad)
    if sink_inputs is not None:
        call.sinks = SinkKV(*sink_inputs)
