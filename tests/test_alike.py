"""Steps of one token: layers after the first repeat its call, unless anything that matters differs."""

import copy
import functools
import sys

import pytest
import torch
from models import tiny_model

from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache, backend, enable, set_backend
from hf_kvattn.attention import Rules, attend_layer
from hf_kvattn.kernels import dispatch, native
from hf_kvattn.masks import compact_mask

LAYERS, HEADS, KV_HEADS, DIM = 4, 6, 2, 32
CACHES = {
    "static": functools.partial(StaticKVCache, max_cache_len=600),
    "growing": StaticKVCache,
    "int4": functools.partial(QuantizedKVCache, bits=4),
    "k8v4": functools.partial(QuantizedKVCache, key_bits=8, value_bits=4),
    "sliding": functools.partial(SlidingWindowKVCache, window=20),
    "sinks": functools.partial(SlidingWindowKVCache, window=20, sinks=2),
}
SHAPE = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
SHAPE |= {"hidden_size": 96, "head_dim": DIM}
PLAIN = Rules(None, None, True, None, None, None)


@functools.cache
def config():
    return tiny_model(**SHAPE).config


def tokens(number: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, ...]]:
    """New tokens of each layer: query, key, value."""
    sizes = ((HEADS, number), (KV_HEADS, number), (KV_HEADS, number))
    return [tuple(torch.randn(batch, *size, DIM).to(dtype) for size in sizes) for _ in range(LAYERS)]


def attend(cache, new, rules=PLAIN) -> list[torch.Tensor]:
    with torch.no_grad():
        return [attend_layer(cache, i, *each, rules) for i, each in enumerate(new)]


@pytest.fixture
def repeats(monkeypatch) -> list:
    """The calls that were repeated since."""
    calls, attend = [], native.Repeated.attend
    monkeypatch.setattr(native.Repeated, "attend", lambda *given: calls.append(given) or attend(*given))
    return calls


def equal_layers(one, other) -> None:
    for a, b in zip(one.kv_layers, other.kv_layers, strict=True):
        assert {name: filled for name, (_, filled) in a.buffers().items()} == {
            name: filled for name, (_, filled) in b.buffers().items()
        }
        assert (a.seen, a.stored, a.kind) == (b.seen, b.stored, b.kind)
        for name, tensor in a.filled().items():
            assert torch.equal(tensor, b.filled()[name]), name


