"""Self-attention that uses this package's caches without a transformers model: MHA, GQA and MQA from one class.

    attention = CachedSelfAttention(embed_dim=512, num_heads=8, num_kv_heads=2)
    cache = StaticKVCache(attention.config, max_cache_len=1024)  # or another cache of this package
    y = attention.prefill(prompt, cache)                         # (B, T, 512) -> (B, T, 512)
    y = attention.step(token, cache)                             # (B, 1, 512) -> (B, 1, 512)

`attention(x)` without a cache is the same attention over the whole sequence, for training and for comparison.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .attention import LayerHandle, kvattn_attention
from .caches.base import KVCache
from .caches.layer import KVLayer
from .caches.static import StaticKVCache


class CachedSelfAttention(nn.Module):
    """Causal self-attention over what a cache holds. Adds no positions: rotate or embed them before.

    Args:
        embed_dim: numbers of a token, in and out.
        num_heads: query heads.
        num_kv_heads: KV heads, a divisor of `num_heads`: all of them is MHA (None), one is MQA, between is GQA.
        head_dim: numbers of a head; None means `embed_dim / num_heads`.
        window: visible tokens including the query's own, or None for all.

    Attributes:
        config: what a cache is made from: one layer of these heads and this window.

    Raises:
        ValueError: sizes that are not positive ints or do not divide each other.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
    ):
        super().__init__()
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads}
        optional = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "window": window}
        for name, size in (sizes | {key: value for key, value in optional.items() if value is not None}).items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads=} is not a multiple of {num_kv_heads=}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"{embed_dim=} is not a multiple of {num_heads=}: give head_dim")
        self.embed_dim, self.window = embed_dim, window
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        layer: dict[str, Any] = {
            "num_hidden_layers": 1,
            "hidden_size": embed_dim,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": self.head_dim,
            "layer_types": ["full_attention" if window is None else "sliding_attention"],
            "sliding_window": window,
        }
        self.config = PreTrainedConfig(**layer)
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias=False)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Attention of the tokens `x`, `(B, T, embed_dim)`, over themselves and what `cache` holds; stores them there.

        Token i sees what was stored before this call and tokens 0 to i of `x`.

        Raises:
            ValueError: `x` of another shape, or a cache that cannot take it; nothing has been stored then.
        """
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != self.embed_dim:
            raise ValueError(f"expected (B, T, {self.embed_dim}) with at least one token, got {tuple(x.shape)}")
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        handle = None
        if cache is not None:
            _only_layer(cache)
            cache.check_consistent_layers()
            handle = LayerHandle(cache, 0)
            handle.update(k, v, 0)
        out, _ = kvattn_attention(self, q, k, v, None, is_causal=True, sliding_window=self.window, kv_handle=handle)
        return self.o_proj(out.flatten(2))

    def prefill(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """The next tokens `(B, T, embed_dim)`, any number: a prompt, or another part of it."""
        _only_layer(cache)
        return self(x, cache)

    def step(self, x: torch.Tensor, cache: KVCache, position: int | None = None) -> torch.Tensor:
        """One token `(B, 1, embed_dim)`: written at its position, then attends to all up to and including it.

        Args:
            position: where the caller believes it goes, counted from 0, as in NNX-style loops; None does not say.

        Raises:
            ValueError: another number of tokens, or a `position` that is not the next one: an empty slot would be
                seen, or a stored token lost (`cache.crop` goes back on purpose). Nothing has been stored then.
        """
        if x.ndim != 3 or x.shape[1] != 1:
            raise ValueError(f"a step takes one token, (B, 1, {self.embed_dim}), got {tuple(x.shape)}")
        seen = _only_layer(cache).seen
        if position is not None and position != seen:
            raise ValueError(f"position {position!r} is not the next one: the cache holds {seen} tokens")
        return self(x, cache)


def _only_layer(cache: KVCache) -> KVLayer:
    if not isinstance(cache, KVCache) or len(cache.kv_layers) != 1:
        raise ValueError(f"expected a cache made from the module's config, got {type(cache).__name__}")
    return cache.kv_layers[0]


class FixedLengthDecoder:
    """One token a call into a cache sized once: Flax's `MultiHeadDotProductAttention(decode=True)`.

    Unlike Flax, whose last slot is overwritten from then on, a call past the end raises.

    Args:
        attention: the module whose cache this is.
        shape: of the whole sequence that will be decoded, `(B, T, embed_dim)`.
    """

    def __init__(self, attention: CachedSelfAttention, shape: tuple[int, int, int]):
        batch_size, length, embed_dim = shape
        if batch_size < 1 or embed_dim != attention.embed_dim:
            raise ValueError(f"expected (B, T, {attention.embed_dim}), got {tuple(shape)}")
        self.attention, self.token_shape = attention, (batch_size, 1, embed_dim)
        self.cache = StaticKVCache(attention.config, max_cache_len=length)

    @property
    def cache_index(self) -> int:
        """Position of the next token: 0 at first."""
        return self.cache.get_seq_length()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The next token, `(B, 1, embed_dim)` in and out.

        Raises:
            ValueError: another shape, or no room; nothing has been stored then.
        """
        if x.shape != self.token_shape:
            raise ValueError(f"expected one token of each row, {self.token_shape}, got {tuple(x.shape)}")
        return self.attention.step(x, self.cache)
