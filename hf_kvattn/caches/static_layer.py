"""`KVStaticLayer`: unquantized keys and values in buffers that grow in place."""

from __future__ import annotations

import torch

from .layer import GROWTH, KVLayer, Place
from .ring import KVSlidingLayer

_MIN_CAPACITY = 256


class KVStaticLayer(KVLayer):
    """One layer's buffer, `(B, Hkv, capacity, D)` for keys and for values, allocated at the first append.

    Slots from `stored` on are uninitialised and never read; on a CPU they take no physical memory.
    """

    def __init__(self, max_cache_len: int | None, layer_idx: int, *shape: int | None):
        super().__init__(max_cache_len, layer_idx, *shape)
        self._k = self._v = torch.empty(0)

    @property
    def stored(self) -> int:
        return self.seen

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the filled part; no copy."""
        return self._k[:, :, : self.seen], self._v[:, :, : self.seen]

    def keep_latents(self, widths: tuple[int, int]) -> None:
        """Both lie beside each other, as if they were keys alone: attention reads them as one."""
        super().keep_latents(widths)
        self.expected_dim, self.value_dim = sum(widths), 0

    def latents(self) -> torch.Tensor:
        """As in the base; no copy."""
        return self._k[:, :, : self.seen]

    def buffers(self) -> dict[str, tuple[torch.Tensor, int]]:
        return {"k": (self._k, self.seen), "v": (self._v, self.seen)}

    def replace_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        self._k, self._v = buffers["k"], buffers["v"]

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.make_ready(k, v)
        end = self.seen + k.shape[2]
        if end > self.capacity:
            self._allocate(end)
        # detach: a buffer must not join the autograd graph of a forward outside no_grad
        self._k[:, :, self.seen : end].copy_(k.detach())
        self._v[:, :, self.seen : end].copy_(v.detach())
        self.seen = end

    def place(self) -> Place | None:
        return Place(self._k, self._v, self.seen) if self.seen else None

    def _allocate(self, needed: int) -> None:
        """Makes room for `needed` tokens: the whole fixed capacity, else GROWTH times as many. Stored tokens move."""
        capacity = self.max_cache_len or max(_MIN_CAPACITY, int(needed * GROWTH))
        k = self._empty(capacity, self.head_dim)
        v = torch.empty_like(k[..., : self.value_dim])
        if self.seen:
            k[:, :, : self.seen], v[:, :, : self.seen] = self.dense()
        self._k, self._v, self.capacity = k, v, capacity

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        self.seen += tokens_to_remove
        self.unchanged_prefix = min(self.unchanged_prefix, self.seen)

    def exact_prefix(self, stored: int, wanted: int) -> int:
        return wanted

    def select(self, rows: torch.Tensor) -> None:
        stored = self.seen
        k, v = self._k[:, :, :stored][rows], self._v[:, :, :stored][rows]
        if k.shape[0] != self.batch_size:
            self.batch_size, self.seen = k.shape[0], 0
            self._allocate(stored)
            self.seen = stored
        self._k[:, :, :stored], self._v[:, :, :stored] = k, v
        self.unchanged_prefix = 0

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, start: int) -> None:
        for buffer in (self._k, self._v):
            buffer[target, :, start : self.seen] = buffer[source, :, start : self.seen]


def make_static_layer(
    max_cache_len: int | None, layer_idx: int, *shape: int | None, full: type[KVStaticLayer] = KVStaticLayer
) -> KVLayer:
    """A layer that keeps its tokens unquantized: all of them, in a `full` layer, or those in its window."""
    heads, dim, window = shape
    if window is None:
        return full(max_cache_len, layer_idx, heads, dim)
    return KVSlidingLayer(window, max_cache_len, layer_idx, heads, dim)
