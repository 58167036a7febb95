"""What a model's config says about each layer's keys, values and recurrent states, and which models are refused."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

_WITH_STATES = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
_WITH_KEYS = {"full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding"}
_WITH_WINDOW = {"sliding_attention", "chunked_attention", "hybrid_sliding"}
_SERVED = _WITH_KEYS | _WITH_STATES | {"dummy"}  # a dummy layer stores nothing
# Layers that have more KV heads than the config says, by how many times, since the model's code says so.
_MORE_HEADS = {("mimo_v2_flash", "sliding_attention"): 2}
# Modules that compute keys, by the last part of their names in transformers' plans of tensor parallelism.
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


class LayerNeeds(NamedTuple):
    """What one layer of a model keeps between two forwards.

    Attributes:
        keys: whether it stores keys and values.
        heads, dim: KV heads and head_dim; None where the config does not say.
        window: tokens that its queries see at most, their own included; None for all.
        states: how many convolution and recurrent states of each kind it has; 0 for none.
        latent: of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), the widths of the two latents that stand
            for all keys and values; None elsewhere.
        lender: the earlier layer whose keys and values it attends to, in the place of its own (Gemma 3n), or None.
    """

    keys: bool = True
    heads: int | None = None
    dim: int | None = None
    window: int | None = None
    states: int = 0
    latent: tuple[int, int] | None = None
    lender: int | None = None


def kv_shape(decoder: PreTrainedConfig) -> tuple[int | None, int | None]:
    """KV heads and head_dim of a decoder's config, or of one layer's; None where it does not say, or layers differ."""
    names = ("num_key_value_heads", "num_attention_heads", "head_dim", "hidden_size")
    kv_heads, q_heads, dim, hidden = (_of_all(decoder, name) for name in names)
    differ = "head_dim" in (getattr(decoder, "per_layer_attributes", None) or ())
    return kv_heads or q_heads, hidden // q_heads if not (dim or differ) and hidden and q_heads else dim


def _of_all(config: PreTrainedConfig, name: str) -> Any:
    """An attribute of `config`; None where it has none, or where it differs by layer."""
    return None if name in (getattr(config, "per_layer_attributes", None) or ()) else getattr(config, name, None)


def _kinds(decoder: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """The kind of each layer, and what its cache needs to know. An early exit runs fewer layers than have kinds."""
    kinds, kwargs = get_layer_types_and_kwargs(decoder)
    kinds = kinds[: decoder.num_hidden_layers]
    # transformers 5.17: one dict for all layers
    return kinds, [kwargs] * len(kinds) if isinstance(kwargs, dict) else kwargs[: len(kinds)]


def layer_needs(decoder: PreTrainedConfig) -> list[LayerNeeds]:
    """What each layer of a decoder's config needs; `check_config` comes first."""
    kinds, kwargs = _kinds(decoder)
    configs = getattr(decoder, "per_layer_config", None) or [decoder] * len(kinds)
    modes = getattr(decoder, "kv_sharing_modes", None) or [None] * len(kinds)
    kind_of = (getattr(decoder, "layer_types", None) or kinds)[: len(kinds)]  # of layers that reuse, too
    needs: list[LayerNeeds] = []
    for kind, given, config, mode in zip(kinds, kwargs, configs, modes, strict=True):
        heads, dim = kv_shape(config)
        heads = heads and heads * _MORE_HEADS.get((decoder.model_type, kind), 1)
        latent = None
        if rank := getattr(config, "kv_lora_rank", None):
            latent = (rank, config.qk_rope_head_dim)
            heads, dim = 1, sum(latent) // 2  # as two halves of equal width: `KVLayer.halves`
        states = given.get("number_of_states", 1) if kind in _WITH_STATES else 0
        window = given.get("sliding_window") if kind in _WITH_WINDOW else None
        # The layer that stores what others of its kind reuse; it lends to itself where the config names none.
        lenders = [j for j, own in enumerate(kind_of) if own == kind_of[len(needs)] and modes[j] == "store"]
        lender = None if mode != "reuse" else lenders[-1] if lenders else len(needs)
        needs.append(LayerNeeds(kind in _WITH_KEYS, heads, dim, window, states, latent, lender))
    return needs


def head_shares(config: PreTrainedConfig) -> int:
    """Over how many processes tensor parallelism shares out each layer's KV heads; 1 where every process has all.

    Args:
        config: a loaded model's own: transformers notes there how it was shared out, and keeps it out of files.
    """
    noted = getattr(config, "distributed_config", None)
    size, changes = getattr(noted, "tp_size", None) or 1, getattr(noted, "tp_plan", None)
    if size == 1 or changes == {}:
        return 1
    plan = config.get_text_config(decoder=True).base_model_tp_plan or {}
    plan = plan | changes if isinstance(changes, dict) else plan
    styles = {name.rpartition(".")[2]: style for name, style in plan.items()}
    return size if any(styles.get(name) == "colwise" for name in _KEY_PROJECTIONS) else 1


def uncompiled_kind(decoder: PreTrainedConfig) -> str | None:
    """The kind of layers that no compiled step serves, or None."""
    if any(need.latent for need in layer_needs(decoder)):
        return "multi-head latent attention, whose steps are no op of a graph"
    if "chunked_attention" in _kinds(decoder)[0]:
        return "chunked attention, whose masks grow with each step"
    return None


def fingerprint(decoder: PreTrainedConfig) -> dict[str, Any]:
    """A copy of what the meaning of cached keys and values depends on in a decoder's config."""
    names = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "rope_parameters")
    needs, (heads, dim) = layer_needs(decoder), kv_shape(decoder)
    shapes = {"num_key_value_heads": heads, "head_dim": dim, "sliding_windows": [need.window for need in needs]}
    layers = {"layers": [list(need) for need in needs]}
    return copy.deepcopy({name: _of_all(decoder, name) for name in names} | shapes | layers)


def check_config(config: PreTrainedConfig) -> None:
    """Raises ValueError, with the reason, for models whose layers keep other things than these caches can hold."""
    name = getattr(config, "model_type", type(config).__name__)
    decoder = config.get_text_config(decoder=True)
    if not hasattr(decoder, "num_hidden_layers"):
        raise ValueError(f"{name}: models that are not one stack of layers (num_hidden_layers) are not supported")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: encoder-decoder models are not supported (cross-attention has a cache of its own)")
    kinds, _ = _kinds(decoder)
    if other := sorted(set(kinds) - _SERVED):
        raise ValueError(f"{name}: layers of type {other} are not supported; served are {sorted(_SERVED)}")
    if not _WITH_KEYS & set(kinds):
        raise ValueError(f"{name}: its layers, of type {sorted(set(kinds))}, store no keys and values")
    if getattr(decoder, "num_kv_shared_layers", None) and not hasattr(decoder, "kv_sharing_modes"):
        raise ValueError(f"{name}: layers that share another's keys and values are served with newer transformers")
    for i, need in enumerate(layer_needs(decoder)):
        if need.lender == i:
            raise ValueError(f"{name}: no layer stores the keys and values that layer {i} reuses")
        if need.latent is not None and sum(need.latent) % 2:
            raise ValueError(f"{name}: layer {i} has latents of {need.latent} numbers, which do not make two halves")
        if need.heads and need.heads % head_shares(config):
            raise ValueError(
                f"{name}: the {need.heads} KV heads of layer {i} cannot be shared out evenly over "
                f"{head_shares(config)} tensor-parallel processes"
            )
