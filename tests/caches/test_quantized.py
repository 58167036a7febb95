"""Codecs, packed layouts, attention read packed, and QuantizedKVCache."""

import copy
import functools
import itertools
import pickle
import re
from dataclasses import replace
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from impostor import Impostor, fake_cuda, on_gpu
from models import prompt, tiny_config, tiny_model
from packed_problems import PACKED, as_dense, packed_problem
from problems import SHAPES, VARIANTS
from tolerance import FACTOR, plain_torch

import hf_kvattn
from hf_kvattn import QuantizedKVCache
from hf_kvattn.kernels import dispatch, native, reference, sdpa
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.kernels.triton import backend as triton_backend
from hf_kvattn.quant import affine, symmetric
from hf_kvattn.quant.blocks import quantize_blocks
from hf_kvattn.quant.codecs import CODECS, Codec, codec_for
from hf_kvattn.quant.layout import BLOCK, pack_keys, pack_values, unpack_keys, unpack_values
from hf_kvattn.quant.packed import PackedKV
from hf_kvattn.quant.rotation import rotate, size_for

FP8 = "fp8"
BITS = [8, 4, 3, 2]
ALL_BITS = [FP8, *BITS]


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("pack", "unpack"), [(pack_keys, unpack_keys), (pack_values, unpack_values)])
def test_packing_loses_nothing_and_takes_the_bytes_it_says(pack, unpack, bits, dim):
    codes = torch.randint(0, 2**bits, (2, 3, BLOCK, dim), dtype=torch.uint8)
    planes = codec_for(bits).planes
    packed = pack(codes, planes)
    assert packed.shape == (2, 3, 4 * bits * dim) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, planes), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_packed_layout_is_the_documented_one(bits):
    """One code at a time, from the text of quant/layout.py."""
    codes = torch.randint(0, 2**bits, (BLOCK, 32), dtype=torch.uint8)

    def code(packed: torch.Tensor, unit: int, i: int) -> int:
        packed, unit = packed[unit // 8 * 64 * bits :], unit % 8  # of its 16 channels
        if bits == 3:
            third = packed[128 + i].item() >> unit & 1
            return (packed[unit // 4 * 64 + i].item() >> (unit % 4 * 2) & 3) + 4 * third
        per = 8 // bits
        return packed[unit // per * 64 + i].item() >> (unit % per * bits) & (2**bits - 1)

    keys, values = (pack(codes, codec_for(bits).planes) for pack in (pack_keys, pack_values))
    for token, channel in torch.cartesian_prod(torch.arange(BLOCK), torch.arange(32)).tolist():
        expected = codes[token, channel].item()
        assert code(keys, channel // 4 * 2 + token // 16, token % 16 * 4 + channel % 4) == expected
        assert code(values, channel // 16 * 8 + token // 4, channel % 16 * 4 + token % 4) == expected


@pytest.mark.parametrize("dim", [16, 48, 64, 80])
def test_the_rotation_is_orthonormal_its_own_inverse_and_stays_in_its_block(dim):
    matrix, size = rotate(torch.eye(dim)), size_for(dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim))
    torch.testing.assert_close(rotate(rotate(torch.eye(dim))), torch.eye(dim))
    assert torch.equal(matrix != 0, torch.block_diag(*[torch.ones(size, size)] * (dim // size)) != 0)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(BITS),
    st.floats(-1e4, 1e4),
    st.floats(1e-6, 1e4),
    st.sampled_from(["normal", "outlier", "constant", "zero", "two"]),
)
@example(0, 3, 1e-6, 1e-6, "normal")  # a whole range that was rounded away from its ends once
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
    codec = codec_for(bits)
    full = codec.quantize(x, -1, (1.0,))
    codes, scale, zero = full
    error = (codec.dequantize(codes, scale, zero) - x).abs()
    # Zero and scale are rounded to bfloat16, 2^-9 relative, before the codes are chosen: half a step inside the range,
    # and at its ends what the rounded scale falls short of.
    size = x.abs().amax(-1, keepdim=True)
    short = scale * (2**bits - 1) * 2**-8 + (0 if zero is None else zero.abs() * 2**-8)
    assert (scale >= 0).all() and (error <= scale / 2 + short + size * 1e-6).all() and int(codes.max()) < 2**bits
    shrunk = codec.dequantize(*codec.quantize(x, -1, codec.key_shares)) - x  # never a worse sum of fourth powers
    assert (shrunk.double().pow(4).sum(-1) <= error.double().pow(4).sum(-1) * (1 + 1e-5) + 1e-30).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.floats(-1e4, 1e4), st.floats(1e-6, 1e4), st.sampled_from([1, 30, 3e4, 0]))
@example(5, 0, 1, 0)
def test_fp8_rounds_by_a_sixteenth_at_most(seed, offset, spread, outlier):
    """Three bits of mantissa; below 2^-6 of the scale steps are equal. Nothing becomes NaN."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * spread + offset
    x[:, 5] *= outlier
    x[2] = 0
    codes, scale, zero = CODECS["fp8"].quantize(x, -1, (1.0,))
    assert codes.dtype == torch.float8_e4m3fn and zero is None and (scale >= 0).all()
    read, size = CODECS["fp8"].dequantize(codes, scale, zero), x.abs().amax(-1, keepdim=True)
    assert read.isfinite().all() and (read[2] == 0).all()
    # What the scale, of 8 bits, falls short of at the end of the range is less than the last step.
    assert ((read - x).abs() <= x.abs() * 2**-4 + scale * 2**-10 + size * 1e-6).all()
    assert (read.abs().amax(-1) >= size[:, 0] * 0.96).all()


def test_fp8_codes_are_those_of_the_format():
    """Numbers that it has, with a scale of 1: 448 is the largest, 2^-9 the least."""
    x = torch.tensor([[448.0, -448, 416, 1, -1.125, 0, 2**-6, 2**-9, -3 * 2**-9, 2**-11, 17, 19]])
    codes, scale = symmetric.quantize(x, -1, torch.float8_e4m3fn)
    assert scale.item() == 1
    # 17 and 19 lie between 16, 18 and 20: ties go to the even mantissa.
    assert codes.float().tolist() == [[448, -448, 416, 1, -1.125, 0, 2**-6, 2**-9, -3 * 2**-9, 0, 16, 20]]
    assert codes.view(torch.uint8)[0, :4].tolist() == [0x7E, 0xFE, 0x7D, 0x38]


def test_packing_keeps_fp8_codes():
    codes = torch.randn(2, BLOCK, 48).mul(100).to(torch.float8_e4m3fn)
    for pack, unpack in ((pack_keys, unpack_keys), (pack_values, unpack_values)):
        packed, as_bytes = pack(codes, (8,)), codes.view(torch.uint8)
        assert packed.dtype == codes.dtype and torch.equal(packed.view(torch.uint8), pack(as_bytes, (8,)))
        assert torch.equal(unpack(packed, (8,)).view(torch.uint8), as_bytes)


def test_a_shrunk_range_has_finer_steps_where_that_helps():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3):
        codec = codec_for(bits)
        plain, best = affine.quantize(x, bits, -1), codec.quantize(x, -1, codec.key_shares)
        errors = [(codec.dequantize(*made) - x).pow(4).sum() for made in (plain, best)]
        assert errors[1] < 0.8 * errors[0] and (best[1] <= plain[1]).all()
        assert min(codec.key_shares) * 0.98 <= (best[1] / plain[1]).min()


MIXES = [(8, 8), (4, 4), (3, 3), (2, 2), (8, 4), (4, 2), (3, 8)]


FP8_MIXES = [(FP8, FP8), (FP8, 4), (8, FP8)]


@pytest.mark.parametrize("start", [0, 1, 32])
@pytest.mark.parametrize("bits", MIXES + FP8_MIXES, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_reference_and_sdpa_on_packed_tokens(name, bits, start):
    call = packed_problem(name, *bits, start=start)
    assert call.packed.tokens > 0
    expected = reference.attend_with_lse(as_dense(call))[0]
    torch.testing.assert_close(reference.attend(call), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sdpa.attend(call), expected, rtol=1e-5, atol=1e-5)


@functools.lru_cache(maxsize=8)
def packed_case(*args, **kwargs) -> tuple[AttendCall, torch.Tensor, torch.Tensor]:
    """A packed problem and what is due. The variants share it, so nobody may change it."""
    torch.default_generator.manual_seed(0)
    call = packed_problem(*args, **kwargs)
    return call, *reference.attend_with_lse(call)


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("bits", MIXES, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_native_reads_packed_tokens(name, bits, start, variant):
    call, exact, exact_lse = packed_case(name, *bits, start=start)
    lse = torch.full(call.q.shape[:3], torch.nan)
    out = native.attend(call, lse)
    # Queries and weights become whole numbers of 15 or 16 bits.
    torch.testing.assert_close(out, exact, rtol=0, atol=2e-4)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=2e-4)


HEADS = [(1, 16), (2, 48), (3, 112), (4, 496), (5, 512), (6, 80), (7, 16), (8, 176)]


@functools.lru_cache(maxsize=1)
def heads_of(group: int, dim: int) -> list[tuple[AttendCall, torch.Tensor]]:
    """Problems in every mix of bits, and what is due."""
    with mock.patch.dict(SHAPES, heads=(group, 1, 200, dim, {})):  # two whole tiles, a block, and a tail
        calls = [packed_problem("heads", *bits, split=0.85, start=4) for bits in MIXES]
    return [(call, reference.attend(call)) for call in calls]


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize(("group", "dim"), HEADS)
def test_native_reads_packed_heads_of_any_size(group, dim, variant):
    for call, expected in heads_of(group, dim):
        assert call.packed.tokens == 160
        torch.testing.assert_close(native.attend(call), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("bits", MIXES, ids=str)
def test_native_reads_packed_rings(bits, variant):
    call, expected, _ = packed_case("long-split", *bits)
    packed = call.packed
    for slot in (2, 40, 66):  # of 68; the 65 blocks wrap in the first stretch of steps, the middle one and the last
        arrays = ("k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero")
        given = {name: getattr(packed, name) for name in arrays}
        rolled = replace(packed, slot=slot, **{n: t if t is None else t.roll(slot, 2) for n, t in given.items()})
        torch.testing.assert_close(native.attend(replace(call, packed=rolled)), expected, rtol=0, atol=2e-4)


@functools.lru_cache(maxsize=8)
def errors_in_16_bits(*args, **kwargs) -> torch.Tensor:
    call, exact, _ = packed_case(*args, **kwargs)
    dense = as_dense(call)
    return plain_torch(replace(dense, k=dense.k.to(call.q.dtype), v=dense.v.to(call.q.dtype))).float() - exact


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("bits", MIXES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("split", [0.99, 0.3], ids=["all-packed", "long-tail"])
def test_native_packed_in_16_bits(split, dtype, bits, variant):
    """In bfloat16 weights for bytes have 8 bits: errors of the size of those that the dtype itself makes."""
    for name in ("long-split", "g4-d128", "padded", "window-many-queries"):
        call, exact, _ = packed_case(name, *bits, dtype, split, start=4)
        error = native.attend(call).float() - exact
        if dtype == torch.float16:
            assert error.abs().max() <= 2**-10 * exact.abs().max() + 2e-4
            continue
        plain = errors_in_16_bits(name, *bits, dtype, split, start=4)
        assert error.square().mean() <= 1.5**2 * plain.square().mean()
        assert error.abs().max() <= FACTOR * plain.abs().max() + 2**-9 * exact.abs().max()


@functools.lru_cache(maxsize=2)
def with_a_huge_channel(bits: tuple[int, int], size: int) -> tuple[AttendCall, torch.Tensor, torch.Tensor]:
    """The problem, what is due, and the error that bfloat16 makes."""

    def grow(k, v):
        k[:, :, 200:203, 5] *= size
        v[:, :, 300:301, 7] *= size

    call, exact, _ = packed_case("long-split", *bits, split=0.99, start=4, change=grow)
    dense = as_dense(call)
    plain = plain_torch(replace(dense, **{name: getattr(dense, name).bfloat16() for name in "qkv"})).float() - exact
    return call, exact, plain


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("size", [30, 300])
@pytest.mark.parametrize("bits", MIXES, ids=str)
def test_native_with_a_huge_channel_in_one_block(bits, size, variant):
    """16 blocks share the steps of queries: coarse ones then, but finer than what bfloat16 makes of such keys."""
    call, exact, plain = with_a_huge_channel(bits, size)
    assert (native.attend(call) - exact).abs().max() <= plain.abs().max() / 4


def unlike(k: torch.Tensor, v: torch.Tensor) -> None:
    """Biases of 600 and 22 beside channels without, as in Qwen's keys, and blocks in which a channel is constant."""
    k[..., 5] += 600
    k[..., 9] -= 22
    k[..., 11] = 3
    k[:, :, 320:352, 20] = 7  # varies elsewhere
    v[..., 2] = -5
    v[:, :, 640:700] = 1.5  # all channels: nothing but the rotation's first number is left


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("bits", MIXES, ids=str)
def test_native_with_channels_of_very_different_kinds(bits, variant):
    call, exact, _ = packed_case("long-split", *bits, split=0.99, start=4, change=unlike)
    torch.testing.assert_close(native.attend(call), exact, rtol=0, atol=2e-4)


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


@pytest.mark.parametrize("bits", FP8_MIXES, ids=str)
def test_native_leaves_fp8_to_sdpa_with_one_reason(bits, caplog):
    call = packed_problem("long-split", *bits)
    assert (call.packed.k_codec, call.packed.v_codec) == tuple(map(codec_for, bits))
    dispatch._log_once.cache_clear()
    with caplog.at_level("INFO", "hf_kvattn"):
        for _ in range(2):
            torch.testing.assert_close(dispatch.attend(call), reference.attend(call), rtol=1e-5, atol=1e-5)
    (record,) = caplog.records
    assert "auto backend: sdpa, because native kernels read int8, int4, int3, int2, not fp8" in record.getMessage()
    with hf_kvattn.backend("native"), pytest.raises(ValueError, match="int2, not fp8"):
        dispatch.attend(call)


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
        assert (kept - stored).abs().max() < 0.5
        assert (kept != stored)[:, :, sinks : sinks + packed].float().mean() > 0.9
    before = {name: t[:, :, : packed // BLOCK].clone() for name, t in layer._packed.items() if name != "k_mean"}
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
    per_group = 2 if bits in (8, FP8) else 4  # a scale, and a zero
    codes, scales = 2 * numbers * (8 if bits == FP8 else bits) // 8, (numbers // BLOCK + numbers // 16) * per_group
    exact, mean = 2 * 2 * 2 * (4 + BLOCK) * 16 * 4, 2 * 2 * 16 * 4
    assert cache.nbytes == 3 * (codes + scales + exact + mean) and codec_for(bits).symmetric == (bits in (8, FP8))
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
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.dense()[0], whole[:, :, : 77 + sinks].flip(0))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
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
        ours = there.layers[0].filled()
    for name, tensor in here.layers[0].filled().items():
        assert isinstance(ours[name], Impostor) and torch.equal(ours[name].data_on_cpu, tensor), name


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
    "use",
    [
        lambda layer: layer.filled(),
        copy.deepcopy,
        lambda layer: layer.check_crop(-1),
        lambda layer: layer.__getstate__(),
    ],
)
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


@pytest.mark.parametrize("bits", [(6, 4), (4, 6)], ids=str)
def test_a_width_that_native_does_not_read_is_refused_with_a_reason(bits):
    call = packed_problem("long-split", 4, 4)
    assert native.unsupported(call) is None
    made = {4: CODECS["int4"], 6: Codec("int6", (4, 2))}
    call.packed.k_codec, call.packed.v_codec = (made[each] for each in bits)
    assert native.unsupported(call) == "native kernels read int8, int4, int3, int2, not int6"


def blank(lead: tuple[int, int], slots: int, dim: int, bits: tuple[int, int], group: int) -> PackedKV:
    """Arrays with room for `slots` blocks, filled with what must stay where nothing is written."""
    made: dict[str, torch.Tensor | None] = {}
    for x, b, rest in (("k", bits[0], (dim,)), ("v", bits[1], (dim // group, BLOCK))):
        made[f"{x}_codes"] = torch.full((*lead, slots, 4 * b * dim), 9, dtype=torch.uint8)
        scale, zero = (torch.full((*lead, slots, *rest), 7.0, dtype=torch.bfloat16) for _ in range(2))
        made |= {f"{x}_scale": scale, f"{x}_zero": None if codec_for(b).symmetric else zero}
    return PackedKV(0, 0, *map(codec_for, bits), k_mean=torch.randn(*lead, dim), **made)


@functools.lru_cache(maxsize=1)
def quantized_by_pytorch(bits: tuple[int, int], dtype: torch.dtype) -> list[tuple]:
    """Keys, values, arrays to write to, and the same arrays as PyTorch fills them; heads and lengths of all sizes."""
    made = []
    for dim, blocks in itertools.product((16, 48, 64, 80, 256, 512), (1, 5)):
        k = torch.randn(2, 3, blocks * BLOCK, dim) * torch.exp(2 * torch.randn(dim))
        v = torch.randn(2, blocks * BLOCK, 3, dim).transpose(1, 2) * torch.exp(torch.randn(2, 3, blocks * BLOCK, 1))
        k[0, 0, :BLOCK, 3] = k[0, 0, 0, 3]  # a constant channel
        k[1, 2, 7, 5], v[0, 1, 9, 2] = 6e4, -6e4
        k[1, 0, :, :2], v[0, 0, 4] = 0, 0
        empty = blank((2, 3), blocks + 3, dim, bits, 16 if dim % 32 else 32)
        expected = copy.deepcopy(empty)
        quantize_blocks(k.to(dtype), v.to(dtype), expected, slot=2)
        made.append((k.to(dtype), v.to(dtype), empty, expected))
    return made


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (8, 4), (4, 8)], ids=str)
def test_native_quantizes_bit_for_bit_as_pytorch_does(bits, dtype, variant):
    for k, v, empty, expected in quantized_by_pytorch(bits, dtype):
        ours = copy.deepcopy(empty)
        assert dispatch.quantizer(k, *map(codec_for, bits)) is native.quantize_blocks
        native.quantize_blocks(k, v, ours, slot=2)
        for i, (array, other) in enumerate(zip(ours.arrays(), expected.arrays(), strict=True)):
            assert array is None or torch.equal(array, other), (i, k.shape)


@pytest.mark.parametrize(("bits", "dim"), [((3, 8), 64), ((4, 2), 64), ((8, 8), 528), ((FP8, 8), 64), ((4, FP8), 64)])
def test_native_leaves_to_pytorch_what_it_does_not_quantize(bits, dim, caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level("INFO", "hf_kvattn"):
        assert dispatch.quantizer(torch.zeros(1, 1, 32, dim), *map(codec_for, bits)) is quantize_blocks
    assert "blocks are quantized with PyTorch's operations, because native kernels quantize" in caplog.text


@pytest.mark.parametrize(
    ("bits", "capability", "reason"),
    [
        ((8, 3), (9, 0), "not keys to int8 and values to int3"),
        ((FP8, 4), (9, 0), "not keys to fp8 and values to int4"),
        ((4, 4), (7, 5), "needs? 8.0"),
        ((4, 8), (8, 0), None),
    ],
)
def test_triton_quantizes_where_it_serves_and_one_reason_is_logged_where_not(
    bits, capability, reason, caplog, monkeypatch
):
    dispatch._log_once.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with fake_cuda(capability), caplog.at_level("INFO", "hf_kvattn"):
        k = on_gpu(torch.randn(2, 2, 32, 16))
        chosen = {dispatch.quantizer(k, *map(codec_for, bits)) for _ in range(3)}
    assert chosen == {triton_backend.quantize_blocks if reason is None else quantize_blocks}
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == (reason is not None)
    assert all("PyTorch's operations" in message and re.search(reason, message) for message in logged)


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
