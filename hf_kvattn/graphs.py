"""Decode steps that a CUDA graph can hold: whatever changes from one step to the next lies in tensors on the GPU.

A graph repeats what the device did once, without Python. So nothing in such a step depends on a number of the host:
each layer's attention is one op, `append_attend`, which is given the cache's buffers, declared to be mutated, and the
number of tokens before the step as a tensor. What remains for the host is done before the graph runs and after it
(`DecodeSteps.run`): the checks, one fill of the lengths, and counting; nothing is read back from the GPU.

Buffers must keep their addresses: a `StaticKVCache` with `max_cache_len`. Layers with a window of the model's own are
rings (`caches/sliding.py`), which have fixed addresses too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import dispatch
from .caches.base import KVCache
from .caches.layer import KVLayer
from .caches.static import StaticKVCache
from .kernels import flash
from .kernels.call import AttendCall
from .masks import compact_mask, left_padding, read_compact_mask


def _append_attend(
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    first: torch.Tensor,
    scale: float,
    window: int | None,
    wraps: bool,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """Stores one new token of each row and gives the attention of its query, `(B, 1, Hq, D)`.

    Args:
        k_buffer, v_buffer: `(B, Hkv, slots, D)`, mutated; slots that were never written hold finite numbers.
        q: `(B, Hq, 1, D)`.
        k, v: `(B, Hkv, 1, D)`.
        lengths: `(B,)` int32, tokens stored before, the same for all rows.
        first: `(B,)` int32, the position of each row's first token (left padding).
        window: visible keys including the query's own, or None for all.
        wraps: whether the buffers are rings: token `t` lies in slot `t % slots`.
        backend: `dispatch.chosen_backend()` at the time of the step.
    """
    _check(k_buffer, k, lengths)
    slots = k_buffer.shape[2]
    slot = lengths % slots if wraps else lengths
    reach = (lengths - first).clamp(0, None if window is None else window - 1)
    call = AttendCall(q, k_buffer, v_buffer, scale, softcap=softcap, s_aux=s_aux)
    with dispatch.backend(backend):
        # Where it appends, the library wants a slot for each query head of a group.
        if dispatch.serving(call) is flash and q.shape[1] <= slots * k.shape[1]:
            return flash.append_attend(call, k, v, slot, reach, wraps)
        k_buffer.index_copy_(2, slot[:1].long(), k)
        v_buffer.index_copy_(2, slot[:1].long(), v)
        ages = (slot[:, None] - torch.arange(slots, device=slot.device)) % slots
        call.mask = (ages <= reach[:, None])[:, None, None]
        return dispatch.attend(call).contiguous()


def _check(k_buffer: torch.Tensor, k: torch.Tensor, lengths: torch.Tensor) -> None:
    """What the host has not seen before the step."""
    shape = (*k_buffer.shape[:2], 1, k_buffer.shape[3])
    if (k.shape, k.dtype, k.device) != (shape, k_buffer.dtype, k_buffer.device) or lengths.device != k.device:
        raise ValueError(
            f"a step stores keys {shape} of {k_buffer.dtype} on {k_buffer.device}, got {tuple(k.shape)} of {k.dtype} "
            f"on {k.device}, and lengths on {lengths.device}"
        )


def _append_attend_fake(
    k_buffer, v_buffer, q, k, v, lengths, first, scale, window, wraps, softcap, s_aux, backend
) -> torch.Tensor:
    _check(k_buffer, k, lengths)
    return q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])


# Of `torch.ops.hf_kvattn.append_attend`: arguments, implementation, fake implementation.
APPEND_ATTEND: tuple[str, Callable, Callable] = (
    "Tensor(a!) k_buffer, Tensor(b!) v_buffer, Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor first, "
    "float scale, int? window, bool wraps, float? softcap, Tensor? s_aux, str backend",
    _append_attend,
    _append_attend_fake,
)


class StepLayer(NamedTuple):
    """One layer's arguments of `append_attend`: buffers, and whether they are rings that will wrap."""

    k: torch.Tensor
    v: torch.Tensor
    wraps: bool


