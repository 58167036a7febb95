"""Backends on tokens that are packed codes, and the kernels that quantize."""

import copy
import functools
import itertools
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from impostor import fake_cuda, on_gpu
from packed_problems import PACKED, as_dense, blank, importance, packed_problem
from problems import SHAPES, VARIANTS
from tolerance import FACTOR, plain_torch

import hf_kvattn
from hf_kvattn.kernels import dispatch, native, reference, sdpa
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.kernels.triton import backend as triton_backend
from hf_kvattn.quant.blocks import Blocks, quantize_blocks
from hf_kvattn.quant.codecs import CODECS, Codec, codec_for
from hf_kvattn.quant.few_bits import MULTIPLIERS
from hf_kvattn.quant.layout import BLOCK
from hf_kvattn.quant.packed import OF_BLOCKS

FP8 = "fp8"


MIXES = [(8, 8), (4, 4), (3, 3), (2, 2), (8, 4), (4, 2), (3, 8)]


FP8_MIXES = [(FP8, FP8), (FP8, 4), (8, FP8)]


HEADS = [(1, 16), (2, 48), (3, 112), (4, 496), (5, 512), (6, 80), (7, 16), (8, 176)]


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


CLOSE = 2e-4  # native: queries and weights become whole numbers of 15 or 16 bits


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("bits", MIXES, ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_native_reads_packed_tokens(name, bits, start, variant):
    call, exact, exact_lse = packed_case(name, *bits, start=start)
    lse = torch.full(call.q.shape[:3], torch.nan)
    out = native.attend(call, lse)
    torch.testing.assert_close(out, exact, rtol=0, atol=CLOSE)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_queries_unlike_those_that_a_table_is_for(bits, variant):
    """They are large where codes are narrow: their 16 bits are coarse for wide codes, and no coarser than that."""
    call, _, _ = packed_case("g4-d128", bits, bits)
    packed, unlike = call.packed, (1 / importance(128)).clamp(max=2.0**16).sqrt()
    call = replace(call, q=call.q / importance(128).sqrt() * unlike / unlike.square().mean().sqrt())
    queries = call.q.gather(-1, packed.k_order.long().repeat_interleave(4, 1)[:, :, None]).abs()
    queries = queries * packed.k_step.float().repeat_interleave(4, 1)[:, :, None]
    largest_code = (packed.k_widths.float().exp2() - 1).sum(-1, keepdim=True).repeat_interleave(4, 1) * 16 / 2
    bound = call.scale * queries.amax(-1) * max(MULTIPLIERS) / 32512 / 2 * largest_code  # of a score's error
    lse, (_, expected) = torch.full(call.q.shape[:3], torch.nan), reference.attend_with_lse(call)
    native.attend(call, lse)
    assert bool(((lse - expected).abs() <= bound + 1e-5).all())


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
        torch.testing.assert_close(native.attend(call), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("bits", MIXES, ids=str)
def test_native_reads_packed_rings(bits, variant):
    call, expected, _ = packed_case("long-split", *bits)
    packed = call.packed
    for slot in (2, 40, 66):  # of 68; the 65 blocks wrap in the first stretch of steps, the middle one and the last
        rolled = replace(packed, slot=slot, **{name: getattr(packed, name).roll(slot, 2) for name in OF_BLOCKS})
        torch.testing.assert_close(native.attend(replace(call, packed=rolled)), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize(
    "name", ["sinks", "sinks-one", "sinks-padded", "sinks-coming-in", "sinks-before-blocks", "sinks-long-prefill"]
)
def test_native_reads_sinks_beside_packed_tokens(name, variant):
    """The sums of the sinks' values are not rotated, those of the blocks after them are."""
    rules = {"window": 900, "sinks": (4, 7)}
    with mock.patch.dict(SHAPES, {"sinks-before-blocks": (3, 5, 1000, 64, rules)}):  # several threads' shares
        for start in (0, 4):
            call, exact, exact_lse = packed_case(name, 4, 8, start=start)
            lse = torch.full(call.q.shape[:3], torch.nan)
            torch.testing.assert_close(native.attend(call, lse), exact, rtol=0, atol=CLOSE)
            torch.testing.assert_close(lse, exact_lse, rtol=0, atol=CLOSE)


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
            assert error.abs().max() <= 2**-10 * exact.abs().max() + CLOSE
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
    """16 blocks of 8-bit keys share the steps of queries: coarse ones then, but finer than what bfloat16 makes of them.

    Other blocks have static steps, and cut off what is too large for them.
    """
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
    torch.testing.assert_close(native.attend(call), exact, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("bits", FP8_MIXES, ids=str)
def test_native_leaves_fp8_to_sdpa_with_one_reason(bits, caplog):
    call = packed_problem("long-split", *bits)
    assert (call.packed.k_codec, call.packed.v_codec) == tuple(map(codec_for, bits))
    dispatch.logger.info_once.cache_clear()
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


@pytest.mark.parametrize("bits", [(6, 4), (4, 6)], ids=str)
def test_a_width_that_native_does_not_read_is_refused_with_a_reason(bits):
    call = packed_problem("long-split", 4, 4)
    assert native.unsupported(call) is None
    made = {4: CODECS["int4"], 6: Codec("int6", 6, by_channel=True)}
    call.packed.k_codec, call.packed.v_codec = (made[each] for each in bits)
    assert native.unsupported(call) == "native kernels read int8, int4, int3, int2, not int6"


@functools.lru_cache(maxsize=1)
def quantized_by_pytorch(bits: tuple[int, int], dtype: torch.dtype) -> list[tuple]:
    """Keys, values, arrays to write to, and the same arrays as PyTorch fills them; heads and lengths of all sizes."""
    made = []
    for dim, blocks in itertools.product((16, 48, 64, 80, 96, 256, 512), (1, 5)):
        k = torch.randn(2, 3, blocks * BLOCK, dim) * torch.exp(2 * torch.randn(dim))
        v = torch.randn(2, blocks * BLOCK, 3, dim).transpose(1, 2) * torch.exp(torch.randn(2, 3, blocks * BLOCK, 1))
        k[0, 0, :BLOCK, 3] = k[0, 0, 0, 3]  # a constant channel
        k[1, 2, 7, 5], v[0, 1, 9, 2] = 6e4, -6e4
        k[1, 0, :, :2], v[0, 0, 4], v[0, 0, 5] = 0, 0, -0.0
        k[1, 1] = -0.0  # with a mean of 0, below: its scales are 0, never -0
        k[0, 1, :, 4], v[1, 2, 3] = 1e-30, 1e-30
        k[0, 2, :3, 6], v[1, 2, 4, 3], v[1, 2, 5] = 3e38, -3e38, 1e35
        k[1, 0, :, 7:11] = torch.arange(BLOCK * blocks).mul(0.5)[:, None] % 4  # ties
        group = {16: 16, 48: 48, 80: 16, 96: 48}.get(dim, 32)  # odd parts of sums too
        empty = blank((2, 3), blocks + 3, dim, bits, group, torch.where(k.abs() > 1e4, 0, k))
        empty.k_mean[1, 1] = 0
        expected = copy.deepcopy(empty)
        k, v = (t.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else t.to(dtype) for t in (k, v))
        quantize_blocks([Blocks(k, v, expected, 2)])
        made.append((k, v, empty, expected))
    return made


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 3), (2, 2), (8, 4), (4, 8)], ids=str)
def test_native_quantizes_bit_for_bit_as_pytorch_does(bits, dtype, variant):
    for k, v, empty, expected in quantized_by_pytorch(bits, dtype):
        ours = copy.deepcopy(empty)
        assert dispatch.quantizer(k, *map(codec_for, bits)) is native.quantize_blocks
        native.quantize_blocks([Blocks(k, v, ours, 2)])
        for i, (array, other) in enumerate(zip(ours.arrays(), expected.arrays(), strict=True)):
            assert array is None or torch.equal(array, other), (i, k.shape)
        scales = [scale for scale in (ours.k_scale, ours.v_scale) if scale.dtype == torch.bfloat16]
        assert not any(torch.signbit(scale).any() for scale in scales), "-0 equals 0"


@pytest.mark.parametrize(("bits", "dim"), [((8, 8), 528), ((FP8, 8), 64), ((4, FP8), 64)])
def test_native_leaves_to_pytorch_what_it_does_not_quantize(bits, dim, caplog):
    dispatch.logger.info_once.cache_clear()
    with caplog.at_level("INFO", "hf_kvattn"):
        assert dispatch.quantizer(torch.zeros(1, 1, 32, dim), *map(codec_for, bits)) is quantize_blocks
    assert "blocks are quantized with PyTorch's operations, because native kernels quantize" in caplog.text


@pytest.mark.parametrize(
    ("bits", "capability", "reason"),
    [
        ((FP8, 4), (9, 0), "not keys to fp8 and values to int4"),
        ((4, 4), (7, 5), "needs? 8.0"),
        ((4, 8), (8, 0), None),
    ],
)
def test_triton_quantizes_where_it_serves_and_one_reason_is_logged_where_not(
    bits, capability, reason, caplog, monkeypatch
):
    dispatch.logger.info_once.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with fake_cuda(capability), caplog.at_level("INFO", "hf_kvattn"):
        k = on_gpu(torch.randn(2, 2, 32, 16))
        chosen = {dispatch.quantizer(k, *map(codec_for, bits)) for _ in range(3)}
    assert chosen == {triton_backend.quantize_blocks if reason is None else quantize_blocks}
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == (reason is not None)
    assert all("PyTorch's operations" in message and re.search(reason, message) for message in logged)
