"""What a KV cache is, in NumPy and as few lines as it takes. For reading; the package itself uses none of it."""

from __future__ import annotations

import numpy as np


class KVCache:
    """Keys `(..., T, d_k)` and values `(..., T, d_v)` of the tokens so far, in buffers with room for `max_len`.

    The leading axes are whatever the first tokens have: none, heads, or batch and heads.
    """

    def __init__(self, max_len: int = 1024):
        if type(max_len) is not int or max_len < 1:
            raise ValueError(f"max_len must be an int of at least 1, got {max_len!r}")
        self.max_len = max_len
        self.length = 0
        self._k = self._v = np.empty(0)

    def update(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Writes new tokens behind the stored ones; returns all keys and values, and never an empty slot.

        Raises:
            ValueError: shapes or dtypes other than those stored, or more tokens than fit; nothing is written then.
        """
        if k.ndim < 2 or k.shape[:-1] != v.shape[:-1]:
            raise ValueError(f"keys {k.shape} and values {v.shape} must be (..., T, d) of the same tokens")
        end = self.length + k.shape[-2]
        if end > self.max_len:
            raise ValueError(f"{self.length} stored tokens and {k.shape[-2]} new ones exceed max_len={self.max_len}")
        if self.length == 0:
            self._k, self._v = (np.zeros((*x.shape[:-2], self.max_len, x.shape[-1]), x.dtype) for x in (k, v))
        for new, buffer in ((k, self._k), (v, self._v)):
            if (*new.shape[:-2], new.shape[-1], new.dtype) != (*buffer.shape[:-2], buffer.shape[-1], buffer.dtype):
                raise ValueError(f"the cache holds {buffer.shape} {buffer.dtype}, got {new.shape} {new.dtype}")
        self._k[..., self.length : end, :] = k  # written at the old length, counted afterwards:
        self._v[..., self.length : end, :] = v
        self.length = end  # the other way round, slot 0 stays empty for ever
        return self._k[..., :end, :], self._v[..., :end, :]


def cached_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: KVCache, d_k: int) -> np.ndarray:
    """Attention of the newest tokens over all tokens so far, which `cache` then holds.

    Args:
        q: queries of the new tokens, `(..., T, d_k)`.
        k: their keys, `(..., T, d_k)`.
        v: their values, `(..., T, d_v)`.
        cache: the tokens before them.
        d_k: numbers of a key; scores are divided by its square root.

    Returns:
        `(..., T, d_v)`: row i is what causal attention over the whole sequence gives for that token.
    """
    if q.shape != k.shape or q.shape[-1] != d_k:
        raise ValueError(f"queries {q.shape} and keys {k.shape} must both be (..., T, {d_k=})")
    keys, values = cache.update(k, v)
    scores = q @ keys.swapaxes(-1, -2) / np.sqrt(d_k)
    new, stored = scores.shape[-2:]
    position = np.arange(stored - new, stored)[:, None]  # the new tokens are the last ones
    scores = np.where(np.arange(stored) <= position, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values