def one_by_one(cache, new, rules=PLAIN) -> list[torch.Tensor]:
    """`attend`, with nothing repeated."""
    found = []
    for i, each in enumerate(new):
        cache.first_alike.clear()
        found += [attend_layer(cache, i, *each, rules)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", CACHES)
def test_repeated_calls_store_and_give_the_same_bits(kind, batch, dtype, repeats):
    """Steps cross the window, the wrap of its ring, full blocks of codes, and a buffer that grows."""
    cache, other = CACHES[kind](config()), CACHES[kind](config())
    leftpad = torch.arange(batch, dtype=torch.int32)
    for step in range(120):
        new = tokens(250 if step == 0 and kind == "growing" else 5 if step == 0 else 1, batch, dtype)
        mask = compact_mask(leftpad.clone() if step % 2 else None, 0, batch, "cpu")
        # what fused projections give: views with the strides of a larger tensor
        new = [(q, *torch.cat([k, v], 1).split(KV_HEADS, 1)) for q, k, v in new]
        out = attend(cache, new, PLAIN._replace(mask=mask))
        with torch.no_grad():
            expected = one_by_one(other, new, PLAIN._replace(mask=mask))
        for one, two in zip(out, expected, strict=True):
            assert torch.equal(one, two) and one.is_contiguous()
    equal_layers(cache, other)
    steps = 0 if kind == "sinks" else 119 - (kind in ("growing", "int4"))  # which warms up in a larger buffer
    assert len(repeats) in (steps * (LAYERS - 1), 119 * (LAYERS - 1) * (kind != "sinks"))


def after_a_prompt(kind="static"):
    cache = CACHES[kind](config())
    attend(cache, tokens(9))
    return cache


def test_a_choice_of_a_backend_holds_at_the_next_layer(repeats, monkeypatch):
    monkeypatch.setattr(dispatch, "_for_process", [])
    served = []
    sdpa_attend = dispatch.BACKENDS["sdpa"].attend
    monkeypatch.setattr(dispatch.BACKENDS["sdpa"], "attend", lambda call: served.append(call) or sdpa_attend(call))
    cache = after_a_prompt()
    del served[:]
    attend(cache, tokens(1))
    assert (len(repeats), len(served)) == (LAYERS - 1, 0)
    with backend("sdpa"):
        attend(cache, tokens(1))
    assert (len(repeats), len(served)) == (LAYERS - 1, LAYERS)
    with torch.no_grad():
        new = tokens(1)
        attend_layer(cache, 0, *new[0], PLAIN)
        with backend("sdpa"):
            attend_layer(cache, 1, *new[1], PLAIN)
        set_backend("sdpa")
        attend_layer(cache, 2, *new[2], PLAIN)
        attend_layer(cache, 3, *new[3], PLAIN)
    assert (len(repeats), len(served)) == (LAYERS - 1, LAYERS + 3)
    set_backend("native")
    attend(cache, tokens(1))
    assert (len(repeats), len(served)) == (2 * (LAYERS - 1), LAYERS + 3)
    del dispatch._for_process[:]
    monkeypatch.setenv("HF_KVATTN_BACKEND", "sdpa")
    attend(cache, tokens(1))
    assert (len(repeats), len(served)) == (2 * (LAYERS - 1), 2 * LAYERS + 3)
    monkeypatch.delenv("HF_KVATTN_BACKEND")
    attend(cache, tokens(1))
    cache.crop(-1)  # the same lengths again
    monkeypatch.setenv("HF_KVATTN_BACKEND", "sdpa")
    attend(cache, tokens(1))
    assert (len(repeats), len(served)) == (3 * (LAYERS - 1), 3 * LAYERS + 3)


def test_threads_are_those_of_the_step(repeats):
    cache = after_a_prompt()
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            attend(cache, tokens(1))
        finally:
            torch.set_num_threads(before)
        repeated = repeats[-1][0]
        assert int.from_bytes(repeated._args[8:12], sys.byteorder) == threads


CHANGES = {
    "dtype": lambda q, k, v: (q.half(), k.half(), v.half()),
    "batch": lambda q, k, v: tuple(t.expand(2, -1, -1, -1) for t in (q, k, v)),
    "heads": lambda q, k, v: (q, k[:, :1], v[:, :1]),
    "values": lambda q, k, v: (q, k, v[..., :8]),
}


@pytest.mark.parametrize("kind", ["static", "int4", "sliding"])
@pytest.mark.parametrize("change", ["dtype", "batch", "heads"])
def test_what_does_not_fit_is_refused_in_every_layer(kind, change, repeats):
    cache, new = after_a_prompt(kind), tokens(1)
    with torch.no_grad():
        attend_layer(cache, 0, *new[0], PLAIN)
        with pytest.raises(ValueError):
            attend_layer(cache, 1, *CHANGES[change](*new[1]), PLAIN)
        assert cache.kv_layers[1].seen == 9 and not repeats
        attend_layer(cache, 1, *new[1], PLAIN)
    assert cache.kv_layers[1].seen == 10


def test_another_mask_softcap_or_narrow_values_are_not_repeated(repeats):
    cache, new = after_a_prompt(), tokens(1)
    other = copy.deepcopy(cache)
    masks = [torch.tensor([n], dtype=torch.int32) for n in (2, 4)]
    rules = [PLAIN._replace(mask=compact_mask(n, 0, 1, "cpu")) for n in masks]
    rules += [rules[1]._replace(softcap=3.0)] * 2  # each differs from the one before it in one thing
    with torch.no_grad():
        for i, each in enumerate(rules):
            q, k, v = CHANGES["values"](*new[i]) if i == 3 else new[i]
            out = attend_layer(cache, i, q, k, v, each)
            with backend("sdpa"):
                torch.testing.assert_close(out, attend_layer(other, i, q, k, v, each))
    assert not repeats


def test_layers_of_different_lengths_or_half_changed_are_found(repeats):
    cache, new = after_a_prompt(), tokens(1)
    cache.kv_layers[2].crop(-1)
    cache.kv_layers[3].inconsistent = "a test"
    with torch.no_grad():
        for i in range(3):
            attend_layer(cache, i, *new[i], PLAIN)
        assert len(repeats) == 1 and [layer.seen for layer in cache.kv_layers] == [10, 10, 9, 9]
        with pytest.raises(ValueError, match="a test was interrupted"):
            attend_layer(cache, 3, *new[3], PLAIN)


def test_forks_copies_and_crops_begin_anew(repeats):
    cache = after_a_prompt()
    attend(cache, tokens(1))
    forked, copied = cache.fork(), copy.deepcopy(cache)
    assert cache.first_alike and not forked.first_alike and not copied.first_alike
    new = tokens(1)
    results = [attend(each, new) for each in (cache, forked, copied)]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    before = cache.kv_layers[3]._k.clone()
    attend(forked, tokens(1))
    assert torch.equal(cache.kv_layers[3]._k[:, :, :11], before[:, :, :11])
    cache.crop(-1)
    again = attend(cache, new)
    assert all(map(torch.equal, results[0], again))


def test_gradients_are_cut_as_ever(repeats):
    cache, new = after_a_prompt(), tokens(1)
    attend_layer(cache, 0, *new[0], PLAIN)  # with gradients enabled, for tensors that need none
    q, k, v = new[1]
    out = attend_layer(cache, 1, q.requires_grad_(), k, v, PLAIN)
    assert not repeats
    with pytest.raises(RuntimeError, match="no autograd graph"):
        out.sum().backward()


def frames_of(function) -> list:
    """The Python frames that `function()` enters."""
    frames = []
    sys.setprofile(lambda frame, event, arg: frames.append(frame.f_code) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return frames[1:]


@pytest.mark.parametrize(("kind", "most"), [("static", 11), ("sliding", 11), ("int4", 18)])
@torch.no_grad()
def test_frames_of_a_layer_stay_few(kind, most):
    """A bound, so that what was won is not lost unnoticed: it was 44 to 60."""
    cache, new = after_a_prompt(kind), tokens(1)
    for _ in range(80):
        attend(cache, tokens(1))
    attend_layer(cache, 0, *new[0], PLAIN)
    frames = frames_of(lambda: attend_layer(cache, 1, *new[1], PLAIN))
    assert len(frames) <= most, [code.co_qualname for code in frames]


@torch.no_grad()
def test_frames_of_an_enabled_model_stay_few():
    """Frames of this package that a layer adds to a step of a model: hooks, handle, attention. They were 54."""
    counts = []
    for layers in (3, 7):
        model = enable(tiny_model(num_hidden_layers=layers))
        cache, ids = StaticKVCache(model.config), torch.randint(0, 64, (1, 9))
        model(input_ids=ids, past_key_values=cache)
        frames = frames_of(functools.partial(model, input_ids=ids[:, :1], past_key_values=cache))
        counts.append(sum("hf_kvattn" in code.co_filename for code in frames))
    assert (counts[1] - counts[0]) / 4 <= 24, counts
