"""Families whose layers are unlike a Llama's, by six ways of generating: as stock transformers, from codes too.

With codes, the backend that is chosen must give the tokens that `reference` gives from the same ones.
"""

import functools

import pytest
import torch
from model_sweep import CACHES, inputs, model_of

import hf_kvattn

FAMILIES = (
    "qwen3_5_text qwen3_next gemma4_text gemma3n_text lfm2 lfm3 nemotron_h granitemoehybrid bamba llama4_text gpt_neox "
    "gpt_oss falcon_h1 jamba gpt_bigcode mimo_v2_flash laguna deepseek_v3 kimi_linear"
).split()
NEW = 8
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}


@functools.cache
def model(family: str):
    torch.use_deterministic_algorithms(True, warn_only=True)
    return model_of(family)


def two_turns(generate, cache, ids, **_):
    first = generate(ids, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
    told = torch.cat([first.sequences, ids[:, :9]], 1)
    return generate(told, past_key_values=first.past_key_values, **GREEDY)


def once(generate, cache, ids, mask, **given):
    torch.manual_seed(3)
    return generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY | given)


WAYS = {
    "greedy": once,
    "padded": once,
    "beams": functools.partial(once, num_beams=3, num_return_sequences=3),
    "sampled": functools.partial(once, do_sample=True, num_return_sequences=2),
    "prompt in parts": functools.partial(once, prefill_chunk_size=17),
    "two turns": two_turns,
}


def tokens(family: str, way: str, make_cache=None) -> torch.Tensor:
    given = inputs("padded" if way == "padded" else "greedy")
    cache = make_cache(model(family).config) if make_cache else None
    return WAYS[way](model(family).generate, cache, given["input_ids"], mask=given["attention_mask"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_generates_as_stock(family, way):
    expected = tokens(family, way)
    with hf_kvattn.enabled(model(family)):
        assert torch.equal(tokens(family, way, CACHES["static"]), expected)
        got = tokens(family, way, CACHES["int8"])
        with hf_kvattn.backend("reference"):
            assert torch.equal(got, tokens(family, way, CACHES["int8"]))
    # the cache alone, on a model that is not enabled
    assert torch.equal(tokens(family, way, CACHES["static"]), expected)
