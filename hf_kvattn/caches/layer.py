"""`KVLayer`: the base of one layer's storage, in every cache."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from ..autograd import cut_graph, outside_autocast
from ..quant.blocks import Quantize, quantize_blocks
from ..quant.packed import PackedKV

GROWTH = 1.5  # of buffers without a fixed capacity, each time they are full


class Stored(NamedTuple):
    """What attention reads of a layer; the fields are those of `kernels.call.AttendCall`."""

    k: torch.Tensor
    v: torch.Tensor
    packed: PackedKV | None = None
    tokens: int | None = None
    slot: int = 0


class Place(NamedTuple):
    """Where a layer stores its next token, `(B, Hkv, 1, D)`, and what attention reads beside it.

    Attributes:
        k, v: the layer's buffers, `(B, Hkv, slots, D)`.
        slot: the token's slot in them.
        packed: the layer's blocks, or None.
    """

    k: torch.Tensor
    v: torch.Tensor
    slot: int
    packed: PackedKV | None = None


class KVLayer(CacheLayerMixin):
    """One layer's keys and values. It has three lengths, which are never mixed:

    - `seen`: tokens ever appended and not cropped; positions are counted by it;
    - `stored`: tokens in the buffer now;
    - `capacity`: tokens that the buffer has room for.

    `unchanged_prefix` counts leading tokens that have not changed since `KVCache._note_changes` last ran.
    `inconsistent` names a change that was interrupted half way: the layer cannot be read any more, and only `reset`
    helps (`caches/consistency.py`).

    `keys` and `values` are what is stored, `(B, Hkv, stored, D)`; None before the first append.
    """

    is_compileable = False
    is_croppable = True
    forces_window = False  # whether the window is the cache's own, not the model's
    wants_queries = False  # whether `note_queries` is to be called
    counts: tuple[str, ...] = ("seen",)  # the attributes that say how full the buffers are
    kind: tuple  # what layers of one cache have in common that store alike
    latent: tuple[int, int] | None = None  # widths of two latents, where they stand for keys and values
    value_dim: int | None = None  # width of stored values; None is that of keys

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
        self.kind = type(self), window
        self.is_initialized = False
        self.seen = self.capacity = self.unchanged_prefix = 0
        self.inconsistent: str | None = None

    @abstractmethod
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the stored tokens, `(B, Hkv, stored, D)` each, after the first append."""

    def stored_kv(self) -> Stored:
        """What attention over the newest tokens reads."""
        return Stored(*self.dense())

    def sink_inputs(self, q: torch.Tensor, leftpad: torch.Tensor | None) -> Any:
        """The fields of a `kernels.call.SinkKV` for the newest queries, or None; see `caches/ring.py`."""
        return None

    def place(self) -> Place | None:
        """The place of the next token, where a kernel may store it by itself; it lies there if there is room.

        Such a token needs `reserve_slot`, and the checks of `append`.
        """
        return None

    def reserve_slot(self) -> None:
        """Reserves the slot of a token that a kernel or CUDA graph will write. The token it overwrites is evicted.

        The caller increments `seen` when the token is written.
        """

    def note_queries(self, query: torch.Tensor, padding: torch.Tensor | None) -> None:
        """Told of the queries `(B, Hq, T, D)` of the newest tokens, before `finish_attention`.

        Args:
            padding: `(B,)`, tokens at the left of each row that are padding, as far as the mask says it; or None.
        """

    def finish_attention(self, quantize: Quantize = quantize_blocks) -> None:
        """Called when attention over the new tokens is done. A layer may compress tokens then, with `quantize`."""

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]  # transformers assigns to its own layers' only
        return self.dense()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]  # as above
        return self.dense()[1] if self.is_initialized else None

    @property
    @abstractmethod
    def stored(self) -> int: ...

    @property
    def complete_tokens(self) -> int:
        """Tokens that are stored completely: fewer than `seen` if their attention was interrupted."""
        return self.seen

    @abstractmethod
    def buffers(self) -> dict[str, tuple[torch.Tensor, int]]:
        """All allocated tensors by name, each with the number of filled entries of its dimension 2."""

    @abstractmethod
    def replace_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        """Replaces the tensors of `buffers` by others with the same shapes and contents."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, with everything needed to read them."""
        return sum(tensor.nbytes for tensor, _ in self.buffers().values())

    def filled(self) -> dict[str, torch.Tensor]:
        """All stored tensors by name, as views without spare capacity; after the first append."""
        return {name: tensor[:, :, :filled] for name, (tensor, filled) in self.buffers().items()}

    def allocate_for(self, like: torch.Tensor, counts: dict[str, int]) -> None:
        """Allocates an unused layer for tokens of the shape, dtype and device of `like`, `(B, Hkv, seen, D)`.

        The caller then writes the tensors that `filled` returns; until then they are uninitialised.

        Raises:
            ValueError: `counts` (a number for each name in the class's `counts`) that no layer can have.
        """
        self.check(like, like[..., : self.value_dim])
        self.lazy_initialization(like, like[..., : self.value_dim])
        self.seen = counts["seen"]

    def check_loaded(self) -> None:
        """Raises ValueError if `filled`, written from a file, holds numbers that no append would leave there."""

    @torch.inference_mode(False)
    def move(self, device: torch.device | str) -> None:
        """Moves the buffers. `device`, the device of new tokens, stays."""
        self.replace_buffers({name: self._moved(name, tensor, device) for name, (tensor, _) in self.buffers().items()})

    def _moved(self, name: str, tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """The tensor of that name in `buffers` or `filled` on another device."""
        return tensor.to(device)

    def portable(self) -> dict[str, torch.Tensor]:
        """What `filled` returns, on the CPU and as it would be stored there: what files hold."""
        return {name: self._moved(name, tensor, "cpu") for name, tensor in self.filled().items()}

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict) -> KVLayer:
        """A layer with memory of its own, even where forks share tensors."""
        copied = shallow_copy(self)
        copied.replace_buffers({name: tensor.clone() for name, (tensor, _) in self.buffers().items()})
        return copied

    @abstractmethod
    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores new tokens `(B, Hkv, T, D)`, after `make_ready`; nothing is written when it raises."""

    def make_ready(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """`check`, then allocates buffers if there are none, or if empty ones have another batch size or dtype."""
        self.check(k, v)
        if self.seen:
            return
        mine = (self.batch_size, self.head_dim, self.dtype, self.device) if self.is_initialized else None
        if mine != (k.shape[0], k.shape[3], k.dtype, k.device):
            self.is_initialized = False
            self.lazy_initialization(k, v)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes buffers for tokens of this shape, dtype and device, `(B, Hkv, T, D)`."""
        self.batch_size, self.kv_heads, new, self.head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate(new)
        self.is_initialized = True

    @abstractmethod
    def _allocate(self, needed: int) -> None:
        """Makes room for `needed` tokens in all, as far as they stay, and sets `capacity`."""

    @torch.inference_mode(False)  # a buffer is written to by later forwards, in whatever mode
    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A new buffer, `(B, Hkv, *shape)`, uninitialised; of the layer's dtype unless another is given."""
        return torch.empty(self.batch_size, self.kv_heads, *shape, dtype=dtype or self.dtype, device=self.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """For a model that is not enabled: appends, and returns dense keys and values of all tokens."""
        return outside_autocast(self._append_dense, key_states, value_states)

    def _append_dense(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        visible, _ = self.get_mask_sizes(key_states.shape[2])
        width = value_states.shape[-1]
        if self.latent is None:
            self.append(*as_wide(key_states, value_states))
            k, v = self.dense()
        else:
            self.append_latents(key_states, value_states)
            k, v = self.latents().split(self.latent, 3)
        k, v = k[:, :, -visible:], v[:, :, -visible:]
        self.finish_attention()
        return cut_graph(k, key_states), cut_graph(v[..., :width], value_states)

    def keep_latents(self, widths: tuple[int, int]) -> None:
        """Makes an unused layer one of latents, of these widths: it stores them as two halves of equal width."""
        self.latent = widths

    def latents(self) -> torch.Tensor:
        """Both latents of the tokens that the newest forward sees, one beside the other, `(B, 1, stored, D)`."""
        return torch.cat(self.dense(), 3)

    def append_latents(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Stores two latents of new tokens, `(B, 1, T, width)` of their widths; nothing is written when it raises."""
        widths = tuple(t.shape[3] if t.ndim == 4 else None for t in (one, other))
        if widths != self.latent or one.shape[:3] != other.shape[:3] or one.dtype != other.dtype:
            given = f"{tuple(one.shape)} {one.dtype} and {tuple(other.shape)} {other.dtype}"
            raise ValueError(f"layer {self.layer_idx}: latents are {given}, of widths {self.latent} in the config")
        both = torch.cat((one, other), 3)
        k_dim = both.shape[3] // 2 if self.value_dim is None else both.shape[3]
        self.append(both[..., :k_dim], both[..., k_dim:])

    def check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Refuses tokens that do not fit: the ValueError names both values, and nothing has been written."""
        self.check_consistent()
        where = f"layer {self.layer_idx}"
        if k.ndim != 4 or (*k.shape[:3], self.value_dim if self.value_dim is not None else k.shape[3]) != v.shape:
            raise ValueError(f"{where}: keys {tuple(k.shape)} and values {tuple(v.shape)} must both be (B, Hkv, T, D)")
        if (k.dtype, k.device) != (v.dtype, v.device):
            raise ValueError(f"{where}: keys are {k.dtype} on {k.device}, values {v.dtype} on {v.device}")
        batch, heads, new, dim = k.shape
        if self.expected_heads not in (None, heads) or self.expected_dim not in (None, dim):
            raise ValueError(
                f"{where}: the cache was made for {self.expected_heads} KV heads of {self.expected_dim}, "
                f"got {heads} of {dim}: it was made of another config than this model's own, model.config"
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

    def check_consistent(self) -> None:
        """Raises ValueError, with the way out, if a change was interrupted half way."""
        if self.inconsistent is not None:
            way_out = "only reset() makes the cache usable again"
            raise ValueError(f"layer {self.layer_idx}: {self.inconsistent} was interrupted half way; {way_out}")

    @abstractmethod
    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens; 0 does nothing."""

    def reset(self) -> None:
        """Removes all tokens. The buffers stay, unless a change of them was interrupted."""
        self.seen = self.unchanged_prefix = 0
        self.is_initialized = self.is_initialized and self.inconsistent is None
        self.inconsistent = None

    def check_crop(self, tokens_to_remove: int) -> None:
        if type(tokens_to_remove) is not int or not -self.seen <= tokens_to_remove <= 0:
            raise ValueError(f"crop takes an int from {-self.seen} (all stored tokens) to 0, got {tokens_to_remove!r}")

    def exact_prefix(self, stored: int, wanted: int) -> int:
        """How many of its first `wanted` tokens a layer like this can keep of `stored`: see `KVCache.exact_prefix`."""
        return wanted if wanted == stored else 0

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Keeps the batch rows `rows` (indices on the layer's device), in that order."""

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, start: int) -> None:
        """Overwrites batch rows `target` by rows `source` (indices); their tokens before `start` are equal already."""
        for tensor, filled in self.buffers().values():
            tensor[target, :, :filled] = tensor[source, :, :filled]

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, before: bool = True) -> tuple[int, int]:
        """Length and first position of the range of keys that `query_length` new tokens see.

        It follows from the window alone: masks are made for all layers of one window, in whatever way they store.

        Args:
            before: whether the new tokens have not been stored yet.
        """
        seen = self.seen if before else self.seen - query_length
        past = seen if self.sliding_window is None else min(seen, self.sliding_window - 1)
        return past + query_length, seen - past


def ring_spans(name: str, ring: torch.Tensor, slot: int, count: int) -> dict[str, torch.Tensor]:
    """Views of `count` entries of a ring's dimension 2 from `slot` on, for `filled`: one, or two if the ring wraps."""
    to_wrap = min(count, ring.shape[2] - slot)
    spans = {name: ring[:, :, slot : slot + to_wrap]}
    return spans if to_wrap == count else {**spans, f"{name}_wrapped": ring[:, :, : count - to_wrap]}


def as_wide(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`k`, and `v` with zeros up to its width where it is narrower (MiMo): layers and kernels have one for both."""
    missing = k.shape[-1] - v.shape[-1] if k.shape[:-1] == v.shape[:-1] else 0
    return k, pad(v, (0, missing)) if missing > 0 else v


def check_rows(indices: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The batch rows, counted from 0, that `indices` `(B',)` names: integers, or bools for `(B,)`."""
    rows = indices.nonzero().flatten() if indices.dtype == torch.bool and indices.shape == (batch_size,) else indices
    are_indices = rows.dtype in (torch.int32, torch.int64) and rows.ndim == 1 and rows.numel() > 0
    if not are_indices or not -batch_size <= int(rows.min()) <= int(rows.max()) < batch_size:
        raise ValueError(f"expected rows of a batch of {batch_size}, got {indices}")
    return rows.long() % batch_size


def shallow_copy(thing: Any) -> Any:
    """Another object of the same class with the same attributes."""
    copied = object.__new__(type(thing))
    copied.__dict__.update(thing.__dict__)
    return copied
