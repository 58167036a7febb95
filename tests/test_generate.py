"""`generate()` with StaticKVCache: stock's tokens and logits, on every family, backend and kind of batch."""

import pytest
import torch
from models import FAMILIES, generate, prompt, tiny_model
from transformers import DynamicCache, StaticCache

import hf_kvattn
from hf_kvattn import StaticKVCache

LOGITS = {"rtol": 1e-4, "atol": 1e-4}  # fp32 sums in another order, through three layers
BACKENDS = ["auto", "native", "sdpa", "reference"]


def poison(cache: StaticKVCache) -> None:
    """Large finite values in every slot that holds no token."""
    for layer in cache.layers:
        for buffer in (layer._k, layer._v):
            buffer[:, :, layer.seen :] = 1e30


@pytest.mark.parametrize("left_padding", [0, 5], ids=["full", "left-padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_and_logits_as_stock(family, left_padding):
    model, inputs = tiny_model(family), prompt(left_padding=left_padding)
    tokens, logits = generate(model, inputs)
    assert len(tokens[:, 13:].unique()) > 5, "the stock tokens must vary, or equality says little"
    with hf_kvattn.enabled(model):
        for backend in BACKENDS:
            cache = StaticKVCache(model.config, max_cache_len=13 + 24)
            with hf_kvattn.backend(backend):
                ours, our_logits = generate(model, inputs, past_key_values=cache)
            assert torch.equal(tokens, ours), backend
            torch.testing.assert_close(our_logits, logits, **LOGITS)
            assert cache.get_seq_length() == 13 + 24 - 1
    unhooked, their_logits = generate(model, inputs, past_key_values=StaticKVCache(model.config))
    assert torch.equal(tokens, unhooked)
    torch.testing.assert_close(their_logits, logits, **LOGITS)


@pytest.mark.parametrize("family", ["llama-g3", "mistral", "gemma2", "gemma3", "qwen2-sliding", "gpt-oss"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_step_equals_full_recomputation_whatever_lies_in_unused_slots(family, backend):
    model = tiny_model(family)
    ids = prompt(40)["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits  # one causal forward over everything, no cache
        cache = StaticKVCache(model.config, max_cache_len=64)
        with hf_kvattn.enabled(model), hf_kvattn.backend(backend):
            position = 0
            for step in (1, 1, 9, 1, 5, 17, 1, 2, 3):  # the first step included, decode and chunks mixed
                logits = model(ids[:, position : position + step], past_key_values=cache).logits
                torch.testing.assert_close(logits, expected[:, position : position + step], **LOGITS)
                position += step
                poison(cache)
    assert position == 40


def test_growth_keeps_every_token_and_never_reads_the_rest():
    model = tiny_model(num_hidden_layers=1)
    ids = torch.randint(3, 128, (2, 700))
    with torch.no_grad(), hf_kvattn.enabled(model):
        whole = StaticKVCache(model.config, max_cache_len=700)
        model(ids, past_key_values=whole)
        growing, capacities, position = StaticKVCache(model.config), [], 0
        for step in (3, 253, 1, 200, 1, 242):
            model(ids[:, position : position + step], past_key_values=growing)
            position += step
            capacities.append(growing.layers[0].capacity)
            poison(growing)
    assert capacities == [256, 256, 385, 685, 685, 1050]
    torch.testing.assert_close(growing.layers[0].keys, whole.layers[0].keys, rtol=1e-5, atol=1e-5)
    assert growing.layers[0].keys.shape == (2, 2, 700, 16)


def test_stored_keys_and_values_are_the_models_own():
    model, inputs = tiny_model(), prompt(left_padding=4)
    stock, ours = DynamicCache(config=model.config), StaticKVCache(model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=stock)
        with hf_kvattn.enabled(model):
            model(**inputs, past_key_values=ours)
    assert torch.equal(ours.layers[0].keys, stock.layers[0].keys)  # the first layer's do not depend on attention
    assert torch.equal(ours.layers[0].values, stock.layers[0].values)


@pytest.mark.parametrize("left_padding", [0, 5], ids=["full", "left-padded"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_stock_caches_stay_right_under_the_hook(family, left_padding):
    model, inputs = tiny_model(family), prompt(left_padding=left_padding)
    tokens, logits = generate(model, inputs)
    with hf_kvattn.enabled(model):
        for make in (
            lambda: DynamicCache(config=model.config),
            lambda: DynamicCache(),
            lambda: StaticCache(model.config, max_cache_len=40),
            lambda: StaticCache(model.config, max_cache_len=200),
        ):
            ours, our_logits = generate(model, inputs, past_key_values=make())
            assert torch.equal(tokens, ours)
            torch.testing.assert_close(our_logits, logits, **LOGITS)
        assert torch.equal(tokens, generate(model, inputs)[0])
        assert torch.equal(tokens, generate(model, inputs, use_cache=False)[0])


def test_two_turns_on_one_cache():
    model, first = tiny_model(), prompt(left_padding=3)
    cache, stock = StaticKVCache(model.config), DynamicCache(config=model.config)
    with hf_kvattn.enabled(model):
        reply, _ = generate(model, first, past_key_values=cache)
        expected, _ = generate(model, first, past_key_values=stock)
        assert torch.equal(reply, expected)
        turn = torch.cat([reply, torch.randint(3, 128, (2, 7))], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, turn.shape[1] - 13, dtype=torch.long)], 1)
        second = {"input_ids": turn, "attention_mask": mask}
        assert torch.equal(
            generate(model, second, past_key_values=cache)[0], generate(model, second, past_key_values=stock)[0]
        )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda k: next(iter(k)),
)
def test_other_ways_of_generating(kwargs):
    model = tiny_model()
    inputs = prompt(batch=1) if "prompt_lookup_num_tokens" in kwargs else prompt()
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False, **kwargs)
    with hf_kvattn.enabled(model):
        cache = StaticKVCache(model.config, max_cache_len=40)
        ours = model.generate(**inputs, max_new_tokens=16, do_sample=False, past_key_values=cache, **kwargs)
    assert torch.equal(expected, ours)


def test_sampling_with_a_seed():
    model, inputs = tiny_model(), prompt()
    torch.manual_seed(3)
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=True, top_k=20)
    with hf_kvattn.enabled(model, cache="static"):
        torch.manual_seed(3)
        assert torch.equal(expected, model.generate(**inputs, max_new_tokens=16, do_sample=True, top_k=20))


def test_bfloat16_generates_stock_tokens_up_to_a_near_tie():
    model, inputs = tiny_model().to(torch.bfloat16), prompt()
    tokens, logits = generate(model, inputs)
    with hf_kvattn.enabled(model):
        ours, _ = generate(model, inputs, past_key_values=StaticKVCache(model.config))
    for row in range(2):
        different = (tokens[row] != ours[row]).nonzero()
        if len(different):
            step = int(different[0]) - 13
            pair = logits[row, step, [tokens[row, step + 13], ours[row, step + 13]]].float()
            assert (pair[0] - pair[1]) <= pair.abs().max() * 2**-6, "they part where it was no tie"
