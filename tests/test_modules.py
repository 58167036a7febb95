"""Stand-alone attention against a plain softmax at every position, and the classic bugs of KV caches, planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import tiny_config

from hf_kvattn import QuantizedKVCache, StaticKVCache, attention, backend
from hf_kvattn.caches.static_layer import KVStaticLayer
from hf_kvattn.modules import CachedSelfAttention, FixedLengthDecoder
from hf_kvattn.teaching import KVCache, cached_attention

HEADS = {"mha": (4, None, None), "gqa": (6, 2, 16), "mqa": (4, 1, 24), "one": (1, None, None)}
LENGTH = 11


def make(heads: str = "gqa", window: int | None = None, embed_dim: int = 48) -> CachedSelfAttention:
    torch.manual_seed(0)
    q_heads, kv_heads, dim = HEADS[heads]
    return CachedSelfAttention(embed_dim, q_heads, kv_heads, dim, window).requires_grad_(False)


def tokens(length: int = LENGTH, batch: int = 2, embed_dim: int = 48) -> torch.Tensor:
    return 3 * torch.randn(batch, length, embed_dim, generator=torch.Generator().manual_seed(1))


def plain(module: CachedSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """Full causal attention, one position and one head at a time."""
    config, dim = module.config, module.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    q, k, v = (p(x).unflatten(-1, (-1, dim)) for p in (module.q_proj, module.k_proj, module.v_proj))
    out = torch.zeros_like(q)
    for i in range(x.shape[1]):
        begin = 0 if module.window is None else max(0, i - module.window + 1)
        for head in range(config.num_attention_heads):
            keys, values = k[:, begin : i + 1, head // group], v[:, begin : i + 1, head // group]
            weights = torch.softmax((keys @ q[:, i, head, :, None]).squeeze(-1) / dim**0.5, -1)
            out[:, i, head] = (weights[:, None] @ values).squeeze(1)
    return module.o_proj(out.flatten(2))


def decoded(module: CachedSelfAttention, x: torch.Tensor, cache, prompt: int = 4) -> torch.Tensor:
    """A prompt in two parts, then token by token."""
    parts = [module.prefill(x[:, : prompt - 1], cache), module.prefill(x[:, prompt - 1 : prompt], cache)]
    parts += [module.step(x[:, i : i + 1], cache, position=i) for i in range(prompt, x.shape[1])]
    return torch.cat(parts, 1)


CACHES = {
    "growing": lambda config: StaticKVCache(config),
    "fixed": lambda config: StaticKVCache(config, max_cache_len=LENGTH),
    "quantized, all exact": lambda config: QuantizedKVCache(config, group_size=16, residual_length=LENGTH),
}


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("heads", HEADS)
def test_every_position_is_that_of_full_causal_attention(heads, window):
    module, x = make(heads, window), tokens()
    expected = plain(module, x)
    torch.testing.assert_close(module(x), expected)
    for name, cache in CACHES.items():
        if module.head_dim % 16 and name.startswith("quantized"):
            continue  # no groups of 16
        torch.testing.assert_close(
            decoded(module, x, cache(module.config)), expected, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_it_goes_through_the_chosen_backend(name):
    module, x = make(), tokens()
    with backend(name):
        torch.testing.assert_close(decoded(module, x, StaticKVCache(module.config)), plain(module, x))


def test_quantized_caches_are_near_and_nearer_with_more_bits():
    module, x = make("gqa"), tokens(100)
    expected = plain(module, x)
    errors = [
        (decoded(module, x, QuantizedKVCache(module.config, bits, group_size=16)) - expected).norm() / expected.norm()
        for bits in (8, 4, 2)
    ]
    assert 0 < errors[0] < 0.02 and 5 * errors[0] < errors[1] and 2 * errors[1] < errors[2]


def test_16_bit_and_a_few_steps_without_prefill():
    module, x = make().bfloat16(), tokens().bfloat16()
    out = torch.cat(
        [module.step(x[:, i : i + 1], cache) for cache in [StaticKVCache(module.config)] for i in range(5)], 1
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, plain(module, x[:, :5]), rtol=0.02, atol=0.02)


def test_training_differentiates_and_a_cache_refuses_to():
    module, x = make().requires_grad_(True), tokens()
    module(x).sum().backward()
    got = module.k_proj.weight.grad.clone()
    module.zero_grad()
    plain(module, x).sum().backward()
    torch.testing.assert_close(got, module.k_proj.weight.grad, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="no autograd graph"):
        module.prefill(x, StaticKVCache(module.config)).sum().backward()


# ---------------------------------------------------------------------------------------------- planted bugs


plain_append = KVStaticLayer.append


def transposed_cache(layer, k, v):
    plain_append(layer, k.transpose(1, 2), v.transpose(1, 2))


def increment_first(layer, k, v):
    """Counts before it writes: slot 0 is never filled."""
    if layer.seen == 0:
        plain_append(layer, torch.zeros_like(k[:, :, :1]), torch.zeros_like(v[:, :, :1]))
    plain_append(layer, k, v)


def overwrites_the_last(layer, k, v):
    """Writes before a position that was counted twice: every step replaces the token before it."""
    layer.seen = max(0, layer.seen - 1)
    plain_append(layer, k, v)


def attends_to_the_future(call):
    call.mask = torch.ones(call.q.shape[2], call.kv_len, dtype=torch.bool).triu(call.kv_len - call.q.shape[2])[
        None, None
    ]


def sees_empty_slots(call):
    call.k, call.v = (torch.nn.functional.pad(x, (0, 0, 0, 3)) for x in (call.k, call.v))
    call.mask = torch.ones(1, 1, call.q.shape[2], call.kv_len, dtype=torch.bool).tril(call.kv_len - call.q.shape[2])


def forgets_itself(call):
    call.mask = torch.ones(call.q.shape[2], call.kv_len, dtype=torch.bool).tril(call.kv_len - call.q.shape[2] - 1)[
        None, None
    ]


@pytest.mark.parametrize("bug", [attends_to_the_future, sees_empty_slots, forgets_itself])
def test_a_wrong_mask_is_caught(bug, monkeypatch):
    module, x = make(), tokens()
    attend = attention.dispatch.attend
    monkeypatch.setattr(attention.dispatch, "attend", lambda call: (bug(call), attend(call))[1])
    for out in (lambda: module(x), lambda: decoded(module, x, StaticKVCache(module.config))):
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(out(), plain(module, x))


@pytest.mark.parametrize("bug", [increment_first, overwrites_the_last, transposed_cache])
def test_a_wrong_write_is_caught(bug, monkeypatch):
    module, x = make(), tokens()
    monkeypatch.setattr(KVStaticLayer, "append", bug)
    with pytest.raises((AssertionError, ValueError), match="not close|made for 2 KV heads"):
        cache = StaticKVCache(module.config)
        out = [module.prefill(x[:, :4], cache), *(module.step(x[:, i : i + 1], cache) for i in range(4, LENGTH))]
        torch.testing.assert_close(torch.cat(out, 1), plain(module, x))


# ---------------------------------------------------------------------------------------------- step by step contracts


def test_a_fixed_length_decoder_counts_from_zero_to_its_end():
    module, x = make(), tokens()
    decoder = FixedLengthDecoder(module, x.shape)
    assert decoder.cache_index == 0
    parts = []
    for i in range(LENGTH):
        parts.append(decoder(x[:, i : i + 1]))
        assert decoder.cache_index == i + 1 and decoder.cache.layers[0].capacity == LENGTH
    torch.testing.assert_close(torch.cat(parts, 1), plain(module, x))
    before = decoder.cache.layers[0].keys.clone()
    with pytest.raises(ValueError, match=f"{LENGTH} stored tokens and 1 new"):
        decoder(x[:, :1])
    assert decoder.cache_index == LENGTH and torch.equal(decoder.cache.layers[0].keys, before)


@pytest.mark.parametrize("shape", [(2, 2, 48), (1, 1, 48), (2, 1, 40), (2, 48), (2, 0, 48)])
def test_a_fixed_length_decoder_takes_exactly_one_token_of_each_row(shape):
    decoder = FixedLengthDecoder(make(), (2, LENGTH, 48))
    with pytest.raises(ValueError, match=r"\(2, 1, 48\)"):
        decoder(torch.zeros(shape))
    assert decoder.cache_index == 0


@pytest.mark.parametrize("shape", [(2, 0, 48), (0, 5, 48), (2, 5, 40)])
def test_a_fixed_length_decoder_refuses_an_impossible_sequence(shape):
    with pytest.raises(ValueError, match="got"):
        FixedLengthDecoder(make(), shape)


def test_a_step_is_written_at_its_position_and_nowhere_else():
    module, x = make(), tokens()
    cache = StaticKVCache(module.config, max_cache_len=LENGTH)
    module.prefill(x[:, :4], cache)
    for wrong in (0, 3, 5, -1, "4"):
        with pytest.raises(ValueError, match="not the next one: the cache holds 4"):
            module.step(x[:, 4:5], cache, position=wrong)
    assert cache.get_seq_length() == 4
    out = module.step(x[:, 4:5], cache, position=4)
    torch.testing.assert_close(out, plain(module, x)[:, 4:5])
    cache.crop(-1)  # going back on purpose
    torch.testing.assert_close(module.step(x[:, 4:5], cache, position=4), out)
    keys = module.k_proj(x[:, :5]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    torch.testing.assert_close(cache.layers[0].keys, keys)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_heads": 0}, "num_heads must be.*0"),
        ({"embed_dim": 48.0}, "embed_dim must be.*48.0"),
        ({"num_kv_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads must be.*0"),
        ({"window": 0}, "window must be.*0"),
        ({"head_dim": -1}, "head_dim must be.*-1"),
        ({"embed_dim": 50}, "embed_dim=50 is not a multiple of num_heads=6"),
    ],
)
def test_impossible_sizes_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        CachedSelfAttention(**({"embed_dim": 48, "num_heads": 6} | wrong))


def test_what_does_not_fit_is_refused_and_nothing_is_stored():
    module, x = make(), tokens()
    cache = StaticKVCache(module.config, max_cache_len=6)
    module.prefill(x[:, :4], cache)
    for call, said in (
        (lambda: module.prefill(x[:, :0], cache), "at least one token"),
        (lambda: module.prefill(x[..., :40], cache), r"expected \(B, T, 48\)"),
        (lambda: module.prefill(x[0], cache), r"expected \(B, T, 48\)"),
        (lambda: module.step(x[:, :2], cache), "one token"),
        (lambda: module.prefill(x[:1, :1], cache), "batch of 2, got 1"),
        (lambda: module.prefill(x[:, :3], cache), "max_cache_len=6"),
        (lambda: module.prefill(x, StaticKVCache(make("mqa").config)), "made for 1 KV heads of 24"),
        (lambda: module.prefill(x, {"k": x}), "got dict"),
        (lambda: module.step(x[:, :1], {"k": x}, position=0), "got dict"),
        (lambda: module.prefill(x, None), "got NoneType"),
        (lambda: module.prefill(x, StaticKVCache(tiny_config())), "expected a cache made from the module's config"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert cache.get_seq_length() == 4


# ---------------------------------------------------------------------------------------------- NumPy


def arrays(*lead: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(*lead, LENGTH, d)) for d in (8, 8, 5))


def check_numpy(q, k, v, attend=cached_attention, cache=None):
    """A prompt of 3 and single tokens, against a loop over positions."""
    cache = cache or KVCache(max_len=LENGTH + 2)
    pieces = [slice(0, 3), *(slice(i, i + 1) for i in range(3, LENGTH))]
    got = np.concatenate([attend(q[..., s, :], k[..., s, :], v[..., s, :], cache, 8) for s in pieces], -2)
    for i in range(LENGTH):
        scores = (k[..., : i + 1, :] @ q[..., i, :, None])[..., 0] / np.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(got[..., i, :], (weights[..., None, :] @ v[..., : i + 1, :])[..., 0, :], rtol=1e-9)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_numpy_attention_with_a_cache_is_full_causal_attention(lead):
    check_numpy(*arrays(*lead))


class IncrementsFirst(KVCache):
    def update(self, k, v):
        if self.length == 0:
            super().update(k[..., :1, :] * 0, v[..., :1, :] * 0)
        return super().update(k, v)


class ReturnsEmptySlots(KVCache):
    def update(self, k, v):
        super().update(k, v)
        return self._k, self._v


class HeadsAfterTokens(KVCache):
    def update(self, k, v):
        k, v = super().update(k.swapaxes(0, -2), v.swapaxes(0, -2))
        return k.swapaxes(0, -2), v.swapaxes(0, -2)


def mask_the_wrong_way(q, k, v, cache, d_k):
    return cached_attention(q[..., ::-1, :], k[..., ::-1, :], v[..., ::-1, :], cache, d_k)[..., ::-1, :]


@pytest.mark.parametrize("wrong", [IncrementsFirst, ReturnsEmptySlots, HeadsAfterTokens])
def test_a_wrong_numpy_cache_is_caught(wrong):
    with pytest.raises((AssertionError, ValueError), match="Not equal|the cache holds|tokens"):
        check_numpy(*arrays(2), cache=wrong(LENGTH + 2))


def test_a_wrong_numpy_mask_is_caught():
    with pytest.raises(AssertionError, match="Not equal"):
        check_numpy(*arrays(2), attend=mask_the_wrong_way)


def test_numpy_refuses_what_does_not_fit_and_stores_nothing():
    q, k, v = arrays(2)
    cache = KVCache(max_len=12)
    cached_attention(q, k, v, cache, 8)
    for call, said in (
        (lambda: cached_attention(q, k, v, cache, 8), "11 stored tokens and 11 new ones exceed max_len=12"),
        (lambda: cache.update(k[:1, :1], v[:1, :1]), "the cache holds"),
        (lambda: cache.update(k[:, :1].astype(np.float32), v[:, :1]), "float32"),
        (lambda: cache.update(k[:, :1], v[:, :2]), "same tokens"),
        (lambda: cached_attention(q[:, :1], k[:, :1], v[:, :1], cache, 4), "d_k=4"),
        (lambda: KVCache(0), "max_len.*0"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert cache.length == LENGTH
