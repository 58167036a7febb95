"""StaticKVCache(offload=True): the same contents and tokens, with layers on the host between their attentions."""

import copy
import pickle
import sys

import pytest
import torch
from flash_stub import FA2, flash_libraries
from impostor import Impostor, fake_cuda, on_gpu
from models import generate, prompt, tiny_config, tiny_model
from streams import ORDERS, _Event, _Stream, streams

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
            there = [x.layer_idx for x in cache.layers if x._near is not None]
            assert sorted(there) == sorted([i, (i + 1) % 3]) and len(layer.places) == 2
            following = cache.layers[(i + 1) % 3]
            there, all_of_it = (t[:, :, :5] for t in (following._near.buffers[0].data_on_cpu, following._k))
            assert not torch.equal(there, all_of_it), "the next layer's copy is not waited for"
            assert not layer.dense()[0].data_on_cpu.isnan().any()
            layer.finish_attention(dispatch.quantize_blocks)
        assert cache.nbytes == 3 * 2 * (2 * 2 * 20 * 16) * 4
        stored = cache.layers[0]._k[:, :, :6]
        assert stored.permute(2, 0, 1, 3).is_contiguous(), "one piece of memory, or the copy could not run beside work"


def steps_on(order: str, layers: int, ahead: bool, enabled: bool = True) -> bool:
    """Whether every attention over an offloaded cache reads what was stored, in parts of a prompt and steps.

    Args:
        ahead: the host queues everything before the GPU begins; else it waits at each step.
        enabled: attention comes before `finish_attention`, else after it, as stock attention does.
    """
    offload._side_stream.cache_clear()
    generator, right, allocated = torch.Generator().manual_seed(layers), [], []
    buffers, kept, batch = KVOffloadedLayer._buffers, {}, 2

    def counted(layer, **where):
        allocated.append(where["device"])
        return buffers(layer, **where)

    def attend(layer, k, v):
        """Queues a look at what attention is given."""
        expected = kept[layer.layer_idx]
        right.append(f"not run: layer {layer.layer_idx}")
        number, seen = len(right) - 1, (k.data_on_cpu, v.data_on_cpu)
        machine.queue(
            lambda: right.__setitem__(number, all(torch.equal(*pair) for pair in zip(seen, expected, strict=True)))
        )

    with fake_cuda(), streams(order) as machine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVOffloadedLayer, "_buffers", counted)
        cache = StaticKVCache(tiny_config(num_hidden_layers=layers), max_cache_len=40, offload=True)
        for new in (5, 1, 3, 1, 1, "beams", 1, 1, "reset", 4, 1, "other batch", 2, 1, 1):
            if new == "beams":
                rows = torch.tensor([1, 1])
                cache.reorder_cache(rows)
                kept = {i: tuple(t[rows] for t in pair) for i, pair in kept.items()}
                continue
            if isinstance(new, str):
                machine.run()  # whoever resets has what he wanted
                cache.reset()
                kept, batch = {}, 3 if new == "other batch" else 2
                continue
            for layer in cache.layers:
                tokens = torch.randn(2, batch, 2, new, 16, generator=generator).unbind()
                before = kept.get(layer.layer_idx, [t[:, :, :0] for t in tokens])
                kept[layer.layer_idx] = tuple(torch.cat(pair, 2) for pair in zip(before, tokens, strict=True))
                if enabled:
                    layer.append(*on_gpu(tokens))
                    attend(layer, *layer.dense())
                    layer.finish_attention(dispatch.quantize_blocks)
                else:
                    attend(layer, *layer.update(*on_gpu(tokens)))
            if not ahead:
                machine.run()
        for layer in cache.layers:
            right.append(all(torch.equal(*pair) for pair in zip(layer.dense(), kept[layer.layer_idx], strict=True)))
        machine.run()
        assert allocated.count("cpu") == 2 * layers
        assert len(allocated) - allocated.count("cpu") == 2 * min(layers, 2), "two layers for each batch size, no more"
    return all(each is True for each in right)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "in step"])
@pytest.mark.parametrize("order", ORDERS)
def test_attention_reads_what_was_stored_in_whatever_order_streams_run(order, ahead, layers):
    assert steps_on(order, layers, ahead)
    assert steps_on(order, layers, ahead, enabled=False)


def waits(patch, drop: int | None = None) -> set[int]:
    """The lines of `offload.py` that wait for an event; the one numbered `drop` does not."""
    found: set[int] = set()
    for kind, name in ((_Stream, "wait_event"), (_Event, "synchronize")):
        wait = getattr(kind, name)

        def noting(self, *event, wait=wait):
            found.add(line := sys._getframe(1).f_lineno)
            if line != drop:
                wait(self, *event)

        patch.setattr(kind, name, noting)
    return found


def test_each_wait_is_needed(monkeypatch):
    """Without any one of them something is read that is not there yet, or not any more, in one of the orders."""
    with monkeypatch.context() as patch:
        found = waits(patch)
        assert all(steps_on(order, 3, True) for order in ORDERS)
    assert len(found) == 4, "the place is free, tokens have come, new ones are in it, they have reached the host"
    for line in found:
        with monkeypatch.context() as patch:
            waits(patch, drop=line)
            assert not all(steps_on(order, 3, True) for order in ORDERS), f"offload.py, line {line}"


def test_stock_attention_comes_after_update(monkeypatch):
    """What it reads stays there until it has run: the place is not marked as free before."""
    monkeypatch.setattr(KVOffloadedLayer, "update", KVOffloadedLayer.__mro__[1].update)
    assert not all(steps_on(order, 3, True, enabled=False) for order in ORDERS)


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
