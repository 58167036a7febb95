"""`KVOffloadedLayer`: keys and values in the host's pinned memory, on the GPU only while their attention runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch

from ..quant.blocks import Quantize, quantize_blocks
from .layer import KVLayer
from .static_layer import KVStaticLayer


class KVOffloadedLayer(KVStaticLayer):
    """A layer whose buffers lie on the host. They are copied to the device for each attention.

    While one layer's attention runs, the next layer's tokens are copied on a second stream: the device holds two layers
    at a time. New tokens are written to both places; nothing is copied back. The host's buffers have the memory
    order `(capacity, B, Hkv, D)` and are seen as `(B, Hkv, capacity, D)`: the stored tokens are one piece of memory, as
    an asynchronous copy needs.

    Attributes:
        following: the offloaded layer whose attention comes next, after the last one the first; set by the cache.
    """

    following: KVOffloadedLayer
    _coming: tuple[torch.Tensor, torch.Tensor] | None = None  # on the device, perhaps still being copied
    _here: tuple[torch.Tensor, torch.Tensor] | None = None  # on the device, for the attention that runs

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the filled part: on the device between `append` and `finish_attention`, else on the host."""
        if self._here is None:
            self._wait_for_writes()
            return super().dense()
        k, v = (near[:, :, : self.seen] for near in self._here)
        return k, v

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.make_ready(k, v)
        self.prefetch()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(_side_stream(self.device))
        self._here, self._coming = self._coming, None
        assert self._here is not None
        if self.following is not self:
            self.following.prefetch()
        new = slice(self.seen, self.seen + k.shape[2])
        for near, far, tokens in zip(self._here, (self._k, self._v), (k.detach(), v.detach()), strict=True):
            near[:, :, new].copy_(tokens)
            far[:, :, new].copy_(near[:, :, new], non_blocking=True)
        self.seen = new.stop

    def finish_attention(self, quantize: Quantize = quantize_blocks) -> None:
        self._here = None

    def prefetch(self) -> None:
        """Starts to copy the stored tokens to the device, after the work that has been queued there."""
        if not self.is_initialized or self._coming is not None:
            return
        self._coming = self._buffers(device=self.device)
        side: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            side = _side_stream(self.device)
            # Until then this memory may be in use, and the newest tokens may not have reached the host.
            side.wait_stream(torch.cuda.current_stream(self.device))
            for near in self._coming:
                near.record_stream(side)
        with torch.cuda.stream(side):  # None: the current one
            for near, far in zip(self._coming, (self._k, self._v), strict=True):
                near[:, :, : self.seen].copy_(far[:, :, : self.seen], non_blocking=True)

    def select(self, rows: torch.Tensor) -> None:
        self._wait_for_writes()
        self._here = self._coming = None
        super().select(rows.cpu())

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, start: int) -> None:
        self._wait_for_writes()
        self._here = self._coming = None
        super().copy_rows(target.cpu(), source.cpu(), start)

    def move(self, device: torch.device | str) -> None:
        raise ValueError(f"layer {self.layer_idx} is offloaded: it stays on the host and cannot move to {device}")

    def _allocate(self, needed: int) -> None:
        assert self.max_cache_len is not None
        self.capacity = self.max_cache_len
        self._k, self._v = self._buffers(device="cpu", pin_memory=self.device.type == "cuda")

    def _buffers(self, **where) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.capacity, self.batch_size, self.kv_heads, self.head_dim)
        k, v = (torch.empty(shape, dtype=self.dtype, **where).permute(1, 2, 0, 3) for _ in range(2))
        return k, v

    def _wait_for_writes(self) -> None:
        """Waits until the host's buffers hold all tokens."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def __deepcopy__(self, memo: dict) -> KVOffloadedLayer:
        """Copies the host's buffers alone, and the layer that follows it too, unless `memo` holds a copy of it."""
        if self.is_initialized:
            self._wait_for_writes()
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__ | {"_here": None, "_coming": None}, memo))
        return copied


@functools.lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which layers are copied while it computes."""
    return torch.cuda.Stream(device)


def link_offloaded(layers: Sequence[KVLayer]) -> None:
    """Tells each offloaded layer which one follows; ValueError where there is none."""
    offloaded = [layer for layer in layers if isinstance(layer, KVOffloadedLayer)]
    if not offloaded:
        raise ValueError("offload=True finds no layer to offload: all have sliding windows")
    for layer, following in zip(offloaded, offloaded[1:] + offloaded[:1], strict=True):
        layer.following = following
