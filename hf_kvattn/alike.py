"""Decode steps, layer after layer: the first layer of a kind is served with all checks, those after it repeat it.

In one forward of one token, layers that store alike differ in little but the addresses of their tensors. So what the
first one has found out holds for the others, as far as `FirstAlike.serves` finds them alike: that all fits, which
backend serves it, and the kernel's arguments. The kernel then stores the token itself.

Nothing outlives a forward. Layers come in their order: one that is not after the last begins anew.
"""

from __future__ import annotations

from typing import Any

import torch

from .caches.layer import KVLayer, Place
from .kernels import dispatch
from .kernels.call import AttendCall


class FirstAlike:
    """The attention of one new token in the first layer of a kind, as those after it repeat it.

    Args:
        index: the layer's number.
        facts: those of `facts_of`, before the token was stored.
        mask: that of its `Rules`.
        repeated: what the backend made of its call.
    """

    def __init__(self, index: int, facts: tuple, mask: torch.Tensor | None, repeated: Any):
        self._index, self._facts, self._mask, self._repeated = index, facts, mask, repeated
        self._choice = dispatch.chosen_in_code()

    def serves(self, index: int, facts: tuple, mask: torch.Tensor | None) -> bool:
        """Whether layer `index` repeats the first one; if so, only a later layer does so again."""
        alike = index > self._index and facts == self._facts and dispatch.chosen_in_code() == self._choice
        if not alike or not _same(mask, self._mask):
            return False
        self._index = index
        return True

    def attend(
        self, layer: KVLayer, place: Place, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Stores `key` and `value`, `(B, Hkv, 1, D)`, in `layer`; the attention of `query`, `(B, 1, Hq, D)`."""
        layer.reserve_slot()
        out = self._repeated.attend(query, (key, value), (place.k, place.v), place.packed)
        layer.seen += 1  # last: an interrupt must not leave a token counted that is not there
        return out


def facts_of(
    layer: KVLayer, place: Place, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Any
) -> tuple:
    """All that the attention of one new token depends on beside addresses, its mask and the kind of the layer.

    Args:
        rules: `attention.Rules`. Layers with learned sinks, tensors of their own, repeat none.
    """
    k, v, slot, packed = place
    return (
        layer.seen, layer.inconsistent, slot, None if packed is None else (packed.tokens, packed.slot),
        rules.scaling, rules.is_causal, rules.window, rules.softcap, rules.s_aux is None, rules.dropout,
        query.shape, query.stride(), query.dtype, query.device, key.shape, key.dtype, key.device, value.shape,
        value.dtype, value.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(), v.dtype, v.device,
    )  # fmt: skip


def repeated(layer: KVLayer, place: Place, call: AttendCall) -> Any:
    """What the backend that serves `call` of `layer` gives to the layers after it; None where it gives nothing.

    Args:
        place: the token's, before it was stored.
    """
    now, backend = layer.place(), dispatch.serving(call)
    grown = now is None or now.k is not place.k
    if grown or not hasattr(backend, "Repeated") or backend.cannot_repeat(call):
        return None
    return backend.Repeated(call, place.k, place.v, place.slot)


def _same(mask: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether both are one mask: a compiled graph makes several views of the same memory."""
    if mask is None or other is None or mask is other:
        return mask is other
    one, two = ((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (mask, other))
    return one == two
