"""Codecs, packed layouts, attention read packed, and QuantizedKVCache."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from models import prompt, tiny_config, tiny_model
from problems import VARIANTS, problem

import hf_kvattn
from hf_kvattn import QuantizedKVCache
from hf_kvattn.kernels import native, reference, sdpa
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.quant.affine import dequantize, quantize
from hf_kvattn.quant.layout import BLOCK, pack_keys, pack_values, padded_dim, unpack_keys, unpack_values
from hf_kvattn.quant.packed import PackedKV

BITS = [8, 4, 2]


@pytest.mark.parametrize("dim", [1, 7, 16, 20, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("pack", "unpack"), [(pack_keys, unpack_keys), (pack_values, unpack_values)])
def test_packing_loses_nothing_and_takes_the_bytes_it_says(pack, unpack, bits, dim):
    codes = torch.randint(0, 2**bits, (2, 3, BLOCK, dim), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, 4 * bits * padded_dim(dim)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, dim), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_packed_layout_is_the_documented_one(bits):
    """One code at a time, from the text of quant/layout.py."""
    codes = torch.randint(0, 2**bits, (BLOCK, 32), dtype=torch.uint8)
    keys, values, per = pack_keys(codes, bits), pack_values(codes, bits), 8 // bits
    for token, channel in torch.cartesian_prod(torch.arange(BLOCK), torch.arange(32)).tolist():
        unit = channel // 4 * 2 + token // 16
        byte = keys[unit // per * 64 + token % 16 * 4 + channel % 4]
        assert (byte >> (unit % per * bits)) & (2**bits - 1) == codes[token, channel]
        unit = channel // 16 * 8 + token // 4
        byte = values[unit // per * 64 + channel % 16 * 4 + token % 4]
        assert (byte >> (unit % per * bits)) & (2**bits - 1) == codes[token, channel]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(BITS),
    st.floats(-1e4, 1e4),
    st.floats(1e-6, 1e4),
    st.sampled_from(["normal", "outlier", "constant", "zero", "two"]),
)
@example(3103, 2, 29.0, 2365.0, "constant")  # the rounded zero lies above the group: a negative scale once
def test_codes_are_within_half_a_step(seed, bits, offset, spread, kind):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * spread + offset
    if kind == "outlier":
        x[:, 5] = 1000 * spread + offset
    if kind == "constant":
        x[:] = x[:, :1]
    if kind == "zero":
        x[:] = 0
    if kind == "two":
        x[:, 2:] = x[:, :1]
    codes, scale, zero = quantize(x, bits, dim=-1)
    error = (dequantize(codes, scale, zero) - x).abs()
    # Zero and scale are rounded to bfloat16, 2^-9 relative, before the codes are chosen: half a step inside the range,
    # and at its upper end what the rounded scale falls short of.
    bound = scale / 2 + zero.abs() * 2**-8 + scale * (2**bits - 1) * 2**-8 + x.abs().amax(-1, keepdim=True) * 1e-6
    assert (scale >= 0).all() and (error <= bound).all() and int(codes.max()) < 2**bits


def packed_problem(name: str, k_bits: int, v_bits: int, dtype=torch.float32, split: float = 0.7) -> AttendCall:
    """A problem whose first tokens, whole blocks, are quantized, with poisoned spare blocks behind them."""
    call = problem(name, dtype)
    batch, heads, length, dim = call.k.shape
    count = int(length * split) // BLOCK
    done, group = count * BLOCK, 16 if dim % 32 else 32
    mean = call.k[:, :, : max(done, 1)].float().mean(2)
    blocks = (call.k[:, :, :done].float() - mean[:, :, None]).unflatten(2, (count, BLOCK))
    k_codes, k_scale, k_zero = quantize(blocks, k_bits, dim=-2)
    groups = call.v[:, :, :done].float().unflatten(2, (count, BLOCK)).unflatten(-1, (-1, group))
    v_codes, v_scale, v_zero = quantize(groups, v_bits, dim=-1)

    def roomy(tensor, poison):
        spare = torch.full((*tensor.shape[:2], 3, *tensor.shape[3:]), poison, dtype=tensor.dtype)
        return torch.cat([tensor, spare], 2).contiguous()

    call.packed = PackedKV(
        done,
        k_bits,
        v_bits,
        roomy(pack_keys(k_codes, k_bits), 255),
        roomy(k_scale[..., 0, :].bfloat16(), 1e30),
        roomy(k_zero[..., 0, :].bfloat16(), 1e30),
        mean,
        roomy(pack_values(v_codes.flatten(-2), v_bits), 255),
        roomy(v_scale[..., 0].transpose(-1, -2).bfloat16(), 1e30),
        roomy(v_zero[..., 0].transpose(-1, -2).bfloat16(), 1e30),
    )
    call.k, call.v = call.k[:, :, done:], call.v[:, :, done:]
    return call


def as_dense(call: AttendCall) -> AttendCall:
    """The same problem with the packed tokens dequantized, which is what it means."""
    k, v = call.packed.dense(0, call.packed.tokens)
    return AttendCall(
        call.q, torch.cat([k, call.k.float()], 2), torch.cat([v, call.v.float()], 2), call.scale, call.causal,
        call.window, call.softcap, call.first,
    )  # fmt: skip


PACKED = ["g3-65", "g4-d128", "g5-d80", "g8-d96", "d256", "long-split", "short-query", "rows-cross-chunk",
          "prefill-after-past", "window-1", "window-crosses-tile", "window-many-queries", "softcap", "softcap-window",
          "padded", "padded-window", "not-causal"]  # fmt: skip


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2), (8, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_reference_and_sdpa_on_packed_tokens(name, bits):
    call = packed_problem(name, *bits)
    assert call.packed.tokens > 0
    expected = reference.attend_with_lse(as_dense(call))[0]
    torch.testing.assert_close(reference.attend(call), expected, rtol=1e-5, atol=1e-5)
    if call.softcap is None:
        torch.testing.assert_close(sdpa.attend(call), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2), (8, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("name", PACKED)
def test_native_reads_packed_tokens(name, variant, bits):
    call = packed_problem(name, *bits)
    lse = torch.full(call.q.shape[:3], torch.nan)
    out = native.attend(call, lse)
    exact, exact_lse = reference.attend_with_lse(call)
    # Queries and weights are split into 16 bits a block where the CPU multiplies bytes.
    torch.testing.assert_close(out, exact, rtol=0, atol=2e-4)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("split", [0.99, 0.3], ids=["all-packed", "long-tail"])
def test_native_packed_in_16_bits(dtype, split):
    for name in ("long-split", "g4-d128", "padded"):
        call = packed_problem(name, 4, 4, dtype, split)
        exact = reference.attend_with_lse(call)[0]
        error = (native.attend(call).float() - exact).abs().max()
        assert error <= 2 ** (-8 if dtype == torch.bfloat16 else -10) * exact.abs().max() + 2e-4


def test_a_wrong_bit_would_be_noticed():
    call = packed_problem("long-split", 4, 4)
    before = native.attend(call)
    call.packed.k_codes[:, :, 7] ^= 0x11
    assert (native.attend(call) - before).abs().max() > 1e-3


def fill(cache: QuantizedKVCache, length: int, chunk: int, layer: int = 0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 2, length, 16, generator=generator) for _ in "kv")
    for start in range(0, length, chunk):
        cache.update(k[:, :, start : start + chunk], v[:, :, start : start + chunk], layer)
    return k, v


@pytest.mark.parametrize("chunk", [1, 7, 32, 45, 300])
@pytest.mark.parametrize("residual", [None, 5, 64])
def test_blocks_are_quantized_once_and_the_newest_tokens_are_exact(residual, chunk):
    cache = QuantizedKVCache(tiny_config(), bits=4, group_size=16, residual_length=residual)
    k, v = fill(cache, 300, chunk)
    layer = cache.layers[0]
    packed = (300 - (residual or 0)) // BLOCK * BLOCK
    assert layer.packed_tokens == packed and cache.get_seq_length() == 300
    keys, values = layer.dense()
    assert torch.equal(keys[:, :, packed:], k[:, :, packed:]) and torch.equal(values[:, :, packed:], v[:, :, packed:])
    assert (keys - k).abs().max() < 0.5 and not torch.equal(keys, k)
    before = {name: t[:, :, : packed // BLOCK].clone() for name, t in layer._packed.items() if name != "k_mean"}
    fill(cache, 700, chunk, seed=1)
    for name, tensor in before.items():
        assert torch.equal(layer._packed[name][:, :, : packed // BLOCK], tensor), (
            "codes changed after they were written"
        )


@pytest.mark.parametrize("bits", BITS)
def test_bytes_and_bits_are_those_allocated(bits):
    cache = QuantizedKVCache(tiny_config(), bits=bits, group_size=16, max_cache_len=320)
    for i in range(3):
        fill(cache, 320, 320, i)
    tensors = [t for x in cache.layers for t in (x._tail_k, x._tail_v, *x._packed.values())]
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)
    blocks = 10 * BLOCK * 16 * 2 * 2
    codes, scales = 2 * blocks * bits // 8, blocks // BLOCK * 2 * 2 + blocks // 16 * 2 * 2
    tail, mean = 2 * 2 * 2 * BLOCK * 16 * 4, 2 * 2 * 16 * 4
    assert cache.nbytes == 3 * (codes + scales + tail + mean)
    assert cache.bits_per_element == 8 * cache.nbytes / (3 * 2 * 2 * 2 * 320 * 16)


@pytest.mark.parametrize("family", ["llama-g3", "gemma3", "gemma2", "mistral"])
@pytest.mark.parametrize("left_padding", [0, 5])
@pytest.mark.parametrize("bits", BITS)
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
        for backend in ("auto", "native", None) + (("sdpa",) if family != "gemma2" else ()):
            # The kernels agree within 2e-4; three layers of a random model make 3e-3 of it, a wrong code far more.
            torch.testing.assert_close(run(backend), expected, rtol=1e-2, atol=1e-2)


def test_more_bits_are_nearer_to_stock():
    model = tiny_model("llama-g3")
    ids, errors = torch.randint(3, 128, (2, 160)), {}
    with torch.no_grad():
        stock = model(ids).logits[:, 101:]
        with hf_kvattn.enabled(model):
            for bits in BITS:
                cache = QuantizedKVCache(model.config, bits=bits, group_size=16)
                model(ids[:, :101], past_key_values=cache)
                logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(101, 160)]
                errors[bits] = ((torch.cat(logits, 1) - stock).abs().mean() / stock.std()).item()
    assert errors[8] < 0.05 and 4 * errors[8] < errors[4] and 2 * errors[4] < errors[2], errors


def test_the_prompts_own_forward_is_exact():
    model, ids = tiny_model(), prompt(80)["input_ids"]
    with torch.no_grad(), hf_kvattn.enabled(model):
        logits = model(ids, past_key_values=QuantizedKVCache(model.config, bits=2, group_size=16)).logits
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_crop_reorder_and_select_keep_what_they_should():
    cache = QuantizedKVCache(tiny_config(), bits=8, group_size=16)
    fill(cache, 100, 9)
    layer = cache.layers[0]
    whole = layer.dense()[0].clone()
    cache.layers[0].crop(-3)
    assert torch.equal(layer.dense()[0], whole[:, :, :97]) and layer.packed_tokens == 96
    cache.layers[0].crop(-20)  # into a block: its tokens go back to the tail as they were read
    assert layer.packed_tokens == 64 and torch.equal(layer.dense()[0], whole[:, :, :77])
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.dense()[0], whole[:, :, :77].flip(0))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(layer.dense()[0], whole[:, :, :77].flip(0)) and layer.batch_size == 2
    with pytest.raises(ValueError, match="from -77 .* got -78"):
        layer.crop(-78)
    cache.reset()
    k, _ = fill(cache, 40, 40, seed=5)
    assert (layer.dense()[0] - k).abs().max() < 0.05


def test_outlier_channels_like_those_of_qwen():
    """Key channels with offsets of 600 beside others of 1: the mean is taken off, so the small ones keep their bits."""
    cache = QuantizedKVCache(tiny_config(), bits=8, group_size=16)
    k, v = torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16)
    k[..., 3] += 600
    cache.update(k, v, 0)
    keys, _ = cache.layers[0].dense()
    assert (keys - k).abs().max() < 0.05


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_named_and_no_block_is_written(bad):
    for name in ("keys", "values"):
        cache = QuantizedKVCache(tiny_config(), bits=4, group_size=16)
        fill(cache, 64, 64, layer=1)
        before = {n: t.clone() for n, t in cache.layers[1]._packed.items()}
        k, v = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
        (k if name == "keys" else v)[1, 0, 7, 3] = bad
        with pytest.raises(ValueError, match=f"layer 1: {name} are NaN or infinite"):
            cache.update(k, v, 1)
        assert cache.layers[1].packed_tokens == 64
        assert all(torch.equal(t[:, :, :2], cache.layers[1]._packed[n][:, :, :2]) for n, t in before.items())
        cache.layers[1].crop(-40)
        fill(cache, 40, 40, layer=1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bits": 5}, "bits must be one of .* got 5"),
        ({"key_bits": 16}, "got 16"),
        ({"value_bits": 0}, "got 0"),
        ({"group_size": 20}, "group_size must be a multiple of 16, got 20"),
        ({"residual_length": -1}, "residual_length .* got -1"),
        ({"max_cache_len": 0}, "max_cache_len .* got 0"),
        ({"skip_layers": (3,)}, r"skip_layers \[3\] do not exist in a model of 3 layers"),
    ],
)
def test_impossible_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        QuantizedKVCache(tiny_config(), **kwargs)


def test_groups_that_do_not_divide_and_full_caches():
    with pytest.raises(ValueError, match="group_size=32 does not divide head_dim=16"):
        fill(QuantizedKVCache(tiny_config()), 3, 3)
    cache = QuantizedKVCache(tiny_config(), group_size=16, max_cache_len=50)
    fill(cache, 50, 50)
    with pytest.raises(ValueError, match="50 stored tokens and 1 new ones exceed max_cache_len=50"):
        fill(cache, 1, 1)
    assert cache.get_seq_length() == 50


def test_skipped_layers_stay_exact():
    cache = QuantizedKVCache(tiny_config(), bits=2, group_size=16, skip_layers=(0, -1))
    for i in range(3):
        k, _ = fill(cache, 64, 64, i)
        assert torch.equal(cache.layers[i].dense()[0], k) == (i != 1)
