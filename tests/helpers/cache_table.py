"""The caches that every test of their lives and of generation runs through: one row for each."""

import functools

import torch

from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.kernels import dispatch

# What they hold is what they were given, as long as the tests need it: stock's tokens are due.
EXACT = {
    "static": StaticKVCache,
    "static-sized": functools.partial(StaticKVCache, max_cache_len=160),
    "quantized-late": functools.partial(QuantizedKVCache, bits=4, group_size=16, residual_length=200),
    "sliding-late": functools.partial(SlidingWindowKVCache, window=200),
}
# Rounded: due are the tokens of the reference backend, from the same contents.
ROUNDED = {
    "int8": functools.partial(QuantizedKVCache, bits=8, group_size=16),
    "int4-sized": functools.partial(QuantizedKVCache, bits=4, group_size=16, max_cache_len=200),
}
# Not what `native` reads.
FP8 = {"fp8": functools.partial(QuantizedKVCache, bits="fp8", group_size=16)}
ALL = EXACT | ROUNDED | FP8


def tokens(count: int, batch: int = 2, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values for each of three layers."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(batch, 2, count, 16, generator=generator) for _ in "kv") for _ in range(3)]


def append(cache, new) -> None:
    for index, (k, v) in enumerate(new):
        cache.update(k, v, index)


def contents(cache) -> list[torch.Tensor]:
    return [t.clone() for layer in cache.layers for t in layer.dense()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def forward(cache, new) -> None:
    """As on an enabled model: the layer's writer, what attention reads, and the compression after it."""
    cache.get_mask_sizes(new[0][0].shape[2], 0)
    for index, (k, v) in enumerate(new):
        cache.layers[index].append(k, v)
        cache.layers[index].stored_kv()
        cache.layers[index].finish_attention(dispatch.quantize_blocks)
