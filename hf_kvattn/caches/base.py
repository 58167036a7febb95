"""What all caches share: the layer and cache base classes, and the checks that come before any write.

The only file that imports `transformers.cache_utils`.
"""

from __future__ import annotations

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from ..autograd import cut_graph
from ..quant.packed import PackedKV
from .shared import Frozen, can_share
from .tickets import issue


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

    `untouched` of the leading tokens have not changed since the cache last looked (`KVCache._look`). `torn` names a
    change that was interrupted half way: nothing can be read any more, only `reset` helps.

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
        self.seen = self.capacity = self.untouched = 0
        self.torn: str | None = None

    @abstractmethod
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the stored tokens, `(B, Hkv, stored, D)` each, after the first append."""

    def kv(self) -> Stored:
        """What attention over the newest tokens reads."""
        return Stored(*self.dense())

    def beside(self, q: torch.Tensor, first: torch.Tensor | None) -> Any:
        """The fields of a `kernels.call.SinkKV` for the newest queries, or None; see `caches/sliding.py`."""
        return None

    def claim(self) -> None:
        """Called before a token is written from outside: what it overwrites is given up. It counts once `seen` does."""

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
    def whole(self) -> int:
        """Tokens of which everything is stored: fewer than `seen` where their attention was interrupted."""
        return self.seen

    @abstractmethod
    def buffers(self) -> dict[str, tuple[torch.Tensor, int]]:
        """Everything allocated, by name, each with the number of entries of dimension 2 that are filled."""

    @abstractmethod
    def adopt(self, buffers: dict[str, torch.Tensor]) -> None:
        """Replaces the tensors of `buffers` by others of the same shapes and contents."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, with everything needed to read them."""
        return sum(tensor.nbytes for tensor, _ in self.buffers().values())

    def filled(self) -> dict[str, torch.Tensor]:
        """Everything that is stored, by name: views without spare capacity, after the first append."""
        return {name: tensor[:, :, :filled] for name, (tensor, filled) in self.buffers().items()}

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

    @torch.inference_mode(False)
    def move(self, device: torch.device | str) -> None:
        """Moves the buffers; `device`, where tokens come from, stays."""
        self.adopt({name: tensor.to(device) for name, (tensor, _) in self.buffers().items()})

    def offload(self) -> None:
        self.move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.move(self.device)

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict) -> KVLayer:
        """A layer with memory of its own, also of tensors that forks share."""
        twin = _twin(self)
        twin.adopt({name: tensor.clone() for name, (tensor, _) in self.buffers().items()})
        return twin

    def __getstate__(self) -> dict:
        return copy.deepcopy(self).__dict__

    @abstractmethod
    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores new tokens `(B, Hkv, T, D)`, after `ready`; nothing is written when it raises."""

    def ready(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """`check`, and buffers for such tokens where there are none yet, or empty ones for another batch or dtype."""
        self.check(k, v)
        mine = (self.batch_size, self.head_dim, self.dtype, self.device) if self.is_initialized else None
        if not self.seen and mine != (k.shape[0], k.shape[3], k.dtype, k.device):
            self.is_initialized = False
            self.lazy_initialization(k, v)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """transformers' entry on a model that is not enabled: appends, and returns dense keys and values of all."""
        self.append(key_states, value_states)
        k, v = self.dense()
        self.settle()
        return cut_graph(k, key_states), cut_graph(v, value_states)

    def check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Refuses tokens that do not fit, naming both values. Nothing has been written when it raises ValueError."""
        where = f"layer {self.layer_idx}"
        if self.torn is not None:
            raise ValueError(f"{where}: {_torn(self.torn)}")
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
        if self.seen:
            if batch != self.batch_size:
                raise ValueError(f"{where}: the cache holds a batch of {self.batch_size}, got {batch}")
            if (k.dtype, k.device) != (self.dtype, self.device):
                raise ValueError(f"{where}: the cache holds {self.dtype} on {self.device}, got {k.dtype} on {k.device}")

        if self.max_cache_len is not None and self.seen + new > self.max_cache_len:
            raise ValueError(
                f"{where}: {self.seen} stored tokens and {new} new ones exceed max_cache_len={self.max_cache_len}"
            )

    @abstractmethod
    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens; 0 does nothing."""

    def reset(self) -> None:
        """Forgets all tokens; the buffers stay, unless a change of them was interrupted."""
        self.seen = self.untouched = 0
        self.is_initialized = self.is_initialized and self.torn is None
        self.torn = None

    def check_crop(self, tokens_to_remove: int) -> None:
        if not -self.seen <= tokens_to_remove <= 0:
            raise ValueError(f"crop takes a number from {-self.seen} (all stored tokens) to 0, got {tokens_to_remove}")

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Gathers batch rows of what is stored; `rows` are indices on the layer's device."""

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, start: int) -> None:
        """Overwrites batch rows `target` by rows `source` (indices), which have the tokens before `start` in common."""
        for tensor, filled in self.buffers().values():
            tensor[target, :, :filled] = tensor[source, :, :filled]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the batch rows that `indices` (integers or bools) names, in its order."""
        if self.seen:
            self.select(check_rows(indices, self.batch_size).to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            self.select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first position of the keys that `query_length` new tokens will see."""
        return self.stored + query_length, self.seen - self.stored


