"""What all caches share: the layer and cache base classes, and the checks that come before any write.

The only file that imports `transformers.cache_utils`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from ..autograd import cut_graph
from ..quant.packed import PackedKV


class Stored(NamedTuple):
    """What attention reads of a layer: the fields of `kernels.call.AttendCall` of the same names."""

    k: torch.Tensor
    v: torch.Tensor
    packed: PackedKV | None = None
    tokens: int | None = None
    slot: int = 0


class KVLayer(CacheLayerMixin):
    """One layer's keys and values. Three lengths, never mixed:

    - `seen`: tokens ever appended (and not cropped), what positions are counted from;
    - `stored`: tokens in the buffer now;
    - `capacity`: tokens that the buffer has room for.

    `keys` and `values` are what is stored, `(B, Hkv, stored, D)`; None before the first append.
    """

    is_compileable = False
    is_croppable = True
    forced = False  # whether the window is the cache's own, not the model's
    counts: tuple[str, ...] = ("seen",)  # the attributes that say how full the buffers are

    # Set at the first append.
    batch_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def __init__(
        self,
        max_cache_len: int | None,
        layer_idx: int,
        expected_heads: int | None = None,
        expected_dim: int | None = None,
        window: int | None = None,
    ):
        self.max_cache_len = max_cache_len
        self.layer_idx, self.expected_heads, self.expected_dim = layer_idx, expected_heads, expected_dim
        self.sliding_window = window
        self.is_sliding = window is not None
        self.is_initialized = False
        self.seen = self.capacity = 0

    @abstractmethod
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the stored tokens, `(B, Hkv, stored, D)` each, after the first append."""

    def kv(self) -> Stored:
        """What attention over the newest tokens reads."""
        return Stored(*self.dense())

    def beside(self, q: torch.Tensor, first: torch.Tensor | None) -> Any:
        """The fields of a `kernels.call.SinkKV` for the newest queries, or None; see `caches/sliding.py`."""
        return None

    def settle(self) -> None:
        """Called when the attention over what was appended is done: the time to compress it."""

    # transformers has plain attributes here, which it assigns to in its own layers only.
    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.dense()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.dense()[1] if self.is_initialized else None

    @property
    @abstractmethod
    def stored(self) -> int: ...

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, with everything needed to read them."""

    @abstractmethod
    def filled(self) -> dict[str, torch.Tensor]:
        """Everything that is stored, by name: views without spare capacity, after the first append."""

    def prepare(self, like: torch.Tensor, counts: dict[str, int]) -> None:
        """Makes an unused layer one that holds tokens of the shape, dtype and device of `like`, `(B, Hkv, seen, D)`.

        What `filled` returns is allocated, and whatever was in memory until it is written.

        Raises:
            ValueError: `counts` (a number for each name in the class's `counts`) that no layer can have.
        """
        self.check(like, like)
        self.lazy_initialization(like, like)
        self.seen = counts["seen"]

    def verify(self) -> None:
        """Raises ValueError when `filled`, written from outside, holds numbers that no append leaves there."""

    @abstractmethod
    def move(self, device: torch.device | str) -> None:
        """Moves the buffers; `device`, where tokens come from, stays."""

    def offload(self) -> None:
        self.move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.move(self.device)

    @abstractmethod
    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores new tokens `(B, Hkv, T, D)`, after `check`; nothing is written when it raises."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """transformers' entry on a model that is not enabled: appends, and returns dense keys and values of all."""
        self.append(key_states, value_states)
        k, v = self.dense()
        self.settle()
        return cut_graph(k, key_states), cut_graph(v, value_states)

    def check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Refuses tokens that do not fit, naming both values. Nothing has been written when it raises ValueError."""
        where = f"layer {self.layer_idx}"
        if k.ndim != 4 or k.shape != v.shape:
            raise ValueError(f"{where}: keys {tuple(k.shape)} and values {tuple(v.shape)} must both be (B, Hkv, T, D)")
        if (k.dtype, k.device) != (v.dtype, v.device):
            raise ValueError(f"{where}: keys are {k.dtype} on {k.device}, values {v.dtype} on {v.device}")
        batch, heads, new, dim = k.shape
        if self.expected_heads not in (None, heads) or self.expected_dim not in (None, dim):
            raise ValueError(
                f"{where}: the cache was made for {self.expected_heads} KV heads of {self.expected_dim}, "
                f"got {heads} of {dim}: it belongs to another model's config"
            )
        if self.is_initialized:
            if batch != self.batch_size:
                raise ValueError(f"{where}: the cache holds a batch of {self.batch_size}, got {batch}")
            if (k.dtype, k.device) != (self.dtype, self.device):
                raise ValueError(f"{where}: the cache holds {self.dtype} on {self.device}, got {k.dtype} on {k.device}")

        if self.max_cache_len is not None and self.seen + new > self.max_cache_len:
            raise ValueError(
                f"{where}: {self.seen} stored tokens and {new} new ones exceed max_cache_len={self.max_cache_len}"
            )

    def check_crop(self, tokens_to_remove: int) -> None:
        if not -self.seen <= tokens_to_remove <= 0:
            raise ValueError(f"crop takes a number from {-self.seen} (all stored tokens) to 0, got {tokens_to_remove}")

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Gathers batch rows of what is stored; `rows` are indices or bools on the layer's device."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the batch rows that `indices` (integers or bools) names, in its order."""
        if self.is_initialized:
            self.select(indices.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first position of the keys that `query_length` new tokens will see."""
        return self.stored + query_length, self.seen - self.stored


def check_max_cache_len(max_cache_len: int | None) -> None:
    if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
        raise ValueError(f"max_cache_len must be an int of at least 1, or None, got {max_cache_len!r}")


class LayerWriter:
    """Stands in for the cache in one attention module's forward: `update` stores, and returns the new tokens only.

    The attention function then reads the layer itself, so the past is never gathered. Anything else that a module asks
    of its cache is the cache's own answer.
    """

    def __init__(self, cache: KVCache, layer: KVLayer):
        self._cache, self._layer = cache, layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx != self._layer.layer_idx:
            raise ValueError(f"layer {self._layer.layer_idx} of the cache was asked to store layer {layer_idx}")
        self._layer.append(key_states, value_states)
        return key_states, value_states

    def __getattr__(self, name: str):
        if name.startswith("__"):  # copying and pickling ask an empty instance for these
            raise AttributeError(name)
        return getattr(self._cache, name)


class KVCache(Cache):
    """A transformers `Cache` whose layers are `KVLayer`s, one for each layer of the model.

    Args:
        config: the model's config, or that of a composite model; its decoder counts.
        make_layer: called with (layer_idx, KV heads or None, head_dim or None, native sliding window or None).

    Raises:
        ValueError: a model whose keys and values these caches cannot hold, with the reason.
    """

    layers: list[KVLayer]  # type: ignore[assignment]  # narrower than transformers' list
    settings: dict[str, Any]  # the subclass's own arguments: `type(cache)(config, **cache.settings)` is one like it

    def __init__(self, config: PreTrainedConfig, make_layer: Callable[..., KVLayer]):
        check_config(config)
        decoder = config.get_text_config(decoder=True)
        heads, dim = kv_shape(decoder)
        windows = native_windows(decoder)
        super().__init__(layers=[make_layer(i, heads, dim, window) for i, window in enumerate(windows)])
        known = {name: getattr(decoder, name, None) for name in _FINGERPRINT}
        shapes = {"num_key_value_heads": heads, "head_dim": dim, "sliding_windows": windows}
        self.fingerprint: dict[str, Any] = copy.deepcopy(known | shapes)  # of the model; the config may change

    def to(
        self, device: torch.device | torch.dtype | str | int | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """Moves keys and values to `device`, in place, and returns the cache; an unused cache follows its model anyway.

        Raises:
            ValueError: another dtype than the cache holds: rounded keys and values are not those that the model in
                that dtype would have stored, and codes have no dtype to change.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        used = [layer for layer in self.layers if layer.is_initialized]
        for layer in used:
            if dtype not in (None, layer.dtype):
                raise ValueError(
                    f"a cache of {layer.dtype} is not converted to {dtype}: its keys and values would not be those "
                    "of the model in that dtype; let the model fill a new cache"
                )
        if device is not None:
            for layer in used:
                layer.move(torch.device(device))
                layer.device = next(iter(layer.filled().values())).device
        return self

    def writer(self, layer_idx: int) -> LayerWriter:
        """The stand-in for this cache in the forward of attention layer `layer_idx`."""
        if layer_idx >= len(self.layers):
            raise ValueError(f"the cache has {len(self.layers)} layers, the model asks for layer {layer_idx}")
        return LayerWriter(self, self.layers[layer_idx])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Stores new tokens `(B, Hkv, T, D)` of a layer; returns all its keys and values, dense."""
        if layer_idx >= len(self.layers):
            raise ValueError(f"the cache has {len(self.layers)} layers, the model asks for layer {layer_idx}")
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens in all layers; 0 does nothing.

        Raises:
            ValueError: more tokens than a layer can take back; nothing has changed then.
        """
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all keys and values, capacity that is not filled yet included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_element(self) -> float:
        """Average bits per cached number when full: 8 `nbytes` over the numbers that fit."""
        numbers = sum(
            2 * layer.batch_size * layer.kv_heads * layer.capacity * layer.head_dim
            for layer in self.layers
            if layer.is_initialized
        )
        if not numbers:
            raise ValueError("an empty cache has no bits per element: its dtype is known after the first forward")
        return 8 * self.nbytes / numbers


def kv_shape(decoder: PreTrainedConfig) -> tuple[int | None, int | None]:
    """KV heads and head_dim of a decoder's config; None where it does not say."""
    heads = getattr(decoder, "num_key_value_heads", None) or getattr(decoder, "num_attention_heads", None)
    dim = getattr(decoder, "head_dim", None)
    if dim is None and hasattr(decoder, "hidden_size") and hasattr(decoder, "num_attention_heads"):
        dim = decoder.hidden_size // decoder.num_attention_heads
    return heads, dim


# What of a decoder's config the meaning of cached keys and values depends on, beside their shapes.
_FINGERPRINT = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "rope_parameters",
)


def native_windows(decoder: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer of a decoder's config, None for full attention."""
    layer_types, kwargs = get_layer_types_and_kwargs(decoder)
    if isinstance(kwargs, dict):  # transformers 5.17: one dict for all layers
        kwargs = [kwargs] * len(layer_types)
    pairs = zip(layer_types, kwargs, strict=True)
    return [each["sliding_window"] if kind == "sliding_attention" else None for kind, each in pairs]


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
    shared = getattr(decoder, "num_kv_shared_layers", None)
    modes = getattr(decoder, "kv_sharing_modes", None) or ()
    if shared or any(mode == "reuse" for mode in modes):
        raise ValueError(f"{name}: layers that share another layer's KV cache are not supported ({shared or modes})")
    layer_types, _ = get_layer_types_and_kwargs(decoder)
    other = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(f"{name}: layer types {other} are not supported, only full and sliding attention")
