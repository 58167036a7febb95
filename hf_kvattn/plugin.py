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
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    CompileConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_masks_for_generate

from .attention import NAME, Handle, LayerHandle, kvattn_attention
from .caches.base import KVCache
from .caches.configs import check_config, layer_needs, uncompiled_kind
from .caches.quantized import QuantizedKVCache
from .caches.registry import CACHES, COMPLETE
from .compiling.decode_steps import DecodeSteps, StepHandle, new_tokens
from .compiling.ops import TracedHandle, register_ops, stream_positions, trace_inputs
from .compiling.step import checked_config, compiled_step, default_config
from .latents import LatentHandle, absorbs
from .masks import kvattn_mask
from .quant.calibration import Calibration, file_name

logger = logging.getLogger("hf_kvattn")

_STATE = "_hf_kvattn"
# What the forward of an attention module may take. Others, such as keys from elsewhere, are not known to be served.
_ARGUMENTS = frozenset(
    "hidden_states attention_mask position_embeddings position_ids past_key_values layer_past shared_kv_states "
    "cache_position use_cache output_attentions key_value_states encoder_hidden_states encoder_attention_mask "
    "kwargs".split()
)
# Types of decoders that hand masks on as they are, though transformers' flash attention does not serve them.
_HAND_MASKS_ON = frozenset({"llama4_text"})
_CACHE_NAMES = ("past_key_values", "layer_past")  # as modules call their cache; the second is GPT-NeoX's
LONG_FORWARD = 64  # tokens without a cache from which on somebody seems to measure a model

# Names in tables: they change no model. `from_pretrained(attn_implementation=...)` and pickled models look for them.
# All together: an attention function without a mask function would get no masks at all.
AttentionInterface.register(NAME, kvattn_attention)
AttentionMaskInterface.register(NAME, kvattn_mask)
register_ops()


@dataclass
class _Enabled:
    """The state of an enabled model: what `disable` needs to restore it."""

    request: tuple
    hooks: list
    implementation: str  # of attention, before
    make_cache: Callable[[PreTrainedConfig], object] | None
    ours: dict[str, Callable]  # methods that replace the model's own, on this instance
    before: dict[str, Any]  # instance attributes that they replaced
    compiled: tuple[CompileConfig, Callable] | None = None  # the last one

    def __getstate__(self) -> dict:
        return self.__dict__ | {"compiled": None}  # a copy of the model compiles for itself


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
            transformers' own. A quantized one takes its calibration (`scripts/calibrate.py`) from the folder that the
            model was loaded from, where there is one.
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
    state = getattr(model, _STATE, None)
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
    hooks.append(decoder.register_forward_pre_hook(_prepare_decoder, with_kwargs=True))
    hooks.append(decoder.register_forward_hook(_finish_decoder, with_kwargs=True))
    if quantizes:
        hooks.append(decoder.register_forward_pre_hook(_note_exact_forward, with_kwargs=True))
    ours: dict[str, Callable] = {"generate": _generate}
    if compile:
        ours |= {"get_compiled_call": _get_compiled_call, "create_masks_for_generate": _create_masks_for_generate}
    before = {name: model.__dict__[name] for name in ours if name in model.__dict__}
    setattr(model, _STATE, _Enabled(request, hooks, implementation, make_cache, ours, before))
    # Not bound methods: a model is pickled with what is in its `__dict__`.
    model.__dict__.update({name: functools.partial(function, model) for name, function in ours.items()})
    return whole


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `enable` and nothing else: what was set on the model since stays. Without `enable` it does nothing."""
    base = _base_model(model)
    state = base.__dict__.pop(_STATE, None)
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
    before = getattr(_base_model(model), _STATE, None) if is_enabled(model) else None
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
    return hasattr(base, _STATE) and _implementation(base.get_decoder()) == NAME


def _base_model(model: Any) -> Any:
    """The transformers model in a peft model, which need not be installed; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach_cache(module: torch.nn.Module, args: tuple, kwargs: dict, absorbing: bool = False):
    """The hook before an attention module's forward: puts the layer's handle in the place of one of our caches.

    Args:
        absorbing: whether `latents.absorbs(module)`.
    """
    name = "past_key_values" if "past_key_values" in kwargs else "layer_past"
    cache = kwargs.get(name)
    # Another implementation, set by the user after `enable`, needs the dense tensors that the cache itself returns.
    if not isinstance(cache, (KVCache, DecodeSteps)) or _implementation(module) != NAME:
        return None
    n_layers = module.config.num_hidden_layers  # type: ignore[union-attr]  # fewer than modules in an early-exit draft
    if len(cache.layers) != n_layers:
        raise ValueError(
            f"the cache has {len(cache.layers)} layers, the model {n_layers}: it belongs to another model's config"
        )
    index = int(module.layer_idx)  # type: ignore[arg-type]  # nn.Module attributes are typed Tensor | Module
    handle: Handle
    given = (*args, *kwargs.values())
    if isinstance(cache, KVCache) and index in cache.latent_layers:
        if absorbing:
            handle = LatentHandle(cache, index, given)
        elif cache.layer(index).forces_window:
            raise ValueError(f"layer {index}: a window is forced on latents only where plain weights expand them")
        else:
            return None  # the module computes keys and values of all tokens from what the cache returns
    elif isinstance(cache, DecodeSteps):
        handle = StepHandle(cache, index, given)
    elif torch.compiler.is_compiling():
        handle = TracedHandle(cache, index, given)
    else:
        handle = LayerHandle(cache, index, given)
    return args, {**kwargs, name: handle, "kv_handle": handle}


