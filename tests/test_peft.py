"""peft's models: `enable` takes them, and virtual tokens stand before the prompt."""

import functools

import pytest
import torch
from models import generate, prompt, tiny_config, tiny_model
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache

import hf_kvattn
from hf_kvattn import QuantizedKVCache, StaticKVCache


def with_lora():
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def cache_of(model):
    return model.generate(**prompt(), max_new_tokens=2, return_dict_in_generate=True).past_key_values


def test_enable_takes_a_peft_model_and_serves_its_base_model():
    model = with_lora()
    expected, _ = generate(model, prompt(left_padding=3))
    assert hf_kvattn.enable(model, cache="static") is model and hf_kvattn.is_enabled(model)
    assert hf_kvattn.is_enabled(model.get_base_model())
    assert isinstance(cache_of(model), StaticKVCache)
    assert torch.equal(generate(model, prompt(left_padding=3))[0], expected)
    with hf_kvattn.enabled(model) as inner:
        assert inner is model and isinstance(cache_of(model), DynamicCache)
    with model.disable_adapter():
        assert torch.equal(generate(model, prompt())[0], generate(tiny_model(), prompt())[0])
    assert hf_kvattn.disable(model) is model and not hf_kvattn.is_enabled(model)
    assert isinstance(cache_of(model), DynamicCache)
    assert torch.equal(generate(model, prompt(left_padding=3))[0], expected)


CACHES = {
    "static": StaticKVCache,
    "static-sized": functools.partial(StaticKVCache, max_cache_len=64),
    "quantized-late": functools.partial(QuantizedKVCache, residual_length=64),
}


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("kind", CACHES)
def test_virtual_tokens_before_the_prompt(config, kind):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    expected, _ = generate(model, prompt())
    hf_kvattn.enable(model)
    assert torch.equal(generate(model, prompt())[0], expected)
    assert torch.equal(generate(model, prompt(), past_key_values=CACHES[kind](tiny_config()))[0], expected)
