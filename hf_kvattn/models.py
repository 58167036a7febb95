"""Which models can be enabled: their attention modules, one a layer that has keys and values, or why not."""

from __future__ import annotations

import inspect
import sys

import torch
from transformers import Cache, PreTrainedModel

from .caches.configs import check_config, layer_needs

CACHE_NAMES = ("past_key_values", "layer_past")  # as modules call their cache; the second is GPT-NeoX's
# What the forward of an attention module may take. Others, such as keys from elsewhere, are not known to be served.
_ARGUMENTS = frozenset(
    "hidden_states attention_mask position_embeddings position_ids past_key_values layer_past shared_kv_states "
    "cache_position use_cache output_attentions key_value_states encoder_hidden_states encoder_attention_mask "
    "kwargs".split()
)
# Types of decoders that hand masks on as they are, though transformers' flash attention does not serve them.
_HAND_MASKS_ON = frozenset({"llama4_text"})


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model's attention modules, one a layer that has keys and values; ValueError where it cannot be served."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"enable() takes a transformers PreTrainedModel, got {type(model).__name__}")
    check_config(model.config)
    name, needs = type(model).__name__, layer_needs(model.config.get_text_config(decoder=True))
    classes = [each for each in vars(sys.modules[type(model).__module__]).values() if inspect.isclass(each)]
    for own in classes:
        if issubclass(own, Cache) and own.__module__ == type(model).__module__:
            raise ValueError(f"{name} has a cache class of its own, {own.__name__}, and takes no other")
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
    keeping = {m.layer_idx for m in numbered if _takes(m, *CACHE_NAMES, "cache_params")}
    if elsewhere := [i for i, need in enumerate(needs) if need.states and i not in keeping]:
        raise ValueError(f"{name}: layers {elsewhere} keep their states elsewhere than in a cache")
    for module in modules:
        need = needs[int(module.layer_idx)]  # type: ignore[arg-type]  # as above
        if need.latent is None and getattr(module, "head_dim", need.dim) != need.dim:
            found = f"layer {module.layer_idx} has heads of {module.head_dim}"
            raise ValueError(f"{name}: {found}, its config says {need.dim}")
    return modules


def _is_cached_attention(module: torch.nn.Module) -> bool:
    if not hasattr(module, "layer_idx") or not hasattr(module, "scaling") or not _takes(module, *CACHE_NAMES):
        return False
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())


def _takes(module: torch.nn.Module, *names: str) -> bool:
    return any(name in inspect.signature(module.forward).parameters for name in names)
