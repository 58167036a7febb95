"""`enable` and `disable`: the door between a transformers model and this package.

transformers calls `past_key_values.update(k, v, layer_idx)` inside an attention module, and hands the result to the
attention function, which never sees the cache. `enable` puts a forward pre-hook on each attention module. When the
cache is one of ours, the hook puts the layer's handle in its place and hands the same handle on as `kv_handle`, through
the module's keyword arguments, to our attention function. No forward is copied and no state is global. With any other
cache, or none, the hook does nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from .attention import NAME, kvattn_attention
from .caches.configs import uncompiled_kind
from .caches.quantized import QuantizedKVCache
from .caches.registry import CACHES, COMPLETE
from .compiling.ops import register_ops
from .generation import STATE, Enabled, create_masks_for_generate, generate, get_compiled_call
from .hooks import attach_cache, check_attended, finish_decoder, implementation_of, note_exact_forward, prepare_decoder
from .latents import absorbs
from .machine import warn_of_slow_weights
from .masks import kvattn_mask
from .models import attention_modules
from .paged import init_continuous_batching
from .quant.calibration import Calibration, file_name

logger = logging.getLogger("hf_kvattn")

# Names in tables: they change no model. `from_pretrained(attn_implementation=...)` and pickled models look for them.
# All together: an attention function without a mask function would get no masks at all.
AttentionInterface.register(NAME, kvattn_attention)
AttentionMaskInterface.register(NAME, kvattn_mask)
register_ops()


def enable(
    model: PreTrainedModel, cache: str | Callable[[PreTrainedConfig], object] | None = None, compile: bool = False
) -> PreTrainedModel:
    """Switches `model` to this package's attention; returns `model`.

    Changes this model only: its config is replaced by a private copy, so that another model built from the same config
    object is not affected. Calling it again with other arguments replaces the first call.

    Args:
        model: a decoder-only transformers model whose attention goes through `AttentionInterface`, or a peft model of
            one.
        cache: what a `generate()` that passes no cache gets, a fresh one each time: a name of
            `caches.registry.COMPLETE` (`"static"`, `"int8"`, `"int4"`...), a callable `config -> Cache`, or None for
            transformers' own. `"int8"`, `"int4"`, `"int3"` and `"int2"` take their calibration (`scripts/calibrate.py`)
            from the folder that the model was loaded from, where there is one.
        compile: whether `generate()` compiles its steps of one token, on every device, when it runs with one of this
            package's caches: as its `compile_config` says, else as `compiling.step.default_config()`. The first step of
            a model and batch size then takes a minute or so.

    Raises:
        ValueError: an unsupported model or one that `cache` does not fit, with the reason, an unknown cache name, or a
            calibration that is broken or was made for another model.
    """
    if type(compile) is not bool:
        raise ValueError(f"compile must be True or False, got {compile!r}")
    whole, model = model, _base_model(model)
    modules = attention_modules(model)
    request = (cache, compile)
    state = getattr(model, STATE, None)
    if state is not None and state.request == request and is_enabled(model):
        return whole
    if compile and (obstacle := uncompiled_kind(model.config.get_text_config(decoder=True))):
        raise ValueError(f"{type(model).__name__}: compile=True does not serve {obstacle}; compile=False does")
    make_cache = _cache_maker(model, cache)
    # Of a name: made once, so that what does not fit is refused now rather than in `generate()`.
    quantizes = isinstance(cache, str) and isinstance(make_cache(model.config), QuantizedKVCache)
    if state is None:
        _use_private_configs(model)
    disable(model)
    decoder, config = model.get_decoder(), model.config.get_text_config(decoder=True)
    implementation, config._attn_implementation = config._attn_implementation, NAME
    hooks = []
    for module in modules:
        attach = functools.partial(attach_cache, absorbing=True) if absorbs(module) else attach_cache
        hooks.append(module.register_forward_pre_hook(attach, with_kwargs=True))
    hooks += [m.register_forward_hook(check_attended, with_kwargs=True) for m in modules]
    hooks.append(decoder.register_forward_pre_hook(prepare_decoder, with_kwargs=True))
    hooks.append(decoder.register_forward_hook(finish_decoder, with_kwargs=True))
    if quantizes:
        hooks.append(decoder.register_forward_pre_hook(note_exact_forward, with_kwargs=True))
    batching = functools.partial(init_continuous_batching, implementation=implementation, cache=cache, compile=compile)
    ours: dict[str, Callable] = {"generate": generate, "init_continuous_batching": batching}
    if compile:
        ours |= {"get_compiled_call": get_compiled_call, "create_masks_for_generate": create_masks_for_generate}
    before = {name: model.__dict__[name] for name in ours if name in model.__dict__}
    setattr(model, STATE, Enabled(request, hooks, implementation, make_cache, ours, before))
    if not compile:
        warn_of_slow_weights(model)
    # Not bound methods: a model is pickled with what is in its `__dict__`.
    model.__dict__.update({name: functools.partial(function, model) for name, function in ours.items()})
    return whole


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `enable` and nothing else: what was set on the model since stays. Without `enable` it does nothing."""
    base = _base_model(model)
    state = base.__dict__.pop(STATE, None)
    if state is None:
        return model
    for hook in state.hooks:
        hook.remove()
    config = base.config.get_text_config(decoder=True)
    if config._attn_implementation == NAME:
        config._attn_implementation = state.implementation
    for name in state.ours:
        del base.__dict__[name]
    base.__dict__.update(state.before)
    return model


@contextlib.contextmanager
def enabled(model: PreTrainedModel, cache=None, compile: bool = False) -> Iterator[PreTrainedModel]:
    """`enable` for the body of a `with`; afterwards the model is enabled by an earlier call, or not, as it was."""
    before = getattr(_base_model(model), STATE, None) if is_enabled(model) else None
    enable(model, cache, compile)
    try:
        yield model
    finally:
        if before is None:
            disable(model)
        else:
            enable(model, *before.request)


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether `enable` is in force; False too where another attention implementation has been set since."""
    base = _base_model(model)
    return hasattr(base, STATE) and implementation_of(base.get_decoder()) == NAME


def new_cache(model: PreTrainedModel) -> Any:
    """The fresh cache that a `generate()` which passes none gets; None where it gets transformers' own."""
    base = _base_model(model)
    state = getattr(base, STATE, None)
    return None if state is None or state.make_cache is None else state.make_cache(base.config)


def _base_model(model: Any) -> Any:
    """The transformers model in a peft model, which need not be installed; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _cache_maker(model: PreTrainedModel, cache: Any) -> Any:
    """What makes a cache for each `generate()`: of a name, with its calibration if the model's folder holds one."""
    if cache is None or callable(cache):
        return cache
    if cache not in COMPLETE:
        raise ValueError(f"unknown cache {cache!r}; known: {', '.join(COMPLETE)}, or a callable config -> Cache")
    path = Path(model.name_or_path or "", file_name(cache))
    if CACHES[cache].calibrated and model.name_or_path and path.is_file():
        calibration = Calibration.load(path)
        logger.info("%s caches follow %s: %.2f bits a number", cache, path, calibration.bits_per_element)
        return functools.partial(QuantizedKVCache, calibration=calibration)
    return CACHES[cache]


def _use_private_configs(model: PreTrainedModel) -> None:
    """Replaces the model's config and its parts by private copies, in every module."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            module.config = copies.get(id(config), config)
