"""Reads from a model's config what its layers keep: KV heads, head_dim, sliding windows; refuses other models."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs


def kv_shape(decoder: PreTrainedConfig) -> tuple[int | None, int | None]:
    """KV heads and head_dim of a decoder's config; None where it does not say."""
    heads = getattr(decoder, "num_key_value_heads", None) or getattr(decoder, "num_attention_heads", None)
    dim = getattr(decoder, "head_dim", None)
    if dim is None and hasattr(decoder, "hidden_size") and hasattr(decoder, "num_attention_heads"):
        dim = decoder.hidden_size // decoder.num_attention_heads
    return heads, dim


def native_windows(decoder: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer of a decoder's config, None for full attention."""
    layer_types, kwargs = get_layer_types_and_kwargs(decoder)
    if isinstance(kwargs, dict):  # transformers 5.17: one dict for all layers
        kwargs = [kwargs] * len(layer_types)
    pairs = zip(layer_types, kwargs, strict=True)
    return [each["sliding_window"] if kind == "sliding_attention" else None for kind, each in pairs]


def fingerprint(decoder: PreTrainedConfig) -> dict[str, Any]:
    """A copy of what the meaning of cached keys and values depends on in a decoder's config."""
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "rope_parameters")
    heads, dim = kv_shape(decoder)
    shapes = {"num_key_value_heads": heads, "head_dim": dim, "sliding_windows": native_windows(decoder)}
    return copy.deepcopy({name: getattr(decoder, name, None) for name in names} | shapes)


def check_config(config: PreTrainedConfig) -> None:
    """Raises ValueError, with the reason, for models whose attention keeps other things than plain keys and values."""
    name = getattr(config, "model_type", type(config).__name__)
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "is_heterogeneous", False):  # first: what differs by layer cannot be read below
        raise ValueError(f"{name}: layers whose shapes differ (config.per_layer_config) are not supported")
    if not hasattr(decoder, "num_hidden_layers"):
        raise ValueError(f"{name}: models that are not one stack of layers (num_hidden_layers) are not supported")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: encoder-decoder models are not supported (cross-attention has a cache of its own)")
    if getattr(decoder, "kv_lora_rank", None):
        raise ValueError(
            f"{name}: multi-head latent attention (kv_lora_rank={decoder.kv_lora_rank}) is not supported: it caches "
            "latents, not keys and values"
        )
    if (width := getattr(decoder, "v_head_dim", None)) not in (None, kv_shape(decoder)[1]):
        raise ValueError(f"{name}: values of another width than keys are not supported (v_head_dim={width})")
    shared = getattr(decoder, "num_kv_shared_layers", None)
    modes = getattr(decoder, "kv_sharing_modes", None) or ()
    if shared or any(mode == "reuse" for mode in modes):
        raise ValueError(f"{name}: layers that share another layer's KV cache are not supported ({shared or modes})")
    layer_types, _ = get_layer_types_and_kwargs(decoder)
    if other := sorted(set(layer_types) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"{name}: layer types {other} are not supported, only full and sliding attention")
