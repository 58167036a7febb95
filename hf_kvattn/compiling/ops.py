"""`torch.compile`: the ops that stand in a graph for all that depends on how full a cache is.

While a model is traced, the hooks of `enable` put three ops into the graph: `begin` (the new tokens' positions),
`leftpad` (left padding) and `step` (append and attend). They are opaque: when the graph runs, they run the same
caches, dispatch and kernels as without it. No length is part of the graph, so it serves all of them.

With transformers' own caches, or none, the model's graph keeps what it does with them, and `attend` stands for the
attention: which backend is in force is asked when the graph runs, not when it is traced.

Each of the three ops is given the cache's ticket (`caches/tickets.py`), a tensor that stands for everything the cache
stores. It is declared to be mutated, so that no compiler reorders, repeats or leaves out what happens to the cache.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from ..attention import kvattn_attention
from ..caches.base import KVCache
from ..caches.sliding import SlidingWindowKVCache
from ..caches.tickets import cache_of
from ..masks import left_padding
from . import append_attend
from .decode_steps import DecodeSteps, compact_masks, new_tokens


def own_positions(
    cache: SlidingWindowKVCache, tokens: torch.Tensor, position_ids: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The positions at which `cache` wants the new tokens; see `SlidingWindowKVCache.positions`."""
    padded = False
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.device.type == "cpu":  # a GPU's would stall it
        padded = not mask[:, -1].all()
    return cache.positions(position_ids, tokens.shape[1], tokens.device, padded)


def _begin(
    ticket: torch.Tensor, tokens: torch.Tensor, position_ids: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """Positions `(B or 1, T)` of the new `tokens`, `(B, T)` or `(B, T, hidden)`; the time to notice a torn cache."""
    cache: KVCache = cache_of(ticket)
    cache.check_consistent_layers()
    positions = position_ids
    if isinstance(cache, SlidingWindowKVCache):
        positions = own_positions(cache, tokens, position_ids, mask)
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
    layer = next(layer for layer in cache_of(ticket).layers if layer.is_sliding is sliding)
    leftpad = left_padding(mask.bool(), *layer.get_mask_sizes(new))
    if isinstance(leftpad, bool):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)}: a compiled step takes padding at the left, in a mask over all tokens"
        )
    return torch.zeros_like(mask[:, 0], dtype=torch.int32) if leftpad is None else leftpad.to(torch.int32)


def _leftpad_fake(ticket, mask, new, sliding):
    return mask.new_empty(mask.shape[0], dtype=torch.int32)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    kv_layer: Any = None,
) -> torch.Tensor:
    """The attention of `q` over `kv_layer`, or what another cache, or none, gave: as `kvattn_attention`."""
    out, _ = kvattn_attention(
        kv_layer,
        q,
        k,
        v,
        mask,
        scaling=scaling,
        is_causal=is_causal,
        sliding_window=window,
        softcap=softcap,
        s_aux=s_aux,
        kv_layer=kv_layer,
    )
    return out


def _attend_fake(q, k, v, *rules):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _step(
    ticket: torch.Tensor, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rules: Any
) -> torch.Tensor:
    """Stores `k` and `v` in layer `layer_idx` and gives the attention of `q`, by the rules that `_attend` takes."""
    layer = cache_of(ticket).layers[layer_idx]
    layer.append(k, v)
    return _attend(q, k, v, *rules, layer)


def _step_fake(ticket, layer_idx, *arguments):
    return _attend_fake(*arguments)


_RULES = "Tensor? mask, float? scaling, bool is_causal, int? window, float? softcap, Tensor? s_aux"
_OPS: dict[str, tuple[str, Callable, Callable]] = {
    "begin": ("Tensor(a!) ticket, Tensor tokens, Tensor? position_ids, Tensor? mask", _begin, _begin_fake),
    "leftpad": (
        "Tensor(a!) ticket, Tensor mask, SymInt new, bool sliding",
        _leftpad,
        _leftpad_fake,
    ),
    "step": (
        f"Tensor(a!) ticket, int layer_idx, Tensor q, Tensor k, Tensor v, {_RULES}",
        _step,
        _step_fake,
    ),
    "attend": (f"Tensor q, Tensor k, Tensor v, {_RULES}", _attend, _attend_fake),
}