def check_attended(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """The hook after an attention module's forward: ValueError where the handle's tokens got no attention."""
    handle = kwargs.get("kv_handle")
    if handle is not None and not handle.attended:
        raise handle.refusal(module)


def _prepare_decoder(decoder: torch.nn.Module, args: tuple, kwargs: dict):
    """The hook before the decoder's forward: positions and masks where the cache, not the model, knows them.

    Positions of an endless stream are the cache's: the model's would leave what it was trained on.
    """
    if args:
        kwargs, args = {**inspect.signature(decoder.forward).bind(*args, **kwargs).arguments}, ()
        kwargs |= kwargs.pop("kwargs", {})
    cache = kwargs.get("past_key_values")
    if isinstance(cache, DecodeSteps):
        if _implementation(decoder) != NAME:
            raise ValueError(
                f"attention implementation {_implementation(decoder)!r}, set after enable(), has no steps for a CUDA "
                f"graph, as {NAME!r} has; generate(disable_compile=True) does without them"
            )
        return args, cache.inputs(decoder, kwargs)
    if not isinstance(cache, KVCache) or _implementation(decoder) != NAME:
        return None
    if kwargs.get("return_shared_kv_states"):
        raise ValueError("return_shared_kv_states: keys and values of all tokens are not at hand, the cache holds them")
    if torch.compiler.is_compiling():
        return args, trace_inputs(decoder, cache, kwargs)
    cache.begin_forward(new_tokens(kwargs).shape[0])
    if not cache.counts_positions:
        return None
    positions = stream_positions(cache, new_tokens(kwargs), kwargs.get("position_ids"), kwargs.get("attention_mask"))
    return args, {**kwargs, "position_ids": positions}


def _finish_decoder(decoder: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """The hook after the decoder's forward."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, KVCache) and not torch.compiler.is_compiling():
        cache.end_forward()


def _note_exact_forward(decoder: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """A hook before the decoder's forward, where `generate()` quantizes: says once that a long forward does not."""
    alone = not args and kwargs.get("past_key_values") is None and not torch.is_grad_enabled()
    if alone and not torch.compiler.is_compiling() and new_tokens(kwargs).shape[1] > LONG_FORWARD:
        _log_once(
            f"a forward of more than {LONG_FORWARD} tokens without past_key_values: enable(cache=) is for generate(); "
            "what is measured here is not its quantized cache, as hf-kvattn perplexity measures it"
        )


def _implementation(module: torch.nn.Module) -> str | None:
    return getattr(module.config, "_attn_implementation", None)


def _generate(model, *args, **kwargs):
    """`generate()` of an enabled model: with a fresh cache if it gets none and asks for no other kind, and compiled.

    Raises:
        ValueError: a prompt that cannot go on from the cache.
    """
    state: _Enabled = getattr(model, _STATE)
    inputs, in_place = (*args, None, None)[:2]
    cache = kwargs.get("past_key_values")
    _check_prompt(cache, kwargs.get("input_ids", kwargs.get("inputs", inputs)), kwargs)
    # What `generate()` is going to make of its arguments and of the model's defaults.
    config, _ = model._prepare_generation_config(**{"generation_config": in_place, **kwargs})
    if state.make_cache is not None and cache is None:
        if config.cache_implementation is None and config.use_cache is not False:
            kwargs["past_key_values"] = cache = state.make_cache(model.config)
            if config.is_assistant and isinstance(cache, KVCache):  # as transformers does with caches that it makes
                cache.activate_past_recording()
        else:
            asked = f"cache_implementation={config.cache_implementation!r}, use_cache={config.use_cache!r}"
            _log_once(f"generate() does not use the cache that enable() was given: it runs with {asked}")
    generate = state.before.get("generate") or functools.partial(type(model).generate, model)
    if "get_compiled_call" not in state.ours or not isinstance(cache, KVCache):
        with _whole_after_errors(model):
            return generate(*args, **kwargs)
    wish = config.compile_config or model.generation_config.compile_config or default_config()
    kwargs["compile_config"], cache.steps = checked_config(wish, model.device, cache)
    cache.is_compileable = True
    try:
        with _whole_after_errors(model):
            return generate(*args, **kwargs)
    finally:
        cache.is_compileable, cache.steps = False, None


@contextlib.contextmanager
def _whole_after_errors(model: PreTrainedModel) -> Iterator[None]:
    """Undoes an early exit that raised: transformers leaves the model with the layers of its draft alone."""
    decoder = model.config.get_text_config(decoder=True)
    layers = decoder.num_hidden_layers
    try:
        yield
    except BaseException:
        decoder.num_hidden_layers = layers
        raise


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


@functools.lru_cache(maxsize=64)
def _log_once(message: str) -> None:
    logger.warning(message)


def _create_masks_for_generate(model, *args, **kwargs):
    """Called by `generate()` before each forward. Steps in a CUDA graph make their own masks from tensors."""
    steps = getattr(kwargs.get("past_key_values"), "steps", None)
    if steps is not None and kwargs["inputs_embeds"].shape[1] == 1:
        if kwargs.get("is_first_iteration"):  # a part of a prompt: what comes may be padded otherwise
            steps.leftpad_known = False
        return kwargs["attention_mask"]
    own = inspect.getattr_static(type(model), "create_masks_for_generate", None)
    make_masks = create_masks_for_generate if own is None else own.__get__(model)
    return make_masks(*args, **kwargs)


def _get_compiled_call(model, compile_config: CompileConfig | None) -> Callable:
    """Replaces transformers' own: `disable` drops what is compiled, and copies of the model do not share it."""
    state: _Enabled = getattr(model, _STATE)
    config = compile_config or default_config()
    if state.compiled is None or state.compiled[0] != config:
        state.compiled = (config, compiled_step(model, config))
    return state.compiled[1]


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


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model's attention modules, one a layer that has keys and values; ValueError where it cannot be served."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"enable() takes a transformers PreTrainedModel, got {type(model).__name__}")
    check_config(model.config)
    name, needs = type(model).__name__, layer_needs(model.config.get_text_config(decoder=True))
    if own := [
        each.__name__ for each in vars(sys.modules[type(model).__module__]).values() if _is_own_cache(each, model)
    ]:
        raise ValueError(f"{name} has a cache class of its own, {own[0]}, and takes no other")
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name} does not use transformers' attention interface")
    modules = [m for m in model.modules() if _is_cached_attention(m)]
    expected = [i for i, need in enumerate(needs) if need.keys or need.lender is not None]
    if any(m.layer_idx is None for m in modules):
        raise ValueError(f"{name}: one attention module serves several layers ({type(modules[0]).__name__})")
    if sorted(int(m.layer_idx) for m in modules) != expected:  # type: ignore[arg-type]  # as above
        kinds = ", ".join(sorted({type(m).__name__ for m in modules})) or "none"
        raise ValueError(
            f"{name}: {len(modules)} modules take a cache, not one for each of {len(expected)} layers: {kinds}"
        )
    if unknown := {each for m in modules for each in inspect.signature(m.forward).parameters} - _ARGUMENTS:
        raise ValueError(f"{name}: its attention takes {sorted(unknown)}, which is not known here")
    hands_on = model.config.get_text_config(decoder=True).model_type in _HAND_MASKS_ON
    if not (hands_on or getattr(model.get_decoder(), "_supports_flash_attn", False)):  # it may calculate with masks
        raise ValueError(f"{name}: its attention needs dense masks, transformers says (_supports_flash_attn=False)")
    numbered = [m for m in model.modules() if hasattr(m, "layer_idx")]
    keeping = {m.layer_idx for m in numbered if _takes(m, *_CACHE_NAMES, "cache_params")}
    if elsewhere := [i for i, need in enumerate(needs) if need.states and i not in keeping]:
        raise ValueError(f"{name}: layers {elsewhere} keep their states elsewhere than in a cache")
    for module in modules:
        need = needs[int(module.layer_idx)]  # type: ignore[arg-type]  # as above
        if need.latent is None and getattr(module, "head_dim", need.dim) != need.dim:
            found = f"layer {module.layer_idx} has heads of {module.head_dim}"
            raise ValueError(f"{name}: {found}, its config says {need.dim}")
    return modules


def _is_own_cache(thing: Any, model: PreTrainedModel) -> bool:
    return isinstance(thing, type) and issubclass(thing, Cache) and thing.__module__ == type(model).__module__


def _is_cached_attention(module: torch.nn.Module) -> bool:
    if not hasattr(module, "layer_idx") or not hasattr(module, "scaling") or not _takes(module, *_CACHE_NAMES):
        return False
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())


def _takes(module: torch.nn.Module, *names: str) -> bool:
    return any(name in inspect.signature(module.forward).parameters for name in names)


def _use_private_configs(model: PreTrainedModel) -> None:
    """Replaces the model's config and its parts by private copies, in every module."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            module.config = copies.get(id(config), config)
