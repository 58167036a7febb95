"""The caches that are saved, copied and moved: how they are filled, and what they hold."""

from functools import partial

import pytest
import torch

from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.kernels import dispatch
from hf_kvattn.quant.calibration import Calibration

CALIBRATION = Calibration(
    model_type="llama",
    layers=3,
    kv_heads=2,
    head_dim=16,
    group_size=16,
    key_bits=(8, 2, 4),
    value_bits=(4, 3, 8),
    skip_layers=(0,),
)
KINDS = {
    "static": StaticKVCache,
    "static-fixed": partial(StaticKVCache, max_cache_len=400),
    "int8": partial(QuantizedKVCache, bits=8, group_size=16),
    "fp8-k": partial(QuantizedKVCache, key_bits="fp8", value_bits=4, group_size=16),
    "int4-skips": partial(QuantizedKVCache, bits=4, group_size=16, skip_layers=(0, -1), residual_length=5),
    "k3v2-fixed": partial(QuantizedKVCache, key_bits=3, value_bits=2, group_size=16, sinks=0, max_cache_len=400),
    "calibrated": partial(QuantizedKVCache, calibration=CALIBRATION, max_cache_len=400),
    "sliding": partial(SlidingWindowKVCache, window=30),
    "sliding-sinks": partial(SlidingWindowKVCache, window=12, sinks=3),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def append(cache, count: int, seed: int = 0, chunk: int = 23, batch: int = 2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3, 2, batch, 2, count, 16, generator=generator).to(dtype)
    for start in range(0, count, chunk):
        for layer, (k, v) in enumerate(tokens[..., start : start + chunk, :]):
            cache.layers[layer].append(k, v)
            cache.layers[layer].sink_inputs(k, None)  # as attention asks
            cache.layers[layer].finish_attention(dispatch.quantize_blocks)
    return cache


def contents(cache) -> dict[str, torch.Tensor]:
    """Everything stored, with the numbers that say how much it is."""
    found = {f"{i}.{name}": t for i, layer in enumerate(cache.layers) for name, t in layer.filled().items()}
    counts = {f"{i}.counts": torch.tensor([getattr(layer, name) for name in layer.counts])
              for i, layer in enumerate(cache.layers)}  # fmt: skip
    return found | counts


def assert_same(cache, other):
    assert type(cache) is type(other) and cache.settings == other.settings
    ours, theirs = contents(cache), contents(other)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
