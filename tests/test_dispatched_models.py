"""Models whose modules accelerate's hooks have taken over: what they move or copy is never the way to the cache."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from models import generate, prompt, tiny_model

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.attention import LayerHandle

CACHES = {
    "static": StaticKVCache,
    "sliding": lambda config: SlidingWindowKVCache(config, window=16, sinks=2),
    "int8": lambda config: QuantizedKVCache(config, bits=8),
    "int2": lambda config: QuantizedKVCache(config, bits=2),
}


def a_hook_on_each_module(model, folder) -> None:
    """Attention modules too, whose arguments the hook sends to the device: nobody says `skip_keys`."""
    names = [name for name, module in model.named_modules() if not list(module.children()) or "self_attn" in name]
    places = dict.fromkeys(names, "cpu")
    dispatch_model(model, places, main_device="cpu", force_hooks=True)


WAYS = {
    "dispatch_model": a_hook_on_each_module,
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
}


@pytest.mark.parametrize("enabled_first", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CACHES)
def test_answers_are_those_of_the_model_alone(kind, way, enabled_first, tmp_path):
    model, dispatched, inputs = hf_kvattn.enable(tiny_model()), tiny_model(), prompt(50, left_padding=4)
    expected = generate(model, inputs, past_key_values=CACHES[kind](model.config))
    if enabled_first:
        hf_kvattn.enable(dispatched)
    WAYS[way](dispatched, tmp_path)
    cache = CACHES[kind](hf_kvattn.enable(dispatched).config)
    found = generate(dispatched, inputs, past_key_values=cache)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert cache.get_seq_length() == 73


def test_a_handle_is_neither_moved_nor_copied():
    handle = LayerHandle(StaticKVCache(tiny_model().config), 0)
    assert handle.to("meta") is copy.copy(handle) is copy.deepcopy([handle])[0] is handle
