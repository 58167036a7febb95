"""StaticKVCache(offload=True): the same contents and tokens, with layers on the host between their attentions."""

import copy
import pickle

import pytest
import torch
from flash_stub import FA2, flash_libraries
from impostor import Impostor, _Stream, fake_cuda, on_gpu
from models import generate, prompt, tiny_config, tiny_model

import hf_kvattn
from hf_kvattn import StaticKVCache
from hf_kvattn.caches import offload
from hf_kvattn.caches.offload import KVOffloadedLayer
from hf_kvattn.kernels import dispatch

WAYS = {
    "greedy": ("llama", {}, {}),
    "left-padded": ("llama", {"left_padding": 5}, {}),
    "beam": ("llama", {}, {"num_beams": 3}),
    "assisted": ("llama", {"batch": 1}, {"prompt_lookup_num_tokens": 3}),
    "some-sliding": ("qwen2-sliding", {}, {}),
    "one-layer": ("llama", {}, {}),
}


@pytest.fixture(autouse=True)
def fresh_streams():
    offload._side_stream.cache_clear()
    yield
    offload._side_stream.cache_clear()


def offloaded(model) -> StaticKVCache:
    return StaticKVCache(model.config, max_cache_len=13 + 16 + 3, offload=True)


def run(model, inputs, cache, kwargs) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=16, do_sample=False, past_key_values=cache, **kwargs)


@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "stock-attention"])
@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_those_without_offloading(way, enabled):
    family, shape, kwargs = WAYS[way]
    model = tiny_model(family, num_hidden_layers=1 if way == "one-layer" else 3)
    inputs = prompt(**shape)
    expected = run(model, inputs, StaticKVCache(model.config, max_cache_len=32), kwargs)
    if enabled:
        hf_kvattn.enable(model)
    assert torch.equal(run(model, inputs, offloaded(model), kwargs), expected)  # where the host is the device
    with fake_cuda():
        on_gpu(model)
        cache = offloaded(model)
        ours = run(model, on_gpu(inputs), cache, kwargs)
        for layer in cache.layers:
            assert isinstance(layer, KVOffloadedLayer) == (not layer.is_sliding)
            assert isinstance(layer._k, Impostor) == layer.is_sliding, "on the host, and sliding ones on the GPU"
    assert torch.equal(ours.data_on_cpu, expected)


def test_flash_reads_the_copy_on_the_gpu():
    model, inputs = tiny_model().half(), prompt(left_padding=3)
    expected = run(model, inputs, None, {})
    with flash_libraries(FA2) as launches, fake_cuda():
        on_gpu(model)
        with hf_kvattn.enabled(model), hf_kvattn.backend("flash"):
            ours = run(model, on_gpu(inputs), offloaded(model), {})
        assert len(launches) == 3 * 16
    assert torch.equal(ours.data_on_cpu, expected)


def filled(count: int, device: str, **kwargs) -> StaticKVCache:
    cache = StaticKVCache(tiny_config(), **kwargs)
    generator = torch.Generator().manual_seed(5)
    for layer in range(3):
        k, v = torch.randn(2, 2, 2, count, 16, generator=generator)
        cache.update(*((k, v) if device == "cpu" else on_gpu((k, v))), layer)
    return cache


def test_two_layers_are_on_the_gpu_at_most_and_the_rest_on_its_way():
    with fake_cuda():
        cache = filled(5, "cuda", max_cache_len=20, offload=True)
        k, v = on_gpu(torch.randn(2, 2, 2, 1, 16))
        for i, layer in enumerate(cache.layers):
            layer.append(k, v)
            there = [x.layer_idx for x in cache.layers if x._here is not None or x._coming is not None]
            assert sorted(there) == sorted([i, (i + 1) % 3])
            coming = cache.layers[(i + 1) % 3]._coming[0].data_on_cpu
            assert coming.isnan().all(), "the next layer's copy is not waited for"
            assert not layer.dense()[0].data_on_cpu.isnan().any()
            layer.finish_attention(dispatch.quantize_blocks)
        assert cache.nbytes == 3 * 2 * (2 * 2 * 20 * 16) * 4
        stored = cache.layers[0]._k[:, :, :6]
        assert stored.permute(2, 0, 1, 3).is_contiguous(), "one piece of memory, or the copy could not run beside work"


def test_a_copy_that_nobody_waits_for_is_noticed(monkeypatch):
    model, inputs = tiny_model(), prompt()
    expected = run(model, inputs, None, {})
    monkeypatch.setattr(_Stream, "wait_stream", lambda self, other: None)
    with fake_cuda():
        on_gpu(model)
        with hf_kvattn.enabled(model):
            ours = run(model, on_gpu(inputs), offloaded(model), {})
    assert not torch.equal(ours.data_on_cpu, expected)


def test_contents_are_those_of_a_cache_that_stays(tmp_path):
    plain = filled(5, "cpu", max_cache_len=20)
    with fake_cuda():
        cache = filled(5, "cuda", max_cache_len=20, offload=True)
        for same in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            for ours, layer in zip(same.layers, plain.layers, strict=True):
                assert torch.equal(ours.keys, layer.keys) and torch.equal(ours.values, layer.values)
        hf_kvattn.save_cache(cache, tmp_path / "prefix")
        for both in (cache, plain):
            both.batch_repeat_interleave(2)
            both.reorder_cache(torch.tensor([3, 0, 1, 1]))
            both.crop(-2)
        assert [layer.keys.tolist() for layer in cache.layers] == [layer.keys.tolist() for layer in plain.layers]
    loaded = hf_kvattn.load_cache(tmp_path / "prefix", tiny_config())
    assert loaded.get_seq_length() == 5 and not isinstance(loaded.layers[0], KVOffloadedLayer)


def test_what_cannot_be_offloaded():
    with pytest.raises(ValueError, match="offload=True needs max_cache_len"):
        StaticKVCache(tiny_config(), offload=True)
    with pytest.raises(ValueError, match="finds no layer to offload"):
        StaticKVCache(tiny_config("mistral"), max_cache_len=9, offload=True)
    with pytest.raises(ValueError, match="layer 0 is offloaded: it stays on the host"):
        filled(5, "cpu", max_cache_len=9, offload=True).to("cuda")
    cache = filled(5, "cpu", max_cache_len=9, offload=True)
    with pytest.raises(ValueError, match="5 stored tokens and 5 new ones exceed max_cache_len=9"):
        cache.update(*torch.randn(2, 2, 2, 5, 16), 0)
    model = tiny_model()
    assert generate(model, prompt(), past_key_values=offloaded(model), new_tokens=3)[0].shape == (2, 16)