class DecodeSteps:
    """Stands in for a cache in the forward of one token a row, traced or not, and keeps the cache's books around it.

    Args:
        cache: a `StaticKVCache` with `max_cache_len`.

    Raises:
        ValueError: any other cache, with what to give instead.

    Attributes:
        lengths: `(B,)` int32 on the GPU, tokens stored before the step.
        first: `(B,)` int32 there, left padding.
        looked: whether `first` is that of the mask; looking at it waits for the GPU, once.
        layers: each layer's part.
        backend: the choice in force at the step.
    """

    def __init__(self, cache: KVCache):
        if not isinstance(cache, StaticKVCache):
            raise ValueError(f"they hold a StaticKVCache with max_cache_len, not a {type(cache).__name__}")
        if cache.offloads:
            raise ValueError("they hold layers that stay on the GPU: StaticKVCache without offload=True")
        if cache.settings["max_cache_len"] is None:
            raise ValueError("they hold no cache that grows: give StaticKVCache a max_cache_len")
        self.cache = cache
        self.lengths = self.first = torch.empty(0)
        self.looked = False
        self.layers: list[StepLayer] = []
        self.backend = "auto"
        self._buffers: list[torch.Tensor] = []  # keys and values in turn, ready for graphs

    def run(self, compiled: Callable, model: Callable, kwargs: dict[str, Any]) -> Any:
        """The output of `compiled`, or of `model` where the cache is empty still, for `kwargs` with this cache.

        Raises:
            ValueError: a full or torn cache, another batch size, a mask that says more than left padding; nothing has
                changed then.
        """
        if not self.cache.get_seq_length():
            return model(**kwargs)
        self._begin(new_tokens(kwargs), kwargs.get("attention_mask"))
        out = compiled(**{**kwargs, "past_key_values": self, "attention_mask": None})
        for layer in self.cache.layers:
            layer.seen += 1
        out.past_key_values = self.cache
        return out

    def _begin(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> None:
        """What the host does before a step."""
        self.cache.check_whole()
        layer, buffer = self.cache.layers[0], self.cache.layers[0].buffers()["k"][0]
        new = buffer[:1, :, :1].expand(tokens.shape[0], -1, -1, -1)
        layer.check(new, new)
        if not self.looked:
            self._look_at(mask, tokens.shape[0], layer)
        self.backend = dispatch.chosen_backend()
        self._look_at_buffers()
        for layer in self.cache.layers:
            layer.claim()
        self.lengths.fill_(self.cache.get_seq_length())

    def _look_at(self, mask: torch.Tensor | None, batch: int, layer: KVLayer) -> None:
        """Writes `first`, of a mask `(B, tokens)` or None."""
        first: torch.Tensor | bool | None = None
        if mask is not None:
            fits = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[0] == batch
            first = fits and left_padding(mask.bool(), layer.seen + 1, 0)
        if isinstance(first, bool):
            raise ValueError(
                f"attention_mask {getattr(mask, 'shape', type(mask))}: steps in a CUDA graph take padding at the left, "
                "in a mask (B, tokens); compile_config with mode='default' takes others"
            )
        if self.first.shape != (batch,):
            self.lengths, self.first = torch.empty(2, batch, dtype=torch.int32, device=layer.device).unbind()
        self.first.copy_(first) if first is not None else self.first.zero_()
        self.looked = True

    @torch.inference_mode(False)
    def _look_at_buffers(self) -> None:
        """Makes new buffers ready for graphs: at a fixed address, as compilers are told, and finite everywhere."""
        found = [layer.buffers()[name] for layer in self.cache.layers for name in "kv"]
        if self._buffers and all(one is other for one, (other, _) in zip(self._buffers, found, strict=True)):
            return
        devices = {str(tensor.device) for tensor, _ in found}
        if len(devices) > 1:
            raise ValueError(f"CUDA graphs hold the work of one GPU, the cache lies on {', '.join(sorted(devices))}")
        for tensor, filled in found:
            tensor[:, :, filled:].zero_()  # a weight of 0 hides no NaN
            torch._dynamo.mark_static_address(tensor, guard=False)
        buffers, limit = [tensor for tensor, _ in found], self.cache.settings["max_cache_len"]
        self.layers = [StepLayer(k, v, k.shape[2] < limit) for k, v in zip(buffers[::2], buffers[1::2], strict=True)]
        self._buffers = buffers

    def inputs(self, decoder: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the decoder is called with: positions and masks of tensors alone."""
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = self.lengths[:1, None].long()
        masks = compact_masks(decoder.config, new_tokens(kwargs), lambda sliding: self.first)
        return {**kwargs, "position_ids": positions, "attention_mask": masks}

    def attend(
        self,
        index: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        s_aux: torch.Tensor | None,
    ) -> torch.Tensor:
        """`append_attend` of layer `index`: arguments as in `kvattn_attention`, `mask` one that `inputs` made."""
        layer, window = self.layers[index], read_compact_mask(mask)[1]
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        numbers = (self.lengths, self.first, scale, window, layer.wraps, softcap, s_aux, self.backend)
        return torch.ops.hf_kvattn.append_attend(layer.k, layer.v, q, k, v, *numbers)


def new_tokens(kwargs: dict[str, Any]) -> torch.Tensor:
    """The new tokens of a forward, `(B, T)` or `(B, T, hidden)`."""
    return kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]


def compact_masks(
    config: Any, tokens: torch.Tensor, first: Callable[[bool], torch.Tensor | None]
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Compact masks for a decoder of `config`, as transformers would hand them to it in `create_masks_for_generate`.

    Args:
        first: what `compact_mask` takes, for layers with a sliding window or without.
    """

    def compact(sliding: bool) -> torch.Tensor:
        return compact_mask(first(sliding), config.sliding_window if sliding else 0, tokens.shape[0], tokens.device)

    if hasattr(config, "layer_types"):  # one mask for each kind of layer, or one for all
        return {kind: compact(kind == "sliding_attention") for kind in dict.fromkeys(config.layer_types)}
    return compact(getattr(config, "sliding_window", None) is not None)
