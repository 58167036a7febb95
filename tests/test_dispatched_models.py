"""Models whose modules accelerate's hooks have taken over: what they move or copy is never the way to the cache."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import generate, prompt, tiny_model
from transformers import AutoModelForCausalLM

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


PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
PLACES |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}


def a_checkpoint(model, folder) -> None:
    """The weights come from a file, into a model that has none yet; two layers stay on the disk."""
    model.save_pretrained(folder / "checkpoint")
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(weight.to("meta"), requires_grad=False)
    load_checkpoint_and_dispatch(model, folder / "checkpoint", device_map=PLACES, offload_folder=folder / "disk")


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


@pytest.mark.parametrize("way", ["enabled, then load_checkpoint_and_dispatch", "device_map"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_model_that_is_loaded_with_layers_on_the_disk(kind, way, tmp_path):
    """Mapped files lie elsewhere in memory than tensors do: the last bits of stock's logits differ, too."""
    model, loaded, inputs = hf_kvattn.enable(tiny_model()), hf_kvattn.enable(tiny_model()), prompt(50, left_padding=4)
    if way == "device_map":
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=PLACES, offload_folder=tmp_path / "disk")
    else:
        a_checkpoint(loaded, tmp_path)
    assert loaded.model.layers[1].self_attn.k_proj.weight.is_meta
    tokens, logits = generate(model, inputs, past_key_values=CACHES[kind](model.config))
    found, near = generate(hf_kvattn.enable(loaded), inputs, past_key_values=CACHES[kind](loaded.config))
    assert torch.equal(found, tokens)
    if kind in ("static", "sliding"):  # codes may fall on either side
        torch.testing.assert_close(near, logits, atol=1e-4, rtol=0)


def only_weights(layer, folder) -> None:
    disk_offload(layer, folder, execution_device="meta")


def all_arguments(layer, folder) -> None:
    add_hook_to_module(layer, AlignDevicesHook("meta"))


@pytest.mark.parametrize(
    ("way", "error", "reason"),
    [
        (only_weights, RuntimeError, "Tensor on device cpu is not on the expected device meta"),  # PyTorch's
        (all_arguments, ValueError, "the device 'meta', which holds no data: .* needs an execution_device"),
    ],
)
@pytest.mark.parametrize("kind", CACHES)
def test_a_layer_without_a_device_to_run_on_raises_and_the_cache_goes_on(kind, way, error, reason, tmp_path):
    model, sound, inputs = hf_kvattn.enable(tiny_model()), hf_kvattn.enable(tiny_model()), prompt(50)
    way(model.model.layers[1], tmp_path)
    cache = CACHES[kind](model.config)
    with pytest.raises(error, match=reason):
        generate(model, inputs, past_key_values=cache)
    assert [each.seen for each in cache.layers] == [50, 0, 0]
    cache.crop(-50)
    expected = generate(sound, inputs, past_key_values=CACHES[kind](model.config))[0]
    assert torch.equal(generate(sound, inputs, past_key_values=cache)[0], expected)


def test_a_handle_is_neither_moved_nor_copied():
    handle = LayerHandle(StaticKVCache(tiny_model().config), 0)
    assert handle.to("meta") is copy.copy(handle) is copy.deepcopy([handle])[0] is handle
