"""Multi-head latent attention: latents are stored once, and few queries are taken to them."""

import functools

import pytest
import torch
from model_sweep import model_of
from torch import nn
from transformers import DynamicCache

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.kernels import native, reference, sdpa
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.latents import FEW, absorbs
from hf_kvattn.models import attention_modules

FAMILIES = ("deepseek_v3", "deepseek_v2", "minicpm3", "glm4_moe_lite")
RANK, ROPE = 16, 16  # of the tiny models


@functools.cache
def model(family: str):
    torch.use_deterministic_algorithms(True, warn_only=True)
    return hf_kvattn.enable(model_of(family))


def ids(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 128, (batch, count), generator=torch.Generator().manual_seed(count))


def logits(family: str, cache, parts: list[torch.Tensor], padding: int = 0) -> torch.Tensor:
    return logits_of(model(family), cache, parts, padding)


def logits_of(model, cache, parts: list[torch.Tensor], padding: int = 0) -> torch.Tensor:
    """Of the last part; the first row begins with `padding` tokens that nobody sees."""
    done = 0
    for part in parts:
        done += part.shape[1]
        mask = torch.ones(len(part), done, dtype=torch.long)
        mask[0, :padding] = 0
        with torch.no_grad():
            out = model(part, past_key_values=cache, attention_mask=mask).logits
    return out


# Parts of a text: steps, and more or fewer tokens than are taken to the latents, with and without a past.
PARTS = {"steps": [40, 1, 1], "few": [FEW + 9, FEW], "many": [30, FEW + 1], "parts": [1, 5, FEW + 40, 3]}


@pytest.mark.parametrize("padding", [0, 20])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_stock(family, parts, padding):
    tokens = [ids(count) for count in PARTS[parts]]
    stock = hf_kvattn.disable(model(family))
    try:
        expected = logits(family, DynamicCache(config=stock.config), tokens, padding)
    finally:
        hf_kvattn.enable(stock)
    got = logits(family, StaticKVCache(stock.config), tokens, padding)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_expands_its_own_token_alone(family, monkeypatch):
    seen = []
    for module in attention_modules(model(family)):
        assert absorbs(module)
        expand = module.expand_kv
        monkeypatch.setattr(module, "expand_kv", lambda c, r, expand=expand: seen.append(c.shape[2]) or expand(c, r))
    logits(family, StaticKVCache(model(family).config), [ids(50), ids(1), ids(3)])
    assert set(seen) == {50, 1, 3}


def test_latents_are_all_that_is_stored():
    config = model("deepseek_v3").config
    cache = StaticKVCache(config, max_cache_len=64)
    logits("deepseek_v3", cache, [ids(40)])
    assert cache.nbytes == config.num_hidden_layers * 2 * 64 * (RANK + ROPE) * 4
    assert cache.bits_per_element == 32
    packed = QuantizedKVCache(config, bits=4, max_cache_len=1024)
    logits("deepseek_v3", packed, [ids(900)])
    assert packed.nbytes < 0.3 * 1024 / 64 * cache.nbytes


def test_an_adapter_that_comes_after_enable_is_not_passed_over():
    """A wrapped matrix still has a `weight`, without what the adapter adds."""
    peft = pytest.importorskip("peft")
    adapted = hf_kvattn.enable(model_of("deepseek_v3"))
    settings = peft.LoraConfig(target_modules=["kv_b_proj"], r=4, init_lora_weights=False)
    tokens, without = [ids(40), ids(1)], logits_of(adapted, StaticKVCache(adapted.config), [ids(40), ids(1)])
    peft.inject_adapter_in_model(settings, adapted)
    got = logits_of(adapted, StaticKVCache(adapted.config), tokens)
    expected = logits_of(hf_kvattn.disable(adapted), DynamicCache(config=adapted.config), tokens)
    assert not torch.allclose(without, expected, rtol=0.1)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("parts", [[40, 1, 1], [30, FEW + 1]], ids=["steps", "many"])