def ring_spans(name: str, ring: torch.Tensor, slot: int, count: int) -> dict[str, torch.Tensor]:
    """Views of `count` entries of a ring's dimension 2 from `slot` on: one, or two where it wraps, for `filled`."""
    to_wrap = min(count, ring.shape[2] - slot)
    spans = {name: ring[:, :, slot : slot + to_wrap]}
    return spans if to_wrap == count else {**spans, f"{name}_wrapped": ring[:, :, : count - to_wrap]}


def check_max_cache_len(max_cache_len: int | None) -> None:
    if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
        raise ValueError(f"max_cache_len must be an int of at least 1, or None, got {max_cache_len!r}")


def check_rows(indices: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The batch rows, counted from 0, that `indices` `(B',)` names: integers, or bools for `(B,)`."""
    rows = indices.nonzero().flatten() if indices.dtype == torch.bool and indices.shape == (batch_size,) else indices
    whole = rows.dtype in (torch.int32, torch.int64) and rows.ndim == 1 and rows.numel() > 0
    if not whole or not -batch_size <= int(rows.min()) <= int(rows.max()) < batch_size:
        raise ValueError(f"expected rows of a batch of {batch_size}, got {indices}")
    return rows.long() % batch_size


def _twin(thing: Any) -> Any:
    """Another object of the same class with the same attributes."""
    twin = object.__new__(type(thing))
    twin.__dict__.update(thing.__dict__)
    return twin


def _torn(change: str) -> str:
    return f"{change} was interrupted half way; only reset() makes the cache usable again"


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
    is_compileable = False  # True during a `generate()` that compiles; transformers compiles by itself where it is
    steps: Any = None  # during a `generate()` that records CUDA graphs: the `graphs.DecodeSteps` of this cache
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
        # (B, B): leading tokens that two batch rows are known to have in common, as far as layers left them untouched.
        self._alike = torch.zeros(0, 0, dtype=torch.long)
        self._frozen: Frozen | None = None  # what forks were made from, still good while layers are untouched
        self.ticket = issue(self)  # what compiled graphs know the cache by

    def check_whole(self) -> None:
        """Raises ValueError, with the way out, where an exception or an interrupt left layers unlike each other."""
        for layer in self.layers:
            if layer.torn is not None:
                raise ValueError(_torn(layer.torn))
        whole, longest = min(layer.whole for layer in self.layers), max(layer.seen for layer in self.layers)
        if whole != longest:
            raise ValueError(
                f"a forward was interrupted half way: layers hold {whole} to {longest} tokens; crop({whole - longest}) "
                "goes back to the last whole step"
            )

    @contextlib.contextmanager
    def _changing(self, change: str) -> Iterator[None]:
        """For what is done to all layers or to none: they stay torn where the body does not come to its end."""
        for layer in self.layers:
            layer.torn = change
        yield
        for layer in self.layers:
            layer.torn = None

    def _look(self) -> None:
        """Takes note of what layers changed by themselves: what is known holds for the tokens before that only."""
        self._frozen = None  # first: an interrupt must not leave what was frozen beside layers that look untouched
        self._alike = self._alike.clamp(max=min(layer.untouched for layer in self.layers))
        for layer in self.layers:
            layer.untouched = layer.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As in transformers, which asks once a forward, before any layer stores: the time to notice a torn cache."""
        self.check_whole()
        return super().get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens in all layers, or in none.

        Repairs a cache whose forward was interrupted: counted from the longest layer, down to a length that all hold.

        Raises:
            ValueError: a number of tokens that not all layers hold; nothing has changed then.
        """
        whole, longest = min(layer.whole for layer in self.layers), max(layer.seen for layer in self.layers)
        if torn := next((layer.torn for layer in self.layers if layer.torn is not None), None):
            raise ValueError(_torn(torn))
        kept = longest + tokens_to_remove
        if tokens_to_remove > 0 or not 0 <= kept <= whole:
            raise ValueError(
                f"crop takes a number from {-longest} (all stored tokens) to {whole - longest}, got {tokens_to_remove}"
            )
        for layer in self.layers:
            layer.check_crop(kept - layer.seen)
        if tokens_to_remove:
            with self._changing("crop"):
                for layer in self.layers:
                    layer.crop(kept - layer.seen)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search's: row i becomes what row `beam_idx[i]` was. Rows that stay do not move, nor do common tokens."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        if type(repeats) is not int or repeats < 1:
            raise ValueError(f"repeats must be an int of at least 1, got {repeats!r}")
        if self.layers[0].seen:
            self.batch_select_indices(torch.arange(self.layers[0].batch_size).repeat_interleave(repeats))

    @torch.inference_mode(False)
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the batch rows that `indices` `(B',)` names (integers, or bools for `(B,)`), in its order.

        Raises:
            ValueError: rows that are not there; nothing has changed then.
        """
        self.check_whole()
        seen = self.layers[0].seen
        if not seen:
            return
        batch_size = self.layers[0].batch_size
        rows = check_rows(indices.cpu(), batch_size)
        target = (rows != torch.arange(len(rows))).nonzero().flatten()
        if len(rows) == batch_size and not len(target):
            return
        if len(self._alike) != batch_size:
            self._alike = torch.zeros(batch_size, batch_size, dtype=torch.long)
        self._look()
        with self._changing("reordering of the batch"):
            if len(rows) == batch_size:
                source = rows[target]
                start = int(self._alike[target, source].min())
                for layer in self.layers:
                    layer.copy_rows(target.to(layer.device), source.to(layer.device), start)
            else:
                for layer in self.layers:
                    layer.select(rows.to(layer.device))
            self._alike = torch.where(rows[:, None] == rows, seen, self._alike[rows][:, rows])

    @torch.inference_mode(False)
    def fork(self) -> KVCache:
        """Another cache with the same contents, which goes its own way: what is stored so far is shared.

        On Linux and a CPU, memory is shared by pages of 4 KiB, copied when one of the caches writes to them: all
        forks of one prefix, and this cache, hold one copy of it together, and each the pages that its own tokens touch.
        A cache that outgrows its capacity moves to memory of its own: give `max_cache_len`. Elsewhere, a deep copy.
        """
        self.check_whole()
        tensors = [pair for layer in self.layers for pair in layer.buffers().values()]
        if not self.layers[0].seen or not can_share([tensor for tensor, _ in tensors]):
            return copy.deepcopy(self)
        same = self._frozen is not None and self._frozen.fits([tensor for tensor, _ in tensors])
        if not same or any(layer.untouched != layer.seen for layer in self.layers):
            self._look()
            self._frozen = Frozen(tensors)
            self._adopt(self._frozen)
        twin = _twin(self)
        twin.layers = [_twin(layer) for layer in self.layers]
        twin._adopt(self._frozen)
        twin.ticket = issue(twin)
        return twin

    def _adopt(self, frozen: Frozen) -> None:
        views = iter(frozen.views())
        for layer in self.layers:
            layer.adopt({name: next(views) for name in layer.buffers()})

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_frozen": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.ticket = issue(self)

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
        if layer_idx == 0:
            self.check_whole()
        if layer_idx >= len(self.layers):
            raise ValueError(f"the cache has {len(self.layers)} layers, the model asks for layer {layer_idx}")
        return LayerWriter(self, self.layers[layer_idx])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Stores new tokens `(B, Hkv, T, D)` of a layer; returns all its keys and values, dense."""
        if layer_idx >= len(self.layers):
            raise ValueError(f"the cache has {len(self.layers)} layers, the model asks for layer {layer_idx}")
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

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
