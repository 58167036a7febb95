"""The ops that stand in a compiled graph for all that depends on how full a cache is.

While a model is traced, the hooks of `enable` put three ops into the graph: `begin` (positions of the new tokens),
`leftpad` (left padding) and `append_and_attend`. They are opaque: when the graph runs, they run the same caches,
dispatch and kernels as without it. No length is part of the graph, so one graph serves all lengths.

Each of the three is given the cache's ticket (`caches/tickets.py`), a tensor that stands for everything the cache
stores. It is declared to be mutated, so that no compiler reorders, repeats or leaves out what happens to the cache.

With transformers' own caches, or none, the model's graph keeps what it does with them, and the op `attend` stands for
the attention: the backend in force is asked for when the graph runs, not when it is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..attention import Handle, Rules, attend_dense, attend_layer
from ..caches.base import KVCache
from ..caches.tickets import cache_of
from ..masks import left_padding
from . import append_attend, few_rows
from .decode_steps import compact_masks, new_tokens


def stream_positions(
    cache: KVCache, tokens: torch.Tensor, position_ids: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The positions at which `cache` wants the new tokens; see `KVCache.positions`."""
    if not cache.counts_positions:
        return position_ids
    padded = False
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.device.type == "cpu":  # a GPU's would stall it
        padded = not mask[:, -1].all()
    return cache.positions(position_ids, tokens.shape[1], tokens.device, padded)


def _begin(
    ticket: torch.Tensor, tokens: torch.Tensor, position_ids: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """Positions `(B or 1, T)` of the new `tokens`, `(B, T)` or `(B, T, hidden)`. Refuses an inconsistent cache."""
    cache: KVCache = cache_of(ticket)
    cache.check_consistent_layers()
    positions = stream_positions(cache, tokens, position_ids, mask)
    if positions is None:
        seen = cache.get_seq_length()
        positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]
    return positions.clone(memory_format=torch.contiguous_format)


def _begin_fake(ticket, tokens, position_ids, mask):
    if position_ids is None:
        return tokens.new_empty((1, tokens.shape[1]), dtype=torch.int64)
    return position_ids.new_empty(position_ids.shape)


def _leftpad(ticket: torch.Tensor, mask: torch.Tensor, new: int, sliding: bool) -> torch.Tensor:
    """First visible key of each row, `(B,)` int32, counted from the first that layers see; `mask` is `(B, tokens)`."""
    layer = next(layer for layer in cache_of(ticket).kv_layers if layer.is_sliding is sliding)
    leftpad = left_padding(mask.bool(), *layer.get_mask_sizes(new))
    if isinstance(leftpad, bool):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)}: a compiled step takes padding at the left, in a mask over all tokens"
        )
    return torch.zeros_like(mask[:, 0], dtype=torch.int32) if leftpad is None else leftpad.to(torch.int32)


def _leftpad_fake(ticket, mask, new, sliding):
    return mask.new_empty(mask.shape[0], dtype=torch.int32)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rules: Any) -> torch.Tensor:
    return attend_dense(q, k, v, Rules(*rules))


def _attend_fake(q, k, v, *rules):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _append_and_attend(
    ticket: torch.Tensor, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rules: Any
) -> torch.Tensor:
    """Stores `k` and `v` `(B, Hkv, T, D)` in layer `layer_idx`, and gives the attention of `q`: `attend_layer`."""
    return attend_layer(cache_of(ticket), layer_idx, q, k, v, Rules(*rules))


class TracedHandle(Handle):
    """The handle of layer `index` while a model is traced: an op stores and attends when the graph runs."""

    def __init__(self, cache: KVCache, index: int, given: Sequence[Any]):
        super().__init__(index, given)
        self._ticket, self._borrows = cache.ticket, index in cache.lender_of

    def handed_out(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        return self._borrows or super().handed_out(key, value)  # a trace does not tell which tensors a lender got

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
        rules.check_inference(query)
        append_and_attend = torch.ops.hf_kvattn.append_and_attend
        return append_and_attend(self._ticket, self._index, query, key, value, *rules.for_op())


_TICKET = "Tensor(a!) ticket"
_RULES = "Tensor? mask, float? scaling, bool is_causal, int? window, float? softcap, Tensor? s_aux"
_ATTENTION = f"Tensor q, Tensor k, Tensor v, {_RULES}"
# Of `torch.ops.hf_kvattn`: arguments, implementation, fake implementation.
_OPS: dict[str, tuple[str, Callable, Callable]] = {
    "begin": (f"{_TICKET}, Tensor tokens, Tensor? position_ids, Tensor? mask", _begin, _begin_fake),
    "leftpad": (f"{_TICKET}, Tensor mask, SymInt new, bool sliding", _leftpad, _leftpad_fake),
    "append_and_attend": (
        f"{_TICKET}, int layer_idx, {_ATTENTION}", _append_and_attend, lambda ticket, index, *rest: _attend_fake(*rest)
    ),
    "attend": (_ATTENTION, _attend, _attend_fake),
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def register_ops() -> torch.library.Library:
    """Defines `torch.ops.hf_kvattn.*`, once; they live as long as the library that is returned."""
    library = torch.library.Library("hf_kvattn", "DEF")
    # A CUDA graph repeats what the device did once: what these ops do first is done in Python.
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", ())
    for name, (arguments, run, fake) in {**_OPS, **append_attend.OPS, **few_rows.OPS}.items():
        library.define(f"{name}({arguments}) -> Tensor", tags=unsafe if name in _OPS else ())
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hf_kvattn::{name}", fake, lib=library)
    return library


def trace_inputs(decoder: torch.nn.Module, cache: KVCache, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a traced decoder: nothing in the graph asks `cache` for its lengths.

    Masks that are 4-D already (`generate()` makes them before each step) stay as they are; others become compact.
    """
    tokens = new_tokens(kwargs)
    mask, asked = kwargs.get("attention_mask"), kwargs.get("position_ids")
    plain = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    positions = torch.ops.hf_kvattn.begin(cache.ticket, tokens, asked, plain)
    if mask is None or plain is not None:
        leftpad = functools.partial(torch.ops.hf_kvattn.leftpad, cache.ticket, plain, tokens.shape[1])
        mask = compact_masks(decoder.config, tokens, None if plain is None else leftpad)
    return {**kwargs, "position_ids": positions, "attention_mask": mask}
