"""QuantizedKVCache: what it stores, quantizes, refuses and costs."""

import copy
import pickle

import pytest
import torch
from impostor import Impostor, fake_cuda, on_gpu
from models import prompt, tiny_config, tiny_model

import hf_kvattn
from hf_kvattn import QuantizedKVCache
from hf_kvattn.kernels import dispatch, native, reference
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.quant.layout import BLOCK
from hf_kvattn.quant.packed import OF_BLOCKS

FP8 = "fp8"
BITS = [8, 4, 3, 2]
ALL_BITS = [FP8, *BITS]


def test_what_kernels_are_told_follows_the_arrays():
    """A layer keeps what it told kernels between steps; whatever moves, fills or replaces its arrays must end that."""
    q = torch.randn(2, 4, 1, 16)

    def grow(cache, length):
        for layer in range(len(cache.layers)):
            fill(cache, length, 50, layer, seed=length)

    def check(cache):
        told = cache.layers[0].stored_kv()
        call = AttendCall(q[: told.k.shape[0]], told.k, told.v, 0.25, packed=told.packed)
        for _ in range(2):
            torch.testing.assert_close(native.attend(call), reference.attend(call), rtol=0, atol=2e-4)
        assert all(getattr(told.packed, name) is array for name, array in cache.layers[0]._packed.items())
        assert told.packed.tokens == cache.layers[0].packed_tokens

    cache = QuantizedKVCache(tiny_config(), bits=4, group_size=16)
    grow(cache, 100)
    check(cache)
    for length in (40, 300, 1000):  # more blocks, then grown arrays
        grow(cache, length)
        check(cache)
    twin, copied, loaded = cache.fork(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(loaded)) < 1.2 * cache.nbytes + 50_000
    grow(cache, 64)
    for each in (cache, twin, copied, loaded):
        check(each)
        each.crop(-100)
        check(each)
        each.batch_select_indices(torch.tensor([1]))
        check(each)
        each.reset()
        grow(each, 70)
        check(each)


def fill(cache: QuantizedKVCache, length: int, chunk: int, layer: int = 0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 2, length, 16, generator=generator) for _ in "kv")
    for start in range(0, length, chunk):
        cache.update(k[:, :, start : start + chunk], v[:, :, start : start + chunk], layer)
    return k, v


