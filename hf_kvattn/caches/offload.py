"""`KVOffloadedLayer`: keys and values in the host's pinned memory, on the GPU only while their attention runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch

from ..quant.blocks import Quantize, quantize_blocks
from .layer import KVLayer
from .static_layer import KVStaticLayer


class _Place:
    """Room on a device for the keys and values of one layer. The layers of a cache use two of them in turns.

    Attributes:
        buffers: two of `(B, Hkv, capacity, D)`.
        holder: the layer whose tokens are there or on their way; None while it is free.
        in_use: whether work on it may have been queued after `used`.
        used: when the last attention over it is done.
        copied: when the holder's tokens have come.
        written: when new tokens are in it.
    """

    def __init__(self, layer: KVOffloadedLayer):
        self.buffers = layer._buffers(device=layer.device)
        self.holder: KVOffloadedLayer | None = None
        self.in_use = True  # by whoever had this memory before
        if layer.device.type == "cuda":
            self.used, self.copied, self.written = (torch.cuda.Event() for _ in range(3))
            for buffer in self.buffers:  # so that nobody gets this memory before the last copy has ended
                buffer.record_stream(_side_stream(layer.device))

    def fits(self, layer: KVOffloadedLayer) -> bool:
        shape = (layer.batch_size, layer.kv_heads, layer.capacity, layer.head_dim)
        buffer = self.buffers[0]
        return (buffer.shape, buffer.dtype, buffer.device) == (shape, layer.dtype, layer.device)


class KVOffloadedLayer(KVStaticLayer):
    """A layer whose buffers lie on the host. They are copied to the device for each attention.

    While one layer's attention runs, the next layer's tokens are copied on a second stream: the device holds two layers
    at a time, in places that are allocated once. New tokens are written to the place, and from there to the host on the
    second stream. Events order the two streams, so that the host may run ahead. The host's buffers have the memory
    order `(capacity, B, Hkv, D)` and are seen as `(B, Hkv, capacity, D)`: the stored tokens are one piece of memory, as
    an asynchronous copy needs.

    Attributes:
        following: the offloaded layer whose attention comes next, after the last one the first; set by the cache.
        places: those of all offloaded layers of the cache; set by the cache.
    """

    following: KVOffloadedLayer
    places: list[_Place]
    _near: _Place | None = None  # where this layer's tokens are on the device, perhaps still being copied
    _attending = False  # whether they are there for the attention that runs
    _stored: torch.cuda.Event | None = None  # when the newest tokens have reached the host

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the filled part: on the device between `append` and `finish_attention`, else on the host."""
        if not self._attending:
            self._wait_for_writes()
            return super().dense()
        assert self._near is not None
        k, v = (near[:, :, : self.seen] for near in self._near.buffers)
        return k, v

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.make_ready(k, v)
        place = self._near or self._fetch(None)
        self._attending = place.in_use = True
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.current_stream(self.device).wait_event(place.copied)
        if self.following is not self:
            self.following.fetch_beside(place)
        new = slice(self.seen, self.seen + k.shape[2])
        for near, tokens in zip(place.buffers, (k.detach(), v.detach()), strict=True):
            near[:, :, new].copy_(tokens)
        side = None
        if on_gpu:
            side = _side_stream(self.device)
            place.written.record(torch.cuda.current_stream(self.device))
            side.wait_event(place.written)
        with torch.cuda.stream(side):  # None: the current one
            for near, far in zip(place.buffers, (self._k, self._v), strict=True):
                far[:, :, new].copy_(near[:, :, new], non_blocking=True)
        if side is not None:
            self._stored = self._stored or torch.cuda.Event()
            self._stored.record(side)
        self.seen = new.stop

    def place(self) -> None:
        """None: tokens are stored twice."""

    def finish_attention(self, quantize: Quantize = quantize_blocks) -> None:
        if self._attending and self._near is not None:
            if self.device.type == "cuda":
                self._near.used.record(torch.cuda.current_stream(self.device))
            self._near.in_use = False
        self._let_go()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """For a model that is not enabled, whose attention comes after this: what is returned is overwritten when the
        next layer but one is prefetched.
        """
        out = super().update(key_states, value_states)
        for place in self.places:
            place.in_use = True
        return out

    def fetch_beside(self, occupied: _Place) -> None:
        """Starts to copy the stored tokens to the device, elsewhere than to the place that is `occupied`."""
        if self._near is None and self.seen:
            self._fetch(occupied)

    def _fetch(self, occupied: _Place | None) -> _Place:
        """Copies the stored tokens to a place, once its last attention is done; returns it."""
        place = self._take(occupied)
        side = None
        if self.device.type == "cuda":
            side = _side_stream(self.device)
            if place.in_use:
                place.used.record(torch.cuda.current_stream(self.device))
            side.wait_event(place.used)
        with torch.cuda.stream(side):
            for near, far in zip(place.buffers, (self._k, self._v), strict=True):
                near[:, :, : self.seen].copy_(far[:, :, : self.seen], non_blocking=True)
        if side is not None:
            place.copied.record(side)
        place.in_use = False
        return place

    def _take(self, occupied: _Place | None) -> _Place:
        """Makes this layer the holder of a place: a free one, a new one, or that of another layer."""
        others = [
            p for p in self.places if (p.buffers[0].shape[0], p.buffers[0].dtype) != (self.batch_size, self.dtype)
        ]
        for place in others:  # from before the cache was reset
            self.places.remove(place)
        mine = [place for place in self.places if place.fits(self)]
        others = sorted((p for p in mine if p is not occupied), key=lambda p: p.holder is not None)
        if not others or (others[0].holder is not None and len(mine) < 2):
            self.places.append(_Place(self))
            others = self.places[-1:]
        place = others[0]
        if place.holder is not None:
            place.holder._let_go()
        place.holder, self._near = self, place
        return place

    def _let_go(self) -> None:
        """Leaves the place on the device to others."""
        if self._near is not None:
            self._near.holder = None
        self._near, self._attending = None, False

    def select(self, rows: torch.Tensor) -> None:
        self._wait_for_writes()
        self._let_go()
        super().select(rows.cpu())

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, start: int) -> None:
        self._wait_for_writes()
        self._let_go()
        super().copy_rows(target.cpu(), source.cpu(), start)

    def move(self, device: torch.device | str) -> None:
        raise ValueError(f"layer {self.layer_idx} is offloaded: it stays on the host and cannot move to {device}")

    def _allocate(self, needed: int) -> None:
        assert self.max_cache_len is not None
        self._let_go()
        self.capacity = self.max_cache_len
        self._k, self._v = self._buffers(device="cpu", pin_memory=self.device.type == "cuda")

    def _buffers(self, **where) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.capacity, self.batch_size, self.kv_heads, self.head_dim)
        k, v = (torch.empty(shape, dtype=self.dtype, **where).permute(1, 2, 0, 3) for _ in range(2))
        return k, v

    def _wait_for_writes(self) -> None:
        """Waits until the host's buffers hold all tokens."""
        if self._stored is not None:
            self._stored.synchronize()

    def __deepcopy__(self, memo: dict) -> KVOffloadedLayer:
        """Copies the host's buffers alone, and the layer that follows it too, unless `memo` holds a copy of it."""
        self._wait_for_writes()
        memo[id(self)] = copied = object.__new__(type(self))
        memo.setdefault(id(self.places), [])  # the copies' own
        alone = {"_near": None, "_attending": False, "_stored": None}
        copied.__dict__.update(copy.deepcopy(self.__dict__ | alone, memo))
        return copied


@functools.lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which layers are copied while it computes."""
    return torch.cuda.Stream(device)


def link_offloaded(layers: Sequence[KVLayer]) -> None:
    """Tells each offloaded layer which one follows, and the places of all; ValueError where there is none."""
    offloaded = [layer for layer in layers if isinstance(layer, KVOffloadedLayer)]
    if not offloaded:
        raise ValueError("offload=True finds no layer to offload: all have sliding windows")
    places: list[_Place] = []
    for layer, following in zip(offloaded, offloaded[1:] + offloaded[:1], strict=True):
        layer.following, layer.places, layer._near, layer._attending = following, places, None, False
