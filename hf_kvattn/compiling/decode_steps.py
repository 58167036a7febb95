"""Decode steps that a CUDA graph can hold: everything that changes between steps lies in tensors on the GPU.

A graph repeats what the device did once, without Python. So nothing in such a step depends on a number of the host.
Each layer's attention is one op (`append_attend.py`): it gets the cache's buffers and, as tensors, how full they are.
Those `Numbers` are made once a step, for all layers that are alike, so that a layer computes none of its own. The host
works before the graph runs and after it (`DecodeSteps.run`): it checks, fills in the numbers, counts, and quantizes
full blocks. Nothing is read back from the GPU.

Buffers must keep their addresses, so the cache is a `StaticKVCache` or `QuantizedKVCache` with `max_cache_len`. A
`StaticKVCache` keeps layers with a native window in rings (`caches/ring.py`), which have fixed addresses too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..attention import Handle, Rules, scale_of
from ..caches.base import KVCache
from ..caches.layer import KVLayer
from ..caches.quantized_layer import KVQuantizedLayer, quantize_due
from ..kernels import dispatch
from ..masks import compact_mask, left_padding, read_compact_mask
from ..quant.layout import BLOCK
from .append_attend import Numbers, Part


class DecodeSteps:
    """Stands in for a cache in the forward of one decode step, and updates the cache's counts around it.

    Args:
        cache: one without a `graph_obstacle`: a `StaticKVCache` or `QuantizedKVCache` with `max_cache_len`.

    Attributes:
        leftpad: `(B,)` int32 on the GPU, left padding.
        leftpad_known: whether `leftpad` is that of the mask. To read the mask waits for the GPU, once.
        layers: each layer's part; those of one kind share their numbers.
        backend: the choice in force at the step.
    """

    checked_config = None  # as of a `KVCache`: not known here

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.leftpad = torch.empty(0)
        self.leftpad_known = False
        self.layers: list[Part] = []
        self.backend = "auto"
        self._buffers: list[torch.Tensor] = []  # those of `layers`, ready for graphs
        self._kinds: dict[tuple, tuple[KVLayer, Numbers]] = {}  # one layer of each kind, and the numbers of all

    def run(self, compiled: Callable, model: Callable, kwargs: dict[str, Any]) -> Any:
        """The output of `compiled` for `kwargs` with this cache; of `model` where the cache is empty or wants queries.

        Of what a graph puts out, only the logits are overwritten by the next step: `generate()` copies them.

        Raises:
            ValueError: a full or inconsistent cache, another batch size, a mask that says more than left padding;
                nothing has changed then.
        """
        if not self.cache.get_seq_length() or any(layer.wants_queries for layer in self.cache.kv_layers):
            return model(**kwargs)
        self._begin(new_tokens(kwargs), kwargs.get("attention_mask"))
        out = compiled(**{**kwargs, "past_key_values": self, "attention_mask": None})
        for layer in self.cache.kv_layers:
            layer.seen += 1
        self._finish_attention()
        for name in out.keys() - {"logits", "past_key_values"}:  # hidden states that `generate()` keeps
            out[name] = tree_map_only(torch.Tensor, torch.clone, out[name])  # the next replay overwrites its outputs
        out.past_key_values = self.cache
        return out

    def close(self) -> None:
        """Lets go of the cache, after the last step: a compiler's garbage may hold this object for a while."""
        self.__dict__.clear()

    def _begin(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> None:
        """The host's work before a step: checks, buffers, numbers."""
        self.cache.check_consistent_layers()
        layers = self.cache.kv_layers
        quantized = [layer for layer in layers if isinstance(layer, KVQuantizedLayer)]
        buffer, _ = next(iter(layers[0].buffers().values()))
        new = buffer[:1, :, :1].expand(tokens.shape[0], -1, -1, -1)
        layers[0].check(new, new)  # for all: whole layers of a cache have one batch size, length and capacity
        for each in quantized:
            each.raise_if_not_finite(wait=False)
        if not self.leftpad_known:
            self._read_leftpad(mask, tokens.shape[0], layers[0])
        self._finish_attention()  # where an interrupt came between a step and this
        self.backend = dispatch.chosen_backend()
        self._prepare_buffers()
        for layer in layers:
            layer.reserve_slot()
        self._fill_numbers(self.cache.get_seq_length())

    def _finish_attention(self) -> None:
        """Tells all layers that the step's attention is done. Those that quantize do so in one launch."""
        layers = self.cache.kv_layers
        quantize_due([layer for layer in layers if isinstance(layer, KVQuantizedLayer)], dispatch.quantize_blocks)
        for layer in layers:
            if not isinstance(layer, KVQuantizedLayer):
                layer.finish_attention(dispatch.quantize_blocks)

    def _fill_numbers(self, seen: int) -> None:
        """Writes the numbers of the step after `seen` tokens; the host's own go along with the launches."""
        self.layers[0].numbers.lengths.fill_(seen)  # one tensor for all kinds
        for layer, (_, counts, slot, begin) in self._kinds.values():
            window = layer.sliding_window
            torch.clamp(self.leftpad, 0 if window is None else max(0, seen - window + 1), seen, out=begin)
            if isinstance(layer, KVQuantizedLayer):  # all of them hold the same tokens in blocks
                exact = layer.stored - layer.packed_tokens
                counts[0] = layer.packed_tokens
                counts[1] = exact + 1
                slot.fill_(exact)
            else:
                counts.fill_(seen + 1)
                slot.fill_(seen % layer.buffers()["k"][0].shape[2])

    def _read_leftpad(self, mask: torch.Tensor | None, batch: int, layer: KVLayer) -> None:
        """Writes `leftpad`, of a mask `(B, tokens)` or None."""
        leftpad: torch.Tensor | bool | None = None
        if mask is not None:
            fits = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[0] == batch
            leftpad = fits and left_padding(mask.bool(), layer.seen + 1, 0)
        if isinstance(leftpad, bool):
            raise ValueError(
                f"attention_mask {getattr(mask, 'shape', type(mask))}: steps in a CUDA graph take padding at the left, "
                "in a mask (B, tokens); compile_config with mode='default' takes others"
            )
        if self.leftpad.shape != (batch,):
            self.leftpad = torch.empty(batch, dtype=torch.int32, device=layer.device)
        self.leftpad.copy_(leftpad) if leftpad is not None else self.leftpad.zero_()
        self.leftpad_known = True

    @torch.inference_mode(False)
    def _prepare_buffers(self) -> None:
        """Prepares new buffers for graphs: marks their addresses as fixed, and makes every slot finite."""
        found = [pair for layer in self.cache.kv_layers for pair in layer.buffers().values()]
        if self._buffers and all(one is other for one, (other, _) in zip(self._buffers, found, strict=True)):
            return
        devices = {str(tensor.device) for tensor, _ in found}
        if len(devices) > 1:
            raise ValueError(f"CUDA graphs hold the work of one GPU, the cache lies on {', '.join(sorted(devices))}")
        for tensor, filled in found:
            tensor[:, :, filled:].zero_()  # a weight of 0 hides no NaN
        self._kinds = {}
        lengths = torch.empty_like(self.leftpad)
        self.layers = [self._part(layer, lengths) for layer in self.cache.kv_layers]
        for part in self.layers:
            for each in (part.k, part.v, *part.packed):
                if each is not None:
                    torch._dynamo.mark_static_address(each, guard=False)
        self._buffers = [tensor for tensor, _ in found]

    def _part(self, layer: KVLayer, lengths: torch.Tensor) -> Part:
        """The part of `layer`; it shares its numbers with earlier ones of its kind."""
        buffers, window = {name: tensor for name, (tensor, _) in layer.buffers().items()}, layer.sliding_window
        counts = lengths.new_empty(2)
        made = Numbers(lengths, counts, counts.new_empty(1, dtype=torch.int64), torch.empty_like(lengths))
        _, numbers = self._kinds.setdefault((type(layer), window), (layer, made))
        if not isinstance(layer, KVQuantizedLayer):
            k, v = buffers["k"], buffers["v"]
            return Part(k, v, numbers, window, k.shape[2] < self.cache.settings["max_cache_len"], [], [], [])
        packed = layer.packed(buffers["k_codes"].shape[2] * BLOCK)  # as many as there is room for
        codecs, layout = [packed.k_codec.name, packed.v_codec.name], [packed.start, packed.tokens]
        exact = buffers["exact_k"], buffers["exact_v"]
        return Part(*exact, numbers, window, False, list(packed.arrays()), codecs, layout)

    def inputs(self, decoder: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments, with positions and masks that depend on tensors alone."""
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = self.layers[0].numbers.lengths[:1, None].long()
        masks = compact_masks(decoder.config, new_tokens(kwargs), lambda sliding: self.leftpad)
        return {**kwargs, "position_ids": positions, "attention_mask": masks}


class StepHandle(Handle):
    """The handle of layer `index` in a step that a CUDA graph holds: one op stores the new token and attends."""

    def __init__(self, steps: DecodeSteps, index: int, given: Sequence[Any]):
        super().__init__(index, given)
        self._steps = steps

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
        """`rules.mask` is one that `DecodeSteps.inputs` made."""
        rules.check_inference(query)
        assert rules.mask is not None
        steps, part, window = self._steps, self._steps.layers[self._index], read_compact_mask(rules.mask)[1]
        if window != part.window:
            raise ValueError(f"layer {self._index}: the mask has a window of {window}, the cache one of {part.window}")
        tensors, scale = (part.k, part.v, query, key, value, *part.numbers), scale_of(query, rules)
        how = (rules.softcap, rules.s_aux, steps.backend)
        if part.packed:
            stored = (part.packed, part.codecs, part.layout)
            return torch.ops.hf_kvattn.append_attend_packed(*tensors, *stored, scale, *how)
        return torch.ops.hf_kvattn.append_attend(*tensors, scale, part.wraps, *how)


def new_tokens(kwargs: dict[str, Any]) -> torch.Tensor:
    """The new tokens of a forward, `(B, T)` or `(B, T, hidden)`."""
    return kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]


def compact_masks(
    config: Any, tokens: torch.Tensor, leftpad: Callable[[bool], torch.Tensor] | None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Compact masks for a decoder of `config`, as transformers would hand them to it in `create_masks_for_generate`.

    Args:
        leftpad: gives what `compact_mask` takes, for layers with a sliding window or without; None: no row is padded.
    """

    def compact(sliding: bool) -> torch.Tensor:
        rows = None if leftpad is None else leftpad(sliding)
        return compact_mask(rows, config.sliding_window if sliding else 0, tokens.shape[0], tokens.device)

    if hasattr(config, "layer_types"):  # one mask for each kind of layer, or one for all
        return {kind: compact(kind == "sliding_attention") for kind in dict.fromkeys(config.layer_types)}
    return compact(getattr(config, "sliding_window", None) is not None)
