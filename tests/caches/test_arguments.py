"""Numbers that caches take: whole ones, or an error that names the value and changes nothing."""

import functools

import numpy as np
import pytest
import torch
from cache_table import ALL, append, contents, same, tokens
from models import tiny_config

from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache

WRONG = [-2.0, True, False, np.bool_(False), np.float64(-1), None, "-1", [-1], torch.tensor(-2.0)]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("kind", ALL)
def test_crop_takes_whole_numbers_only(kind, value):
    cache = ALL[kind](tiny_config())
    append(cache, tokens(40))
    before = contents(cache)
    for crop in (cache.crop, cache.layers[1].crop):
        with pytest.raises(ValueError, match="crop takes an int from -40 .* to 0, got") as found:
            crop(value)
        assert str(found.value).endswith(repr(value))
    assert same(contents(cache), before)
    assert [type(layer.seen) for layer in cache.layers] == [int] * 3


@pytest.mark.parametrize("value", [np.int64(-3), np.int8(-3), torch.tensor(-3), torch.tensor([-3])], ids=repr)
def test_whole_numbers_of_other_libraries_are_ints(value):
    cache = StaticKVCache(tiny_config())
    append(cache, tokens(40))
    cache.crop(value)
    assert [layer.seen for layer in cache.layers] == [37] * 3
    assert [type(layer.seen) for layer in cache.layers] == [int] * 3


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (StaticKVCache, "max_cache_len", [0, 2.0, True, "9", np.float32(3)]),
        (functools.partial(StaticKVCache, max_cache_len=9), "offload", [0, 1, "no", None]),
        (SlidingWindowKVCache, "window", [0, 8.0, True, None, "8"]),
        (functools.partial(SlidingWindowKVCache, window=8), "sinks", [-1, 8, 2.0, True, None]),
        (QuantizedKVCache, "max_cache_len", [0, 2.0, True, "9"]),
        (QuantizedKVCache, "residual_length", [-1, 0.0, False, "", 2.0]),
        (QuantizedKVCache, "group_size", [0, 24, 16.0, True]),
        (QuantizedKVCache, "sinks", [-1, 33, 0.0, False, None]),
        (QuantizedKVCache, "skip_layers", [1, None, (1.0,), (True,), (3,), ("1",), iter((1,))]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_are_honoured_or_refused(make, name, values):
    for value in values:
        with pytest.raises(ValueError, match=name) as found:
            make(tiny_config(), **{name: value})
        assert repr(value) in str(found.value)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "2", torch.tensor(2.0)], ids=repr)
def test_rows_are_repeated_a_whole_number_of_times(value):
    cache = StaticKVCache(tiny_config())
    append(cache, tokens(4))
    with pytest.raises(ValueError, match="repeats must be an int of at least 1, got"):
        cache.batch_repeat_interleave(value)
    assert cache.layers[0].batch_size == 2