@pytest.mark.parametrize("chunk", [1, 7, 32, 45, 300])
@pytest.mark.parametrize("residual", [None, 5, 64])
@pytest.mark.parametrize("sinks", [0, 4, 32])
def test_blocks_are_quantized_once_and_first_and_newest_tokens_are_exact(sinks, residual, chunk):
    cache = QuantizedKVCache(tiny_config(), bits=4, group_size=16, residual_length=residual, sinks=sinks)
    k, v = fill(cache, 300, chunk)
    layer = cache.layers[0]
    packed = (300 - sinks - (residual or 0)) // BLOCK * BLOCK
    assert layer.packed_tokens == packed and cache.get_seq_length() == 300
    for kept, stored in zip(layer.dense(), (k, v), strict=True):
        for exact in (slice(0, sinks), slice(sinks + packed, None)):
            assert torch.equal(kept[:, :, exact], stored[:, :, exact])
        assert (kept - stored).abs().max() < 1 and (kept - stored).square().mean() < 0.013  # of a variance of 1
        assert (kept != stored)[:, :, sinks : sinks + packed].float().mean() > 0.9
    before = {name: layer._packed[name][:, :, : packed // BLOCK].clone() for name in OF_BLOCKS}
    fill(cache, 700, chunk, seed=1)
    for name, tensor in before.items():
        assert torch.equal(layer._packed[name][:, :, : packed // BLOCK], tensor), (
            "codes changed after they were written"
        )


@pytest.mark.parametrize("bits", ALL_BITS)
def test_bytes_and_bits_are_those_allocated(bits):
    cache = QuantizedKVCache(tiny_config(), bits=bits, group_size=16, max_cache_len=320)
    for i in range(3):
        fill(cache, 320, 320, i)
    tensors = [t for x in cache.layers for t in (x._exact_k, x._exact_v, *x._packed.values())]
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)
    numbers = 9 * BLOCK * 16 * 2 * 2  # 4 exact tokens first, so 9 whole blocks
    codes = 2 * numbers * (8 if bits == FP8 else bits) // 8
    if bits in (8, FP8):  # two bytes of scale
        sides, table = 2 * (numbers // BLOCK + numbers // 16), 4
    else:  # 6 bits of a channel of a block, a byte of a group; a mean, a step, a unit, a place, and 1/16 of a width
        sides, table = numbers // BLOCK * 6 // 8 + numbers // 16, 4 + 2 + 2 + 2 + 1 / 16
    exact = 2 * 2 * 2 * (4 + BLOCK) * 16 * 4
    assert cache.nbytes == 3 * (codes + sides + exact + 2 * 2 * 16 * table)
    assert cache.bits_per_element == 8 * cache.nbytes / (3 * 2 * 2 * 2 * 320 * 16)


@pytest.mark.parametrize("family", ["llama-g3", "gemma3", "gemma2", "mistral", "gpt-oss"])
@pytest.mark.parametrize("left_padding", [0, 5])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_backends_agree_with_each_other_and_with_a_model_that_is_not_enabled(family, left_padding, bits):
    """From the same stored codes on: codes made anew may round to the other side, and a random model amplifies that."""
    model, inputs = tiny_model(family), prompt(75, left_padding=left_padding)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        with hf_kvattn.enabled(model), hf_kvattn.backend("reference"):
            stored = QuantizedKVCache(model.config, bits=bits, group_size=16)
            model(ids[:, :70], attention_mask=mask[:, :70], past_key_values=stored)
        assert stored.layers[0].packed_tokens == 64

        def run(backend: str | None) -> torch.Tensor:
            cache, logits = copy.deepcopy(stored), []
            for start, end in ((70, 71), (71, 75)):
                arguments = {"attention_mask": mask[:, :end], "past_key_values": cache}
                if backend is None:
                    logits.append(model(ids[:, start:end], **arguments).logits)
                else:
                    with hf_kvattn.enabled(model), hf_kvattn.backend(backend):
                        logits.append(model(ids[:, start:end], **arguments).logits)
            return torch.cat(logits, 1)

        expected = run("reference")
        native_too = ("native",) if bits != FP8 else ()
        for backend in ("auto", "sdpa", *native_too, None):
            # The kernels agree within 2e-4; three layers of a random model make 3e-3 of it, a wrong code far more.
            torch.testing.assert_close(run(backend), expected, rtol=1e-2, atol=1e-2)


def test_more_bits_are_nearer_to_stock():
    model = tiny_model("llama-g3")
    ids, errors = torch.randint(3, 128, (2, 160)), {}
    with torch.no_grad():
        stock = model(ids).logits[:, 101:]
        with hf_kvattn.enabled(model):
            for bits in ALL_BITS:
                cache = QuantizedKVCache(model.config, bits=bits, group_size=16)
                model(ids[:, :101], past_key_values=cache)
                logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(101, 160)]
                errors[bits] = ((torch.cat(logits, 1) - stock).abs().mean() / stock.std()).item()
    assert errors[8] < 0.05 and 4 * errors[8] < errors[4] and 1.3 * errors[4] < errors[3] < errors[2] / 1.3, errors
    assert 1.3 * errors[8] < errors[FP8] < errors[4] / 1.3, errors


def test_the_prompts_own_forward_is_exact():
    model, ids = tiny_model(), prompt(80)["input_ids"]
    with torch.no_grad(), hf_kvattn.enabled(model):
        logits = model(ids, past_key_values=QuantizedKVCache(model.config, bits=2, group_size=16)).logits
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "sinks"), [(8, 0), (8, 4), (FP8, 4)])
def test_crop_reorder_and_select_keep_what_they_should(bits, sinks):
    cache = QuantizedKVCache(tiny_config(), bits=bits, group_size=16, sinks=sinks)
    fill(cache, 100 + sinks, 9)
    layer = cache.layers[0]
    whole = layer.dense()[0].clone()
    layer.crop(-3)
    assert torch.equal(layer.dense()[0], whole[:, :, : 97 + sinks]) and layer.packed_tokens == 96
    layer.crop(-20)  # into a block: its tokens become exact ones as they were read
    assert layer.packed_tokens == 64 and torch.equal(layer.dense()[0], whole[:, :, : 77 + sinks])
    layer.select(torch.tensor([1, 0]))
    assert torch.equal(layer.dense()[0], whole[:, :, : 77 + sinks].flip(0))
    layer.select(torch.tensor([0, 0, 1, 1]))
    layer.select(torch.tensor([0, 3]))
    assert torch.equal(layer.dense()[0], whole[:, :, : 77 + sinks].flip(0)) and layer.batch_size == 2
    with pytest.raises(ValueError, match=f"from -{77 + sinks} .* got -{78 + sinks}"):
        layer.crop(-78 - sinks)
    layer.crop(-75 - sinks)
    assert layer.packed_tokens == 0 and torch.equal(layer.dense()[0], whole[:, :, :2].flip(0))
    cache.reset()
    k, _ = fill(cache, 40, 40, seed=5)
    assert (layer.dense()[0] - k).abs().max() < (0.05 if bits == 8 else 0.25)


