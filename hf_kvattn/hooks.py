"""The hooks that `enable` puts on a model: before and after each attention module, and around its decoder."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.utils import logging

from .attention import NAME, Handle, LayerHandle
from .caches.base import KVCache
from .compiling.decode_steps import DecodeSteps, StepHandle, new_tokens
from .compiling.ops import TracedHandle, stream_positions, trace_inputs
from .latents import LatentHandle, is_plain
from .paged import PagedHandle, batch_inputs

logger = logging.get_logger("hf_kvattn")

LONG_FORWARD = 64  # tokens without a cache from which on somebody seems to measure a model


def attach_cache(module: torch.nn.Module, args: tuple, kwargs: dict, absorbing: bool = False):
    """The hook before an attention module's forward: puts the layer's handle in the place of one of our caches.

    Args:
        absorbing: whether `latents.absorbs(module)`, when it was enabled.
    """
    handle: Handle
    if (batch := kwargs.get("kv_batch")) is not None:
        handle = PagedHandle(int(module.layer_idx), batch)  # type: ignore[arg-type]  # as below
        return args, {name: given for name, given in kwargs.items() if name != "kv_batch"} | {"kv_handle": handle}
    name = "past_key_values" if "past_key_values" in kwargs else "layer_past"
    cache = kwargs.get(name)
    if not isinstance(cache, (KVCache, DecodeSteps)):
        return None
    compiling = torch.compiler.is_compiling()
    if compiling or cache.checked_config is not module.config:
        # Another implementation, set by the user after `enable`, needs the dense tensors that the cache itself returns.
        if implementation_of(module) != NAME:
            return None
        if not compiling:  # which the decoder's hook does in a trace: each look at a config takes long there
            _check_layers(cache, module)
        if not compiling and isinstance(cache, KVCache):
            cache.checked_config = module.config  # for the layers to come of this forward
    index = int(module.layer_idx)  # type: ignore[arg-type]  # nn.Module attributes are typed Tensor | Module
    given = (*args, *kwargs.values())
    if isinstance(cache, KVCache) and index in cache.latent_layers:
        if absorbing and is_plain(module):
            handle = LatentHandle(cache, index, given, module)
        elif cache.layer(index).forces_window:
            raise ValueError(f"layer {index}: a window is forced on latents only where plain weights expand them")
        else:
            return None  # the module computes keys and values of all tokens from what the cache returns
    elif isinstance(cache, DecodeSteps):
        handle = StepHandle(cache, index, given)
    elif compiling:
        handle = TracedHandle(cache, index, given)
    else:
        handle = LayerHandle(cache, index, given)
    return args, {**kwargs, name: handle, "kv_handle": handle}


def check_attended(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """The hook after an attention module's forward: ValueError where the handle's tokens got no attention."""
    handle = kwargs.get("kv_handle")
    if handle is not None and not handle.attended:
        raise handle.refusal(module)


def prepare_decoder(decoder: torch.nn.Module, args: tuple, kwargs: dict):
    """The hook before the decoder's forward: positions and masks where the cache, not the model, knows them.

    Positions of an endless stream are the cache's: the model's would leave what it was trained on.
    """
    kwargs, args = _by_name(decoder, args, kwargs), ()
    cache = kwargs.get("past_key_values")
    if isinstance(cache, DecodeSteps):
        if implementation_of(decoder) != NAME:
            raise ValueError(
                f"attention implementation {implementation_of(decoder)!r}, set after enable(), has no steps for a CUDA "
                f"graph, as {NAME!r} has; generate(disable_compile=True) does without them"
            )
        return args, cache.inputs(decoder, kwargs)
    compiling = torch.compiler.is_compiling()
    if isinstance(cache, KVCache) and not compiling:
        cache.checked_config = None
    if implementation_of(decoder) != NAME:
        return None
    if "read_index" in kwargs:
        return args, batch_inputs(kwargs)
    if not isinstance(cache, KVCache):
        return None
    if kwargs.get("return_shared_kv_states"):
        raise ValueError("return_shared_kv_states: keys and values of all tokens are not at hand, the cache holds them")
    if compiling:
        _check_layers(cache, decoder)
        return args, trace_inputs(decoder, cache, kwargs)
    cache.begin_forward(new_tokens(kwargs).shape[0])
    if not cache.counts_positions:
        return None
    positions = stream_positions(cache, new_tokens(kwargs), kwargs.get("position_ids"), kwargs.get("attention_mask"))
    return args, {**kwargs, "position_ids": positions}


def finish_decoder(decoder: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """The hook after the decoder's forward."""
    cache = _by_name(decoder, args, kwargs).get("past_key_values")
    if isinstance(cache, KVCache) and not torch.compiler.is_compiling():
        cache.end_forward()


def note_exact_forward(decoder: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """A hook before the decoder's forward, where `generate()` quantizes: says once that a long forward does not."""
    alone = not args and kwargs.get("past_key_values") is None and not torch.is_grad_enabled()
    if alone and not torch.compiler.is_compiling() and new_tokens(kwargs).shape[1] > LONG_FORWARD:
        logger.warning_once(
            f"a forward of more than {LONG_FORWARD} tokens without past_key_values: enable(cache=) is for generate(); "
            "what is measured here is not its quantized cache, as hf-kvattn perplexity measures it"
        )


def _by_name(module: torch.nn.Module, args: tuple, kwargs: dict) -> dict:
    """All arguments of a module's forward by their names."""
    if not args:
        return kwargs
    named = {**inspect.signature(module.forward).bind(*args, **kwargs).arguments}
    return named | named.pop("kwargs", {})


def _check_layers(cache: KVCache | DecodeSteps, module: torch.nn.Module) -> None:
    n_layers = module.config.num_hidden_layers  # type: ignore[union-attr]  # fewer than modules in an early-exit draft
    if len(cache.layers) != n_layers:
        raise ValueError(
            f"the cache has {len(cache.layers)} layers, the model {n_layers}: it belongs to another model's config"
        )


def implementation_of(module: torch.nn.Module) -> str | None:
    return getattr(module.config, "_attn_implementation", None)