@pytest.mark.parametrize("kind", [StaticKVCache, functools.partial(QuantizedKVCache, bits=8)], ids=["static", "int8"])
def test_autocast_settles_the_dtype(kind, parts):
    """Weights and latents are float32, queries bfloat16. The family has no experts, whose choice may flip."""
    tokens, config = [ids(count) for count in parts], model("minicpm3").config
    with torch.autocast("cpu", torch.bfloat16):
        cache = kind(config)
        got = logits("minicpm3", cache, tokens).float()
    expected = logits("minicpm3", kind(config), tokens)
    assert cache.kv_layers[0].dtype == torch.bfloat16
    assert 0 < float((got - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_weights_that_are_not_plain_are_served_by_expanding():
    """Such as adapters beside them: what is not known to be a plain matrix is not taken apart."""
    plain = model_of("deepseek_v3")
    prompt = ids(30)
    for module in attention_modules(plain):
        module.kv_b_proj = nn.Sequential(module.kv_b_proj, nn.Identity())
        assert not absorbs(module)
    greedy = {"do_sample": False, "max_new_tokens": 5}
    expected = plain.generate(prompt, **greedy)
    hf_kvattn.enable(plain)
    for kind in (StaticKVCache, QuantizedKVCache):
        cache = kind(plain.config)
        got = plain.generate(prompt, past_key_values=cache, **greedy)
        assert cache.get_seq_length() == 34
        if kind is QuantizedKVCache:
            with hf_kvattn.backend("reference"):
                expected = plain.generate(prompt, past_key_values=kind(plain.config), **greedy)
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="a window is forced on latents"):
        plain.generate(prompt, past_key_values=SlidingWindowKVCache(plain.config, window=8), **greedy)


def test_a_module_that_expands_otherwise_is_noticed():
    module = attention_modules(model_of("deepseek_v3"))[0]
    expand = module.expand_kv
    module.expand_kv = lambda c, r: [t * 1.1 for t in expand(c, r)]
    assert not absorbs(module)


def test_a_forced_window_hides_what_lies_before_it():
    """Of tokens outside of the window nothing is left, whatever they are."""
    window, tail = 24, ids(60)
    results = []
    for head in (ids(33), ids(33) + 1):
        cache = SlidingWindowKVCache(model("deepseek_v2").config, window=window)
        parts = [head[:, :20], head[:, 20:]] + [tail[:, i : i + 10] for i in range(0, 60, 10)] + [ids(1)]
        results.append(logits("deepseek_v2", cache, parts))
    # Four layers carry what they have seen by window - 1 tokens each: 61 are too few to forget the head entirely.
    assert not torch.equal(*results)
    more = [ids(40)] * 2 + [ids(1)]
    ends = []
    for head in (ids(33), ids(33) + 1):
        cache = SlidingWindowKVCache(model("deepseek_v2").config, window=window)
        ends.append(logits("deepseek_v2", cache, [head, tail, *more]))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_serve_the_width_of_latents(dtype):
    """Of DeepSeek's: keys of 512 + 64 numbers, one for all heads, which are the values too."""
    both = torch.randn(2, 1, 130, 576).to(dtype)
    call = AttendCall(torch.randn(2, 16, 3, 576).to(dtype), both, both, 0.07)
    expected = reference.attend(call)
    for backend in (sdpa, native):
        if backend.unavailable() is None:
            assert backend.unsupported(call) is None
            bound = 1e-5 if dtype == torch.float32 else 2**-6
            torch.testing.assert_close(backend.attend(call), expected, rtol=bound, atol=bound)


def test_compiled_steps_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="compile=True does not serve multi-head latent attention"):
        hf_kvattn.enable(model_of("deepseek_v3"), compile=True)
    with pytest.raises(ValueError, match="compile=True does not serve chunked attention"):
        hf_kvattn.enable(model_of("llama4_text"), compile=True)
