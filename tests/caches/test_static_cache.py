"""StaticKVCache on its own: bytes, bounds, refusals that leave it usable, and the calls that generate() makes."""

import pytest
import torch
from models import generate, prompt, tiny_config, tiny_model
from transformers import DynamicCache

import hf_kvattn
from hf_kvattn import StaticKVCache
from hf_kvattn.attention import LayerHandle


def tokens(count: int = 3, batch: int = 2, heads: int = 2, dim: int = 16, dtype=torch.float32):
    return torch.randn(batch, heads, count, dim).to(dtype), torch.randn(batch, heads, count, dim).to(dtype)


def filled(count: int = 5, **kwargs) -> StaticKVCache:
    cache = StaticKVCache(tiny_config(), **kwargs)
    for layer in range(3):
        cache.update(*tokens(count), layer)
    return cache


def contents(cache) -> list[torch.Tensor]:
    return [t.clone() for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (tokens(6), r"layer 0: 5 stored tokens and 6 new ones exceed max_cache_len=10"),
        (tokens(1, batch=3), r"holds a batch of 2, got 3"),
        (tokens(1, heads=4), r"made for 2 KV heads of 16, got 4 of 16"),
        (tokens(1, dim=8), r"made for 2 KV heads of 16, got 2 of 8"),
        (tokens(1, dtype=torch.bfloat16), r"holds torch.float32 on cpu, got torch.bfloat16"),
        ((tokens(1)[0].to("meta"), tokens(1)[1].to("meta")), r"holds torch.float32 on cpu, got torch.float32 on meta"),
        ((tokens(1)[0], tokens(2)[1]), r"\(2, 2, 1, 16\) and values \(2, 2, 2, 16\)"),
        ((tokens(1)[0], tokens(1)[1].half()), r"keys are torch.float32 on cpu, values torch.float16"),
        ((tokens(1)[0][0], tokens(1)[1][0]), r"must both be \(B, Hkv, T, D\)"),
    ],
    ids=["capacity", "batch", "heads", "dim", "dtype", "device", "lengths", "mixed-dtypes", "ndim"],
)
def test_bad_tokens_are_refused_before_anything_is_written(bad, message):
    cache = filled(5, max_cache_len=10)
    before = contents(cache)
    buffers = [layer._k.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match=message):
        cache.update(*bad, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache), strict=True))
    assert all(torch.equal(b.nan_to_num(), x._k.nan_to_num()) for b, x in zip(buffers, cache.layers, strict=True))
    k, v = tokens(5)
    keys, values = cache.update(k, v, 0)  # still usable, to the last slot
    assert torch.equal(keys[:, :, 5:], k) and torch.equal(values[:, :, 5:], v) and cache.get_seq_length() == 10


def test_layers_beyond_the_models_are_refused():
    with pytest.raises(ValueError, match="3 layers.*layer 3"):
        filled().update(*tokens(), 3)
    with pytest.raises(ValueError, match="3 layers.*layer 7"):
        LayerHandle(filled(), 7)
    with pytest.raises(ValueError, match="layer 1 .* store layer 2"):
        LayerHandle(filled(), 1).update(*tokens(), 2)


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_impossible_capacities(value):
    with pytest.raises(ValueError, match=f"max_cache_len .* got {value!r}"):
        StaticKVCache(tiny_config(), max_cache_len=value)


def test_capacity_exceeded_inside_generate_leaves_the_cache_usable():
    model = tiny_model()
    cache = StaticKVCache(model.config, max_cache_len=20)
    with hf_kvattn.enabled(model):
        with pytest.raises(ValueError, match="20 stored tokens and 1 new ones exceed max_cache_len=20"):
            generate(model, prompt(), new_tokens=30, past_key_values=cache)
        assert [layer.seen for layer in cache.layers] == [20, 20, 20]
        cache.crop(-10)
        cache.crop(-1)  # generate() wants one token that is not cached yet
        start = {name: tensor[:, :10] for name, tensor in prompt().items()}
        ours, our_logits = generate(model, start, new_tokens=5, past_key_values=cache)
    expected, logits = generate(model, start, new_tokens=5)
    assert torch.equal(ours, expected)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-4)


def test_bytes_are_those_allocated():
    cache = filled(5, max_cache_len=40)
    assert cache.nbytes == 3 * 2 * (2 * 2 * 40 * 16) * 4
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for x in cache.layers for t in (x._k, x._v))
    assert cache.bits_per_element == 32
    empty = StaticKVCache(tiny_config())
    assert empty.nbytes == 0
    with pytest.raises(ValueError, match="empty cache"):
        _ = empty.bits_per_element


def test_appending_moves_nothing():
    cache = filled(5, max_cache_len=64)
    pointers = [layer._k.data_ptr() for layer in cache.layers]
    for _ in range(30):
        for layer in range(3):
            keys, _ = cache.update(*tokens(1), layer)
            assert keys.data_ptr() == pointers[layer]  # what is returned is a view of the buffer
    assert pointers == [layer._k.data_ptr() for layer in cache.layers]


def test_calls_of_generate_do_what_transformers_caches_do():
    """The same calls on a DynamicCache and on ours leave the same contents."""
    ours, stock = StaticKVCache(tiny_config(), max_cache_len=50), DynamicCache(config=tiny_config())

    def both(call):
        results = [call(cache) for cache in (ours, stock)]
        for ours_layer, stock_layer in zip(ours.layers, stock.layers, strict=True):
            assert torch.equal(ours_layer.keys, stock_layer.keys)
            assert torch.equal(ours_layer.values, stock_layer.values)
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_mask_sizes(3, 0) == stock.get_mask_sizes(3, 0)
        return results

    def append(count, batch=2):
        new = [tokens(count, batch) for _ in range(3)]
        both(lambda cache: [cache.update(*new[i], i) for i in range(3)])

    append(7)
    both(lambda cache: cache.activate_past_recording())
    both(lambda cache: cache.crop(-3))
    both(lambda cache: cache.crop(0))
    append(2)
    both(lambda cache: cache.reorder_cache(torch.tensor([1, 1])))
    both(lambda cache: cache.batch_repeat_interleave(3))
    append(1, batch=6)
    both(lambda cache: cache.batch_select_indices(torch.tensor([5, 0, 2])))
    append(4, batch=3)
    assert ours.layers[0].capacity == 50 and ours.batch_size == 3 and ours.is_croppable
    assert ours.get_max_length() == 50 and StaticKVCache(tiny_config()).get_max_length() == -1


def test_crop_refuses_what_it_cannot_do():
    cache = filled(5)
    for wrong in (1, -6):
        with pytest.raises(ValueError, match=f"from -5 .* got {wrong}"):
            cache.crop(wrong)
    assert cache.get_seq_length() == 5
    cache.crop(-5)
    assert cache.get_seq_length() == 0 and cache.layers[0].keys.shape == (2, 2, 0, 16)


def test_reset_keeps_the_buffers_and_serves_again():
    cache = filled(5, max_cache_len=8)
    pointer = cache.layers[0]._k.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    k, v = tokens(8)
    assert torch.equal(cache.update(k, v, 0)[0], k) and cache.layers[0]._k.data_ptr() == pointer


def test_gradients_through_stored_tokens_raise_instead_of_being_wrong():
    model = tiny_model()
    ids = prompt()["input_ids"]
    for hooked in (False, True):
        if hooked:
            hf_kvattn.enable(model)
        loss = model(ids, past_key_values=StaticKVCache(model.config)).logits.sum()  # a forward outside no_grad works
        with pytest.raises(RuntimeError, match="no autograd graph"):
            loss.backward()
