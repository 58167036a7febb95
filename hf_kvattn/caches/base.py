"""`KVCache`: the base of every cache class. It checks all layers before it changes any of them."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import Cache

from ..quant.blocks import Quantize
from .configs import check_config, fingerprint, head_shares, layer_needs
from .consistency import changing_all, check_consistent_layers, crop
from .fork import SharedTensors, can_share, log_copy
from .layer import KVLayer, check_rows, shallow_copy
from .positions import StreamPosition
from .recurrent import RecurrentLayer
from .reorder import reorder_rows
from .tickets import issue_ticket

TokenIds = torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Any]


class KnownPrefix(NamedTuple):
    """What a loaded cache knows of its tokens: the `hash_ids` of the first `length` of each row, padding included."""

    sha256: str
    length: int


def hash_ids(token_ids: TokenIds, batch_size: int, length: int) -> str:
    """sha256 of the ids as little-endian int64, row after row.

    Raises:
        ValueError: `token_ids`, or its `input_ids` if it is a mapping, are not integers `(batch_size, length)`, or
            `(length,)` for a batch of one.
    """
    try:
        ids = torch.as_tensor(token_ids.get("input_ids") if isinstance(token_ids, Mapping) else token_ids).cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"token_ids must be integers: {error}") from error
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token_ids must be integers, got {ids.dtype}")
    if ids.shape not in [(batch_size, length), *([(length,)] if batch_size == 1 else [])]:
        raise ValueError(f"token_ids are {ids.shape}, the cache holds {(batch_size, length)} tokens")
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def check_max_cache_len(max_cache_len: int | None) -> None:
    if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
        raise ValueError(f"max_cache_len must be an int of at least 1, or None, got {max_cache_len!r}")


class KVCache(Cache):
    """A transformers `Cache` that keeps attention's keys and values in `KVLayer`s.

    Args:
        config: the model's config, or that of a composite model; its decoder counts. Of a tensor-parallel model it must
            be `model.config` itself, which says so: the cache then holds this process's share of the KV heads.
        make_layer: called with (layer_idx, KV heads or None, head_dim or None, native sliding window or None) for each
            layer that stores keys and values.

    Attributes:
        layers: one for each layer of the model, as transformers asks for them: a `KVLayer`, a `RecurrentLayer` (linear
            attention, convolutions), or a `DummyLayer` that stores nothing.
        kv_layers: the keys and values among them, in order; at least one.
        states: the recurrent ones, which most models do not have.
        lender_of: of layers that store nothing and attend to another layer's tokens, that other layer.
        attended: of each layer with attention, the one whose tokens it is over: its own, or its lender's.
        lenders: those others. Their attention is done when that of the last layer in `lender_of` is.
        latent_layers: layers that store latents in the place of keys and values.

    Raises:
        ValueError: a model whose layers these caches cannot hold, with the reason.
    """

    kv_layers: list[KVLayer]
    states: list[RecurrentLayer]
    # True only during a `generate()` that compiles: transformers compiles by itself where it is True.
    is_compileable = False
    # Whether recurrent states have moved on in the forward that runs; None outside of those that tell of their end.
    _moving: bool | None = None
    checked_config: Any = None  # the model's, from a forward's first layer on: the hooks look at it once a forward
    steps: Any = None  # during a `generate()` that records CUDA graphs: the `graphs.DecodeSteps` of this cache
    counts_positions = False  # whether `positions` answers with other positions than the model's
    # Of `SlidingWindowKVCache`: see `stands_at`. The next token of other caches depends on their layers alone.
    _stream_position = _next_position = StreamPosition()
    settings: dict[str, Any]  # the subclass's own arguments: `type(cache)(config, **cache.settings)` is one like it

    def __init__(self, config: PreTrainedConfig, make_layer: Callable[..., KVLayer]):
        check_config(config)
        decoder = config.get_text_config(decoder=True)
        layers: list[Any] = []
        needs, shares = layer_needs(decoder), head_shares(config)
        for i, need in enumerate(needs):
            heads = need.heads and need.heads // shares
            kv = make_layer(i, heads, need.dim, need.window) if need.keys else None
            if kv is not None and need.latent is not None:
                kv.keep_latents(need.latent)
            layers.append(RecurrentLayer(i, need.states, kv) if need.states else kv or cache_utils.DummyLayer())
        super().__init__(layers=layers)
        self.lent: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # new tokens of lenders, during a forward
        self.lender_of = {i: need.lender for i, need in enumerate(needs) if need.lender is not None}
        self.lenders = frozenset(self.lender_of.values())
        self.first_alike: dict[tuple, Any] = {}  # of `alike.py`, by the kind of layer
        self._sort_layers()
        self.latent_layers = frozenset(i for i, need in enumerate(needs) if need.keys and need.latent is not None)
        self.fingerprint = fingerprint(decoder)  # of the model: a copy, since the config may change
        if shares > 1:  # neighbours in rank share a model out: the innermost dimension of transformers' meshes
            self.fingerprint["kv_heads_of"] = f"process {torch.distributed.get_rank() % shares} of {shares}"
        # See caches/reorder.py; it holds as far as layers are unchanged.
        self._common_prefix = torch.zeros(0, 0, dtype=torch.long)
        self._shared: SharedTensors | None = None  # the memory of forks; it holds while layers are unchanged
        self.ticket = issue_ticket(self)  # by which compiled graphs find this cache
        self.known_prefix: KnownPrefix | None = None  # what a loaded cache knows of the tokens in it

    def _sort_layers(self) -> None:
        """Finds `kv_layers`, `states` and `attended` among `layers`."""
        self.states = [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]
        held = [layer.kv if isinstance(layer, RecurrentLayer) else layer for layer in self.layers]
        self.kv_layers = [layer for layer in held if isinstance(layer, KVLayer)]
        self._kv_of = {layer.layer_idx: layer for layer in self.kv_layers}
        self.attended = self._kv_of | {index: self._kv_of[lender] for index, lender in self.lender_of.items()}

    def begin_forward(self, batch_size: int) -> None:
        """Called before a forward of the model: from here on it is known whether it came to its end.

        Raises:
            ValueError: an earlier one did not, and moved recurrent states on, or left layers of different lengths; or
                another batch size than that of recurrent states, which nothing else compares.
        """
        self.check_consistent_layers()
        if self.states and self.get_seq_length() and batch_size != self.kv_layers[0].batch_size:
            raise ValueError(f"the cache holds a batch of {self.kv_layers[0].batch_size}, got {batch_size}")
        self.lent.clear()
        self._moving = False if self.states else None

    def end_forward(self) -> None:
        self._moving = self.checked_config = None

    def _note_moving(self) -> None:
        self._moving = None if self._moving is None else True

    def update_conv_state(self, *args, **kwargs) -> torch.Tensor:
        self._note_moving()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> torch.Tensor:
        self._note_moving()
        return super().update_recurrent_state(*args, **kwargs)

    def get_conv_state(self, *args, **kwargs) -> torch.Tensor | None:
        """As in transformers. What it returns is written to in place by some models."""
        self._note_moving()
        return super().get_conv_state(*args, **kwargs)

    def check_prompt(self, input_ids: torch.Tensor) -> None:
        """Raises ValueError if the cache is known to hold other tokens than the first ones of `input_ids` `(B, T)`."""
        if self.known_prefix is None:
            return
        sha256, length = self.known_prefix
        begin = input_ids[:, :length]
        if hash_ids(begin, *begin.shape) != sha256:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} do not begin with the {length} tokens that the cache was loaded "
                "with: pass those and then the new ones, or load the cache of this prompt"
            )

    def stands_at(self) -> StreamPosition:
        """Where a stream stands: behind the tokens for which positions were asked last, unless they were refused."""
        return self._next_position if self._next_position.seen == self.get_seq_length() else self._stream_position

    def check_consistent_layers(self) -> None:
        """Raises ValueError, with the way out, if an interrupted forward left the layers inconsistent."""
        if self._moving:
            raise ValueError(
                "a forward was interrupted half way, and recurrent states cannot go back: only reset() makes the cache "
                "usable again"
            )
        self.check_lengths()

    def check_lengths(self) -> None:
        """The same within a forward, which moves recurrent states on."""
        check_consistent_layers(self.kv_layers)

    def _note_changes(self) -> None:
        """Limits what is known of rows and forks to the tokens that no layer has changed since the last call."""
        self._shared = None  # first: an interrupt must not leave shared memory beside layers that look unchanged
        self._common_prefix = self._common_prefix.clamp(max=min(layer.unchanged_prefix for layer in self.kv_layers))
        for layer in self.kv_layers:
            layer.unchanged_prefix = layer.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As in transformers, which asks layer 0 before any layer stores: the time to find an inconsistent cache."""
        if layer_idx == 0:
            self.check_lengths()
        return self._tokens_of(layer_idx).get_mask_sizes(query_length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens ever seen and not cropped."""
        return self._tokens_of(layer_idx).seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self._tokens_of(layer_idx or 0).get_max_length()

    def _tokens_of(self, layer_idx: int) -> KVLayer:
        """The layer whose tokens stand for those of layer `layer_idx`: 0 is asked for without looking what it is."""
        return self.kv_layers[0] if layer_idx == 0 else self.layer(layer_idx)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have recurrent states alone; others tell lengths."""
        return [isinstance(layer, RecurrentLayer) and layer.kv is None for layer in self.layers]

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens from all layers, or from none.

        It also repairs a cache whose forward was interrupted: the number is counted from the longest layer, and leads
        to a length that all layers hold.

        Raises:
            ValueError: a number of tokens that not all layers hold; nothing has changed then.
        """
        if self._moving and tokens_to_remove != -self.get_seq_length():
            self.check_consistent_layers()
        crop(self.kv_layers, tokens_to_remove, self.states)
        self._moving = None
        if self.known_prefix is not None and self.get_seq_length() < self.known_prefix.length:
            self.known_prefix = None

    def exact_prefix(self, stored: int, wanted: int) -> int:
        """How many of its first `wanted` tokens a cache like this can keep of `stored`, and change none of them.

        `crop` to so many rounds nothing, and breaks none of the settings. Where no such number is known, it is 0. Only
        the settings count, not what is stored here now.
        """
        kept = 0 if self.states and wanted != stored else wanted
        for layer in self.kv_layers:
            kept = min(kept, layer.exact_prefix(stored, kept))
        return kept if all(layer.exact_prefix(stored, kept) == kept for layer in self.kv_layers) else 0

    def reset(self) -> None:
        for layer in self.kv_layers:
            layer.reset()
        for state in self.states:
            state.reset()
        self.known_prefix = self._moving = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """For beam search: row i becomes what row `beam_idx[i]` was. Only tokens that differ between rows are moved."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times, one copy after the other."""
        if type(repeats) is not int or repeats < 1:
            raise ValueError(f"repeats must be an int of at least 1, got {repeats!r}")
        if self.get_seq_length():
            self.batch_select_indices(torch.arange(self.kv_layers[0].batch_size).repeat_interleave(repeats))

    @torch.inference_mode(False)
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the batch rows that `indices` `(B',)` names (integers, or bools for `(B,)`), in its order.

        Raises:
            ValueError: rows that are not there; nothing has changed then.
        """
        self.check_consistent_layers()
        if not self.get_seq_length():
            return
        batch_size = self.kv_layers[0].batch_size
        rows = check_rows(indices.cpu(), batch_size)
        if torch.equal(rows, torch.arange(batch_size)):
            return
        self._note_changes()
        self.known_prefix = None
        with changing_all(self.kv_layers, "reordering of the batch"):
            self._common_prefix = reorder_rows(self.kv_layers, rows, self._common_prefix)
            for state in self.states:
                state.change(lambda t: t[rows.to(t.device)])

    @torch.inference_mode(False)
    def fork(self) -> KVCache:
        """Another cache with the same contents; both can go on independently.

        On Linux and a CPU the memory of the common prefix is shared by pages of 4 KiB. A page is copied when one of the
        caches writes to it. A cache that outgrows its capacity moves to memory of its own: give `max_cache_len`. On
        other systems and devices, and where the system allows no more open files, a fork is a deep copy.
        """
        self.check_consistent_layers()
        tensors = [pair for layer in self.kv_layers for pair in layer.buffers().values()]
        if not self.get_seq_length() or not can_share([tensor for tensor, _ in tensors]):
            return copy.deepcopy(self)
        same = self._shared is not None and self._shared.fits([tensor for tensor, _ in tensors])
        try:
            if not same or any(layer.unchanged_prefix != layer.seen for layer in self.kv_layers):
                self._note_changes()
                self._shared = SharedTensors(tensors)
                self._replace_buffers(self._shared)
            forked = shallow_copy(self)
            forked.layers = [
                layer.fork() if isinstance(layer, RecurrentLayer) else shallow_copy(layer) for layer in self.layers
            ]
            forked._sort_layers()
            forked.first_alike, forked.checked_config = {}, None
            forked._replace_buffers(self._shared)
        except (OSError, RuntimeError):  # the second from PyTorch
            log_copy()
            return copy.deepcopy(self)
        forked.ticket = issue_ticket(forked)
        return forked

    def _replace_buffers(self, shared: SharedTensors) -> None:
        views = iter(shared.views())
        for layer in self.kv_layers:
            layer.replace_buffers({name: next(views) for name in layer.buffers()})

    def __deepcopy__(self, memo: dict) -> KVCache:
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__dict__.update(
            copy.deepcopy({**self.__dict__, "_shared": None, "first_alike": {}, "checked_config": None}, memo)
        )
        copied.ticket = issue_ticket(copied)
        return copied

    def __getstate__(self) -> bytes:
        """Not tensors: those `multiprocessing` moves to memory that the other process would see and change."""
        return pickle.dumps(copy.deepcopy(self).__dict__)

    def __setstate__(self, state: bytes) -> None:
        self.__dict__.update(pickle.loads(state))
        self.ticket = issue_ticket(self)

    def to(
        self, device: torch.device | torch.dtype | str | int | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """Moves keys and values to `device`, in place, and returns the cache. An unused cache needs no move.

        accelerate calls it before each module that it dispatched: where layers are there already, nothing happens.

        Raises:
            ValueError: another dtype than the cache holds. Converted keys and values are not those that the model in
                that dtype would have stored, and codes cannot be converted. Or the device `meta`, which holds no data.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        used = [layer for layer in self.kv_layers if layer.is_initialized]
        for layer in used:
            if dtype not in (None, layer.dtype):
                raise ValueError(
                    f"a cache of {layer.dtype} is not converted to {dtype}: its keys and values would not be those "
                    "of the model in that dtype; let the model fill a new cache"
                )
        if used and device is not None and torch.device(device).type == "meta":
            raise ValueError(
                "a cache cannot move to the device 'meta', which holds no data: an offloaded layer needs an "
                "execution_device to run on"
            )
        if device is not None:
            for layer in used:
                if layer.device == torch.device(device):
                    continue
                layer.move(torch.device(device))
                layer.device = next(iter(layer.buffers().values()))[0].device
            for state in self.states:
                state.change(lambda t: t.to(device))
        return self

    def positions(
        self, asked: torch.Tensor | None, new: int, device: torch.device, padded: bool = False
    ) -> torch.Tensor | None:
        """Position ids `(B or 1, T)` of the next `new` tokens, where the model would use `asked`; None for its own."""
        return asked

    def finish_lent(self, layer_idx: int, quantize: Quantize) -> None:
        """Called when layer `layer_idx` has attended to another's tokens: after the last one all may be compressed."""
        if layer_idx == max(self.lender_of):
            self.lent.clear()
            for lender in self.lenders:
                self.layer(lender).finish_attention(quantize)

    def graph_obstacle(self) -> str | None:
        """What a CUDA graph requires and this cache does not have, or None."""
        if len(self.kv_layers) != len(self.layers) or self.states:
            return "a model whose layers all store keys and values, and nothing else"
        if self.latent_layers:
            return "a model that stores keys and values, not latents"
        return self._graph_obstacle()

    def _graph_obstacle(self) -> str | None:
        return f"a StaticKVCache or QuantizedKVCache with max_cache_len, not a {type(self).__name__}"

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Stores new tokens `(B, Hkv, T, D)` of a layer; returns all its keys and values, dense."""
        return self.layer(layer_idx).update(key_states, value_states, *args, **kwargs)

    def layer(self, layer_idx: int) -> KVLayer:
        """One layer's keys and values; ValueError where there are none of that index."""
        if layer_idx >= len(self.layers):
            raise ValueError(f"the cache has {len(self.layers)} layers, the model asks for layer {layer_idx}")
        layer = self._kv_of.get(layer_idx)
        if layer is None:
            raise ValueError(f"layer {layer_idx} of the model stores no keys and values")
        return layer

    @property
    def max_cache_len(self) -> int:
        """Tokens that fit; -1 for a cache that grows. Other libraries ask for it by this name."""
        return self.get_max_length()

    @property
    def nbytes(self) -> int:
        """Bytes allocated: keys and values, capacity that is not filled yet included, and recurrent states."""
        return sum(layer.nbytes for layer in self.kv_layers) + sum(state.nbytes for state in self.states)

    @property
    def bits_per_element(self) -> float:
        """Average bits per number of keys and values when full: their bytes over the numbers that fit."""
        numbers = sum(
            layer.batch_size * layer.kv_heads * layer.capacity * width
            for layer in self.kv_layers
            if layer.is_initialized
            for width in (layer.head_dim, layer.head_dim if layer.value_dim is None else layer.value_dim)
        )
        if not numbers:
            raise ValueError("an empty cache has no bits per element: its dtype is known after the first forward")
        return 8 * sum(layer.nbytes for layer in self.kv_layers) / numbers
