"""`generate()` of an enabled model: with a fresh cache where it gets none, and compiled if `enable` was told so."""

from __future__ import annotations

import functools
import gc
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate as stock_masks_for_generate
from transformers.utils import logging

from .caches.base import KVCache
from .caches.configs import head_shares
from .compiling.step import checked_config, compiled_step, default_config

logger = logging.get_logger("hf_kvattn")

STATE = "_hf_kvattn"  # the attribute of an enabled model that holds its `Enabled`


@dataclass
class Enabled:
    """The state of an enabled model: what `disable` needs to restore it."""

    request: tuple
    hooks: list
    implementation: str  # of attention, before
    make_cache: Callable[[PreTrainedConfig], object] | None
    ours: dict[str, Callable]  # methods that replace the model's own, on this instance
    before: dict[str, Any]  # instance attributes that they replaced
    compiled: tuple[CompileConfig, Callable] | None = None  # the last one
    # The layers of one cache at most that `generate()` made for steps in a CUDA graph, and that is gone; its kind.
    idle: list[tuple[tuple, list]] = field(default_factory=list)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"compiled": None, "idle": []}  # a copy of the model compiles for itself

    def adopt_idle(self, cache: KVCache) -> None:
        """Gives an unused `cache` the layers of an idle one of its kind: where it lay, nothing is recorded anew.

        For another batch size or dtype the layers allocate other buffers.
        """
        if self.idle and not any(layer.is_initialized for layer in cache.kv_layers):
            kind, layers = self.idle.pop()
            if kind == _kind(cache):
                cache.layers = layers
                cache._sort_layers()


def _kind(cache: KVCache) -> tuple:
    return type(cache), cache.settings, cache.fingerprint


def generate(model, *args, **kwargs):
    """`generate()` of an enabled model: with a fresh cache if it gets none and asks for no other kind, and compiled.

    Raises:
        ValueError: a prompt that cannot go on from the cache; processes of a tensor-parallel model with unlike caches.
    """
    state: Enabled = getattr(model, STATE)
    inputs, in_place = (*args, None, None)[:2]
    cache, made = kwargs.get("past_key_values"), None
    _check_prompt(cache, kwargs.get("input_ids", kwargs.get("inputs", inputs)), kwargs)
    # What `generate()` is going to make of its arguments and of the model's defaults.
    config, _ = model._prepare_generation_config(**{"generation_config": in_place, **kwargs})
    if state.make_cache is not None and cache is None:
        if config.cache_implementation is None and config.use_cache is not False:
            kwargs["past_key_values"] = cache = made = state.make_cache(model.config)
            if config.is_assistant and isinstance(cache, KVCache):  # as transformers does with caches that it makes
                cache.activate_past_recording()
        else:
            asked = f"cache_implementation={config.cache_implementation!r}, use_cache={config.use_cache!r}"
            logger.warning_once(f"generate() does not use the cache that enable() was given: it runs with {asked}")
    _check_processes(model, cache)
    stock = state.before.get("generate") or functools.partial(type(model).generate, model)
    compiling = cache if "get_compiled_call" in state.ours and isinstance(cache, KVCache) else None
    steps, compiled = None, state.compiled
    if compiling is not None:
        wish = config.compile_config or model.generation_config.compile_config or default_config()
        kwargs["compile_config"], compiling.steps = checked_config(wish, model.device, compiling)
        compiling.is_compileable, steps = True, compiling.steps
        if steps is not None and compiling is made:
            state.adopt_idle(compiling)
    decoder = model.config.get_text_config(decoder=True)
    layers = decoder.num_hidden_layers
    try:
        out = stock(*args, **kwargs)
    finally:
        decoder.num_hidden_layers = layers  # an early exit that raised leaves those of its draft alone
        if compiling is not None:
            compiling.is_compileable, compiling.steps = False, None
        if steps is not None:
            steps.close()
    if steps is not None and compiling is made and compiling is not None:
        kind, kept, alive = _kind(compiling), compiling.layers, weakref.ref(compiling)
        del kwargs["past_key_values"], cache, made, compiling
        if alive() is not None and compiled is not state.compiled:
            gc.collect()  # a compiler leaves frames behind that hold the cache
        if alive() is None:  # nobody kept it, neither in `out` nor where it was made
            for layer in kept:
                layer.reset()
            state.idle[:] = [(kind, kept)]
    return out


def _check_prompt(cache: Any, ids: Any, kwargs: dict) -> None:
    """Refuses token ids that do not go on from what `cache` holds, as far as lengths and the cache itself can tell."""
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or kwargs.get("inputs_embeds") is not None:
        return
    if cache is not None and not isinstance(cache, KVCache):
        return
    seen, given, mask = 0, ids.shape[1], kwargs.get("attention_mask")
    if cache is not None:
        cache.check_consistent_layers()
        seen = cache.get_seq_length()
    total = mask.shape[1] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else given
    whole = total == given and (given > seen or not seen)
    if not whole and total != seen + given:
        raise ValueError(
            "generate() takes the whole prompt, with the tokens that the cache holds, or new tokens with an attention "
            f"mask over all; got {given} input_ids, a mask over {total}, and past_key_values with {seen} tokens"
        )
    if whole and cache is not None:
        cache.check_prompt(ids)


def _check_processes(model: Any, cache: Any) -> None:
    """Raises ValueError, in every process of a tensor-parallel model, where their caches are not alike.

    Found half way, one process would raise while the others wait for its part of a layer.
    """
    shares, mesh = head_shares(model.config), getattr(model, "_device_mesh", None)
    if shares == 1 or mesh is None:
        return
    own = type(cache).__name__
    if isinstance(cache, KVCache):
        own += f" of {cache.get_seq_length()} tokens, {cache.settings}"
    found = [own] * shares
    torch.distributed.all_gather_object(found, own, (mesh["tp"] if mesh.mesh_dim_names else mesh).get_group())
    if len(set(found)) > 1:
        raise ValueError(f"processes of a tensor-parallel model generate with caches that are not alike: {found}")


def create_masks_for_generate(model, *args, **kwargs):
    """Called by `generate()` before each forward. Steps in a CUDA graph make their own masks from tensors."""
    steps = getattr(kwargs.get("past_key_values"), "steps", None)
    if steps is not None and kwargs["inputs_embeds"].shape[1] == 1:
        if kwargs.get("is_first_iteration"):  # a part of a prompt: what comes may be padded otherwise
            steps.leftpad_known = False
        return kwargs["attention_mask"]
    own = inspect.getattr_static(type(model), "create_masks_for_generate", None)
    make_masks = stock_masks_for_generate if own is None else own.__get__(model)
    return make_masks(*args, **kwargs)


def get_compiled_call(model, compile_config: CompileConfig | None) -> Callable:
    """Replaces transformers' own: `disable` drops what is compiled, and copies of the model do not share it."""
    state: Enabled = getattr(model, STATE)
    config = compile_config or default_config()
    if state.compiled is None or state.compiled[0] != config:
        logger.warning(
            "the first decode step is being compiled: a minute or so where this machine has not compiled it before, "
            "some seconds where it has"
        )
        state.compiled = (config, compiled_step(model, config))
    return state.compiled[1]