def test_outlier_channels_like_those_of_qwen():
    """Key channels with offsets of 600 beside others of 1: the mean is taken off, so the small ones keep their bits."""
    k, v = torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16)
    k[..., 3] += 600
    for bits, bound in ((8, 0.05), (FP8, 0.25)):  # a sixteenth of 4
        cache = QuantizedKVCache(tiny_config(), bits=bits, group_size=16)
        cache.update(k, v, 0)
        keys, _ = cache.layers[0].dense()
        assert (keys - k).abs().max() < bound


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_named_and_no_block_is_written(bad):
    for name in ("keys", "values"):
        cache = QuantizedKVCache(tiny_config(), bits=4, group_size=16)
        fill(cache, 70, 70, layer=1)
        before = {n: t.clone() for n, t in cache.layers[1]._packed.items()}
        k, v = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
        (k if name == "keys" else v)[1, 0, 7, 3] = bad
        with pytest.raises(ValueError, match=f"layer 1: {name} are NaN or infinite"):
            cache.update(k, v, 1)
        assert cache.layers[1].packed_tokens == 64
        assert all(torch.equal(t[:, :, :2], cache.layers[1]._packed[n][:, :, :2]) for n, t in before.items())
        cache.layers[1].crop(-40)
        fill(cache, 40, 40, layer=1)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("bits", [8, FP8, 3])
def test_on_a_gpu_nothing_is_read_back_while_tokens_are_stored_and_quantized(bits, family, without_triton):
    """Prompt, growth, a window's ring: the same numbers as on a CPU, and the host waits for none."""
    config = tiny_config(family) if family == "llama" else tiny_config(family, sliding_window=50)
    here, there = (QuantizedKVCache(config, bits=bits, group_size=16, sinks=2) for _ in "ab")
    generator = torch.Generator().manual_seed(3)
    with fake_cuda() as reads:
        for count in (150, 1, 31, 1, 70, *[1] * 40):
            k, v = torch.randn(2, 2, 2, count, 16, generator=generator)
            for cache, tokens in ((here, (k, v)), (there, on_gpu((k, v)))):
                cache.layers[0].append(*tokens)
                cache.layers[0].finish_attention(dispatch.quantize_blocks)
            assert reads == []
        assert there.layers[0].packed_tokens == here.layers[0].packed_tokens > 32
        stored, ours = there.layers[0].filled(), there.layers[0].portable()
    assert all(isinstance(tensor, Impostor) for tensor in stored.values())
    for name, tensor in here.layers[0].filled().items():
        assert torch.equal(ours[name], tensor), name
        if name.startswith(("k_codes", "v_codes")):
            assert not torch.equal(stored[name].data_on_cpu, tensor), f"{name} lies as on a CPU"


def poisoned_on_a_gpu(name: str, steps: int = 0) -> QuantizedKVCache:
    """A cache on a GPU whose layer 1 has quantized a NaN and been told of `steps` more tokens."""
    cache = QuantizedKVCache(tiny_config(), bits=8, group_size=16)
    layer, (k, v) = cache.layers[1], torch.randn(2, 2, 2, 70, 16)
    (k if name == "keys" else v)[1, 0, 7, 3] = torch.nan
    layer.append(*on_gpu((k, v)))
    layer.finish_attention(dispatch.quantize_blocks)
    for _ in range(steps):
        layer.append(*on_gpu((k[:, :, 60:61], v[:, :, 60:61])))
        layer.finish_attention(dispatch.quantize_blocks)
    return cache


@pytest.mark.parametrize("name", ["keys", "values"])
def test_nan_on_a_gpu_is_named_by_a_later_step_until_reset(name, without_triton):
    with fake_cuda() as reads:
        layer = poisoned_on_a_gpu(name, steps=1).layers[1]  # the answer was not there yet when the step asked
        seen, one = layer.seen, on_gpu(torch.zeros(2, 2, 1, 16))
        for _ in range(2):
            with pytest.raises(ValueError, match=f"layer 1: {name} were NaN or infinite .* only reset"):
                layer.raise_if_not_finite(wait=False)
                layer.append(one, one)
        assert reads == [] and layer.seen == seen
        layer.reset()
        layer.append(one, one)
        assert layer.seen == 1


