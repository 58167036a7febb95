"""`StaticKVCache`: unquantized keys and values in preallocated buffers."""

from __future__ import annotations

import functools

from transformers import PreTrainedConfig

from .base import KVCache, check_max_cache_len
from .offload import KVOffloadedLayer, link_offloaded
from .static_layer import KVStaticLayer, make_static_layer


class StaticKVCache(KVCache):
    """Stores keys and values in buffers that are allocated once; new tokens are written in place.

        cache = StaticKVCache(model.config, max_cache_len=8192)
        model.generate(**inputs, past_key_values=cache)

    Attention reads the filled part only, so spare capacity costs no time, and on a CPU no physical memory either.

    Args:
        config: the model's config.
        max_cache_len: tokens that fit; one more raises before anything is written. None grows: a full buffer moves into
            one 1.5 times as large.
        offload: keep layers of full attention in the host's pinned memory. The GPU holds two of them at a time: the one
            whose attention runs, and the next. Each step moves the whole cache over the bus once. Needs
            `max_cache_len`.

    Raises:
        ValueError: `max_cache_len` below 1, `offload` without it or without a layer of full attention, an argument of
            another type, or an unsupported model (`caches.configs.check_config`).
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None = None, offload: bool = False):
        check_max_cache_len(max_cache_len)
        if type(offload) is not bool:
            raise ValueError(f"offload must be True or False, got {offload!r}")
        if offload and max_cache_len is None:
            raise ValueError(f"{offload=} needs max_cache_len: pinned memory does not grow")
        full = KVOffloadedLayer if offload else KVStaticLayer  # a layer with a window is small: it stays on the device
        super().__init__(config, functools.partial(make_static_layer, max_cache_len, full=full))
        if offload:
            if self.latent_layers:
                raise ValueError(f"{offload=} does not serve multi-head latent attention: latents are small")
            link_offloaded(self.kv_layers)
        self.offloads = offload
        self.settings = {"max_cache_len": max_cache_len}  # `offload` is left out: it does not change what is stored

    def _graph_obstacle(self) -> str | None:
        if self.offloads:
            return "layers that stay on the GPU: a StaticKVCache without offload=True"
        if self.settings["max_cache_len"] is None:
            return "a cache that does not grow: give StaticKVCache a max_cache_len"
        return None

    def fork(self) -> KVCache:
        forked = super().fork()
        if self.offloads:
            link_offloaded(forked.kv_layers)
        return forked
