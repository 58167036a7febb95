"""The caches that every test of their lives and of generation runs through: one row for each."""

import functools

from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache

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
ALL = EXACT | ROUNDED