@functools.lru_cache(maxsize=1)
def register_ops() -> torch.library.Library:
    """Defines `torch.ops.hf_kvattn.*`, once; they live as long as the library that is returned."""
    library = torch.library.Library("hf_kvattn", "DEF")
    # A CUDA graph repeats what the device did once: what these ops do first is done in Python.
    unsafe = [getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)]
    for name, (arguments, run, fake) in {**_OPS, **append_attend.OPS}.items():
        library.define(f"{name}({arguments}) -> Tensor", tags=unsafe if name in _OPS else ())
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hf_kvattn::{name}", fake, lib=library)
    return library


def trace_inputs(decoder: torch.nn.Module, cache: KVCache, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a traced decoder is called with, so that nothing in the graph asks `cache` for its lengths.

    Masks that are 4-D already (`generate()` makes them before each step) stay; others become compact.
    """
    tokens = new_tokens(kwargs)
    mask, asked = kwargs.get("attention_mask"), kwargs.get("position_ids")
    plain = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    positions = torch.ops.hf_kvattn.begin(cache.ticket, tokens, asked, plain)
    if mask is None or plain is not None:

        def leftpad_of_rows(sliding: bool) -> torch.Tensor | None:
            if plain is None:
                return None
            return torch.ops.hf_kvattn.leftpad(cache.ticket, plain, tokens.shape[1], sliding)

        mask = compact_masks(decoder.config, tokens, leftpad_of_rows)
    return {**kwargs, "position_ids": positions, "attention_mask": mask}


def default_config() -> CompileConfig:
    """How `generate()` compiles where the user says nothing."""
    return CompileConfig(fullgraph=True, mode=None)  # type: ignore[arg-type]  # torch.compile takes None


def checked_config(
    config: CompileConfig, device: torch.device, cache: KVCache
) -> tuple[CompileConfig, DecodeSteps | None]:
    """A copy of `config` that compiles on every device, and the steps of `cache` where it records CUDA graphs.

    Raises:
        ValueError: a mode that records CUDA graphs, on a GPU, with a cache that they cannot hold.
    """
    steps = None
    if device.type == "cuda" and records_graphs(config):
        try:
            steps = DecodeSteps(cache)
        except ValueError as error:
            asked = f"options={config.options!r}" if config.mode is None else f"mode={config.mode!r}"
            raise ValueError(
                f"compile_config has {asked}, which records CUDA graphs: {error}. Without them, as with "
                "mode='default' or 'max-autotune-no-cudagraphs', every cache is served"
            ) from error
    config = copy.copy(config)
    config._compile_all_devices = True  # type: ignore[assignment]  # a class attribute that is None
    return config, steps


def records_graphs(config: CompileConfig) -> bool:
    """Whether a GPU's steps compiled like this are recorded as CUDA graphs."""
    return config.mode in ("reduce-overhead", "max-autotune") or bool((config.options or {}).get("triton.cudagraphs"))


def compiled_step(model: PreTrainedModel, config: CompileConfig) -> Callable:
    """`model` as a callable whose steps of one token are compiled as `config` says; longer ones (prompts) are not.

    Where the cache has `steps`, their tensors stand for it.
    """

    def step(**kwargs):
        return model(**kwargs)

    # Code of its own: dynamo keeps graphs with the code, counts them there, and would find those of other settings.
    step.__code__ = step.__code__.replace()
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    compiled = torch.compile(step, **fields)

    def call(**kwargs):
        steps = getattr(kwargs.get("past_key_values"), "steps", None)  # transformers' StaticCache has none
        if new_tokens(kwargs).shape[1] > 1:
            return model(**kwargs)
        return compiled(**kwargs) if steps is None else steps.run(compiled, model, kwargs)

    return call