@pytest.mark.parametrize(
    "use", [lambda layer: layer.filled(), copy.deepcopy, lambda layer: layer.check_crop(-1)]
)  # a pickle of a cache is one of its deep copy
def test_what_needs_the_contents_waits_for_the_answer(use, without_triton):
    with fake_cuda():
        with pytest.raises(ValueError, match="layer 1: keys were NaN or infinite"):
            use(poisoned_on_a_gpu("keys").layers[1])
        layer = poisoned_on_a_gpu("none").layers[1]
        layer.reset()
        one = torch.ones(2, 2, 70, 16)
        layer.append(*on_gpu((one, one)))
        layer.finish_attention(dispatch.quantize_blocks)
        assert layer._finite_checks
        use(layer)
        assert not layer._finite_checks


def test_a_bad_block_is_found_behind_good_ones(without_triton):
    """Two answers are to come, and the second is the bad one; a copy made before it goes on without it."""
    with fake_cuda():
        cache = QuantizedKVCache(tiny_config(), bits=8, group_size=16)
        layer, k = cache.layers[1], torch.randn(2, 2, 40, 16)
        layer.append(*on_gpu((k, k)))
        layer.finish_attention(dispatch.quantize_blocks)
        twin = copy.deepcopy(layer)
        bad = k.clone()
        bad[0, 0, 5] = torch.inf
        layer.append(*on_gpu((bad, k)))
        layer.finish_attention(dispatch.quantize_blocks)
        with pytest.raises(ValueError, match="layer 1: keys were NaN or infinite"):
            layer.raise_if_not_finite(wait=True)
        twin.append(*on_gpu((k, k)))
        twin.finish_attention(dispatch.quantize_blocks)
        twin.raise_if_not_finite(wait=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": 5}, "bits must be one of .* got 5"),
        ({"key_bits": 16}, "got 16"),
        ({"value_bits": 0}, "got 0"),
        ({"bits": "fp4"}, "bits must be one of .* got 'fp4'"),
        ({"key_bits": 8.0}, "got 8.0"),
        ({"value_bits": [8]}, r"got \[8\]"),
        ({"group_size": 20}, "group_size must be a multiple of 16, got 20"),
        ({"residual_length": -1}, "residual_length .* got -1"),
        ({"sinks": -1}, "sinks must be an int from 0 to 32, got -1"),
        ({"sinks": 33}, "sinks .* got 33"),
        ({"sinks": True}, "sinks .* got True"),
        ({"max_cache_len": 0}, "max_cache_len .* got 0"),
        ({"skip_layers": (3,)}, r"skip_layers must be ints, layers of a model of 3, got \(3,\)"),
    ],
)
def test_impossible_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        QuantizedKVCache(tiny_config(), **kwargs)


def test_groups_that_do_not_divide_and_full_caches():
    sizes = ((16, 16, 16), (32, 32, 32), (48, 48, 16), (64, 64, 32), (80, 80, 16), (128, 64, 32))
    for head_dim, fits, fits_8_bits in sizes:
        config = tiny_config(head_dim=head_dim)
        assert QuantizedKVCache(config).settings["group_size"] == fits
        assert QuantizedKVCache(config, bits=8).settings["group_size"] == fits_8_bits
        with pytest.raises(ValueError, match=f"group_size=96 does not divide head_dim={head_dim}"):
            QuantizedKVCache(config, group_size=96)
    for head_dim in (8, 24, 40):
        with pytest.raises(ValueError, match=f"group_size=16 does not divide head_dim={head_dim}"):
            QuantizedKVCache(tiny_config(head_dim=head_dim))
    cache = QuantizedKVCache(tiny_config(), group_size=16, max_cache_len=50)
    fill(cache, 50, 50)
    with pytest.raises(ValueError, match="50 stored tokens and 1 new ones exceed max_cache_len=50"):
        fill(cache, 1, 1)
    assert cache.get_seq_length() == 50


def test_skipped_layers_stay_exact():
    cache = QuantizedKVCache(tiny_config(), bits=2, group_size=16, skip_layers=(0, -1))
    for i in range(3):
        k, _ = fill(cache, 80, 80, i)
        assert torch.equal(cache.layers[i].dense()[0], k) == (i != 1)
