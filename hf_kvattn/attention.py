"""The attention function that transformers calls under the name `kvattn`, and what it is handed for a layer's cache.

    kvattn_attention(module, q, k, v, mask, ..., kv_handle=handle)  ->  handle.attend(q, k, v, rules)

The hook of `enable` (`hooks.py`) adds `kv_handle`. There are five kinds of handle, all with that one method:
`LayerHandle` here, `LatentHandle` where a layer stores latents (`latents.py`), `PagedHandle` in a continuous batch
(`paged.py`), `TracedHandle` while a model is traced (`compiling/ops.py`), and `StepHandle` in a step that a CUDA graph
holds (`compiling/decode_steps.py`). Without one, attention runs over the keys and values it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad

from .alike import FirstAlike, facts_of, repeated
from .autograd import cut_graph, outside_autocast
from .caches.layer import as_wide
from .kernels import dispatch
from .kernels.call import AttendCall, SinkKV, check_mask
from .masks import is_compact, read_compact_mask

if TYPE_CHECKING:
    from .caches.base import KVCache
    from .caches.layer import KVLayer, Stored

NAME = "kvattn"

# Keywords that transformers hands to every attention function and that change nothing here: what they stand for is in
# the mask or the positions already, or concerns other parts of the model.
_HARMLESS = frozenset(
    "assistant_tokenizer cache_position cu_seq_lens_k cu_seq_lens_q deterministic logits_to_keep max_length_k "
    "max_length_q num_items_in_batch output_hidden_states output_router_logits position_ids return_dict "
    "return_shared_kv_states seq_idx token_type_ids tokenizer use_cache".split()
)


class Rules(NamedTuple):
    """What a model asks of one attention besides queries, keys and values.

    Attributes:
        mask: what `kvattn_mask` returned, or a custom 4-D mask `(B or 1, Hq or 1, Tq, Tk)`, bool or float.
        scaling: factor of the scores; None means `D ** -0.5`.
        is_causal: whether a query sees only keys up to its own position, where there is no mask.
        window: visible keys including the query's own, where there is no mask; None means all.
        softcap: scores become `softcap * tanh(score / softcap)`; None means no cap.
        s_aux: learned sinks, `(Hq,)` scores without values (gpt-oss).
        dropout: probability of dropping a weight, for training.
    """

    mask: torch.Tensor | None
    scaling: float | None
    is_causal: bool
    window: int | None
    softcap: float | None
    s_aux: torch.Tensor | None
    dropout: float = 0.0

    def for_op(self) -> tuple:
        """The fields that the ops of `compiling/ops.py` take, in their order: all but `dropout`."""
        return self[:-1]

    def check_inference(self, query: torch.Tensor) -> None:
        """Raises ValueError where a compiled step cannot serve: dropout, or gradients for `query`."""
        if self.dropout or (torch.is_grad_enabled() and query.requires_grad):
            raise ValueError(
                f"a compiled step through a cache is for inference: torch.no_grad(), no dropout={self.dropout}"
            )


class Handle:
    """One layer's cache, as the attention module and the attention function meet it in one forward.

    `update` returns the new tokens alone; `attend` stores them. So the module has to hand those very tensors on, and a
    mask that it was given: what it computes from them lacks the tokens before. `take` refuses anything else, and the
    hook after the module a forward without `attend`. Nothing has been stored then.

    Args:
        index: the layer's number.
        given: arguments of the module, the masks among them.
    """

    attended = False
    _new: tuple[torch.Tensor | None, torch.Tensor | None] = None, None

    def __init__(self, index: int, given: Sequence[Any] = ()):
        self._index, self._given = index, given

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Called by the module as on a cache; returns the new tokens."""
        if layer_idx != self._index:
            raise ValueError(f"layer {self._index} of the cache was asked to store layer {layer_idx}")
        if self._new[0] is not None:
            raise ValueError(f"layer {self._index} of the cache was asked to store twice in one forward")
        self._new = key_states, value_states
        return key_states, value_states

    def take(self, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Called by the attention function before `attend`, with what `module` handed to it."""
        mask_is_given = mask is None or any(mask is each for each in self._given)
        if self.attended or not mask_is_given or not self.handed_out(key, value):
            raise self.refusal(module)
        self.attended = True

    def handed_out(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether these are the very tensors that `update` returned."""
        return key is self._new[0] and value is self._new[1]

    def refusal(self, module: torch.nn.Module) -> ValueError:
        return ValueError(
            f"{type(module).__name__}, layer {self._index}: {NAME!r} serves modules that hand the attention function, "
            "once, what the cache's update() returned, and a mask they got; this one does something else with them. "
            "The cache works on this model without enable()"
        )

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
        """Stores `key` and `value`, `(B, Hkv, T, D)`; attention of `query` `(B, Hq, T, D)` over all the layer's tokens.

        Returns `(B, T, Hq, D)`, contiguous.
        """
        raise NotImplementedError

    def to(self, *args, **kwargs) -> Handle:
        """Moves nothing. Libraries move and copy what they find among a module's arguments (accelerate's hooks)."""
        return self

    __copy__ = __deepcopy__ = to


class LayerHandle(Handle):
    """One layer of a cache during the forward of one attention module.

    It stands in for the cache there, so that the past is never gathered: `attend` reads the layer's own storage.
    Anything else that a module asks of its cache is the cache's own answer.

    Raises:
        ValueError: the cache has no such layer.
    """

    def __init__(self, cache: KVCache, index: int, given: Sequence[Any] = ()):
        self._index, self._given, self._cache = index, given, cache
        if index not in cache.attended:
            cache.layer(index)  # raises
        if index in cache.lender_of:
            self._new = cache.lent.get(cache.lender_of[index], self._new)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        new = super().update(key_states, value_states, layer_idx)
        if layer_idx in self._cache.lenders:
            self._cache.lent[layer_idx] = new
        return new

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
        return attend_layer(self._cache, self._index, query, key, value, rules)

    def __getattr__(self, name: str):
        if name.startswith("__"):  # copying and pickling ask an empty instance for these
            raise AttributeError(name)
        return getattr(self._cache, name)


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
    kv_handle: Handle | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` over the tokens of `kv_handle`, or over `key` and `value` without one.

    Args:
        module: the attention module; `is_causal` is read from it when not given.
        query: `(B, Hq, Tq, D)`.
        key: `(B, Hkv, Tk, D)`; with `kv_handle` the new tokens only.
        value: as `key`.
        attention_mask, dropout, scaling, is_causal, sliding_window, softcap, s_aux: see `Rules`.
        kv_handle: put here by the hook of `enable`.

    Returns:
        `(B, Tq, Hq, D)`, contiguous, and None (no attention weights).

    Raises:
        ValueError: a keyword that is not known and might change the result, a mask of another length than the keys, or
            keys, values or a mask that `kv_handle` did not hand out.
    """
    for name, given in kwargs.items():
        if given is None or name in _HARMLESS:
            continue
        if name != "output_attentions":
            raise ValueError(f"attention implementation {NAME!r} does not serve {name!r} ({type(module).__name__})")
        if given:
            raise ValueError(f"attention implementation {NAME!r} keeps no weights: output_attentions needs 'eager'")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    rules = Rules(attention_mask, scaling, is_causal, sliding_window, softcap, s_aux, dropout)
    attend: Callable = attend_dense
    if kv_handle is not None:
        kv_handle.take(module, key, value, attention_mask)
        attend = kv_handle.attend
    elif torch.compiler.is_dynamo_compiling() and not dropout:
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))):
            attend = _attend_op
    return outside_autocast(attend, query, key, value, rules), None


def _attend_op(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
    return torch.ops.hf_kvattn.attend(query, key, value, *rules.for_op())


def attend_dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Attention over the keys and values given, `(B, Hkv, Tk, D)`: `(B, Tq, Hq, D)`, contiguous."""
    call = AttendCall(query, *as_wide(key, value), scale_of(query, rules), softcap=rules.softcap, s_aux=rules.s_aux)
    _apply_mask(call, rules)
    return _narrowed(dispatch.attend(call), value).contiguous()


def attend_layer(
    cache: KVCache, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules
) -> torch.Tensor:
    """Stores the new tokens `key` and `value`, `(B, Hkv, T, D)`, in layer `index`; attention over what it then holds.

    A layer that attends to another's tokens stores nothing: that other layer has done so.

    Returns:
        `(B, Tq, Hq, D)`, contiguous. A backward pass through it raises: a cache holds no autograd graph.

    Raises:
        ValueError: tokens or a mask that do not fit; nothing has been stored then.
    """
    layer, stores = cache.attended[index], index not in cache.lender_of
    place = layer.place() if stores and key.shape[2] == 1 and not torch.is_grad_enabled() else None
    facts = () if place is None else facts_of(layer, place, query, key, value, rules)
    first = cache.first_alike.get(layer.kind)
    if place is not None and first is not None and first.serves(index, facts, rules.mask):
        out = first.attend(layer, place, query, key, value)
    else:
        visible = check_rules(layer, query, key.shape[2], rules, before=stores)
        if stores:
            layer.append(*as_wide(key, value))
        call = _layer_call(layer, query, layer.stored_kv(), rules, visible)
        out = cut_graph(_narrowed(dispatch.attend(call), value), query, key, value).contiguous()
        if stores:
            again = None
            if place is not None and value.shape == key.shape and index + 1 < len(cache.layers):
                again = repeated(layer, place, call)
            cache.first_alike[layer.kind] = again and FirstAlike(index, facts, rules.mask, again)
    if stores and layer.wants_queries:
        layer.note_queries(query, _padding(layer, key.shape[2], rules))
    if not stores:
        cache.finish_lent(index, dispatch.quantize_blocks)
    elif index not in cache.lenders:
        layer.finish_attention(dispatch.quantize_blocks)
    return out


def _padding(layer: KVLayer, new: int, rules: Rules) -> torch.Tensor | None:
    """How many stored tokens at the left of each row are padding, `(B,)`, 0 where the mask's range does not tell."""
    leftpad = read_compact_mask(rules.mask)[0] if rules.mask is not None and is_compact(rules.mask) else None
    if leftpad is None:
        return None
    visible, _ = layer.get_mask_sizes(new, before=False)
    return torch.where(leftpad > 0, leftpad + (layer.stored - visible), 0)


def check_rules(layer: KVLayer, query: torch.Tensor, new: int, rules: Rules, before: bool = True) -> int:
    """How many tokens of `layer` queries see, theirs included; ValueError where a mask does not fit them.

    Args:
        new: tokens; a layer that stores nothing may have queries for the last of them alone (Gemma 4).
        before: whether they have not been stored yet.
    """
    visible, _ = layer.get_mask_sizes(new, before)
    if rules.mask is not None and not is_compact(rules.mask):
        check_mask(rules.mask, query, visible)
    return visible


def attend_tokens(layer: KVLayer, query: torch.Tensor, stored: Stored, rules: Rules, visible: int) -> torch.Tensor:
    """Attention over `stored`, what there is of `layer`, under its window: `(B, Tq, Hq, D)`.

    Args:
        visible: the tokens that `rules.mask` is about, the last ones.
    """
    return dispatch.attend(_layer_call(layer, query, stored, rules, visible))


def _layer_call(layer: KVLayer, query: torch.Tensor, stored: Stored, rules: Rules, visible: int) -> AttendCall:
    """The call of `attend_tokens`."""
    k, v, packed, tokens, slot = stored
    call = AttendCall(query, k, v, scale_of(query, rules), softcap=rules.softcap, s_aux=rules.s_aux)
    call.packed, call.tokens, call.slot = packed, tokens, slot
    _apply_mask(call, rules, call.kv_len - visible)
    _apply_layer_window(call, layer)
    return call


def _narrowed(out: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`out` without the channels that `as_wide` gave to `value`."""
    return out if out.shape[3] == value.shape[3] else out[..., : value.shape[3]]


def scale_of(query: torch.Tensor, rules: Rules) -> float:
    """The factor of the scores of `query` `(B, Hq, Tq, D)`."""
    return query.shape[-1] ** -0.5 if rules.scaling is None else rules.scaling


def _apply_mask(call: AttendCall, rules: Rules, unseen: int = 0) -> None:
    """Writes dropout, and what is visible, into `call`.

    Args:
        unseen: keys that lie before the mask's range; no query sees them.
    """
    call.dropout, mask = rules.dropout, rules.mask
    if mask is None:
        call.causal = rules.is_causal
        call.window = rules.window if call.causal else None
    elif is_compact(mask):
        leftpad, call.window = read_compact_mask(mask)
        call.leftpad = leftpad + unseen if unseen and leftpad is not None else leftpad
    else:
        call.mask = pad(mask, (unseen, 0), value=False if mask.dtype == torch.bool else -torch.inf) if unseen else mask


def _apply_layer_window(call: AttendCall, layer: KVLayer) -> None:
    """The window that a cache forces on the model, and the sinks beside it."""
    if layer.forces_window:
        if not call.causal:
            raise ValueError(f"a window of {layer.sliding_window} is forced on causal attention only")
        if call.mask is None:
            call.window = layer.sliding_window
        elif (
            # the mask says what is causal: it may show an image's tokens, or a prefix, to one another
            visible := replace(call, mask=None, leftpad=None, causal=False, window=layer.sliding_window).visible()
        ) is not None:
            is_bool = call.mask.dtype == torch.bool
            call.mask = call.mask & visible if is_bool else call.mask.masked_fill(~visible, -torch.inf)
    sinks = layer.sink_inputs(call.q, call.leftpad)
    if sinks is not None:
        call.sinks = SinkKV(*sinks)
