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


def local_kv_heads(config: PreTrainedConfig, heads: int | None) -> int | None:
    """Of `heads` KV heads, those that one rank has where tensor parallelism divides them; None if not evenly."""
    parallel = getattr(config, "distributed_config", None)
    ranks = getattr(parallel, "tp_size", None) or 1
    plan = getattr(parallel, "tp_plan", None)
    plan = plan if isinstance(plan, dict) else config.get_text_config(decoder=True).base_model_tp_plan or {}
    keys = ("k_proj", "qkv_proj", "query_key_value")  # as transformers tells them
    if heads is None or not any(name.endswith(keys) and how == "colwise" for name, how in plan.items()):
        return heads
    return heads // ranks if heads % ranks == 0 else None


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
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: encoder-decoder models are not supported (cross-attention has a cache of its own)")
    if getattr(decoder, "kv_lora_rank", None):
        raise ValueError(
            f"{name}: multi-head latent attention (kv_lora_rank={decoder.kv_lora_rank}) is not supported: it caches "
            "latents, not keys and values"
        )
    varied = sorted({"head_dim", "num_key_value_heads"} & set(getattr(decoder, "per_layer_attributes", None) or ()))
    if varied:
        raise ValueError(f"{name}: layers with different {' and '.join(varied)} are not supported")
    value_dim, dim = getattr(decoder, "v_head_dim", None), kv_shape(decoder)[1]
    if value_dim not in (None, dim):
        raise ValueError(f"{name}: keys of head_dim {dim} with values of {value_dim} are not supported")
    if crossing := getattr(decoder, "cross_attention_layers", None):
        raise ValueError(f"{name}: layers {list(crossing)} attend to other things than tokens, which is not supported")
    shared = getattr(decoder, "num_kv_shared_layers", None)
    modes = getattr(decoder, "kv_sharing_modes", None) or ()
    if shared or any(mode == "reuse" for mode in modes):
        raise ValueError(f"{name}: layers that share another layer's KV cache are not supported ({shared or modes})")
    layer_types, _ = get_layer_types_and_kwargs(decoder)
    other = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(f"{name}: layer types {other} are not supported, only full and sliding attention")
