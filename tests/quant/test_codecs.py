"""Codecs, the packed layout and the rotation."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from impostor import fake_cuda, on_gpu

from hf_kvattn.quant import symmetric
from hf_kvattn.quant.layout import (
    BLOCK,
    keys_to,
    pack_keys,
    pack_values,
    planes_of,
    unpack_keys,
    unpack_values,
    values_to,
)
from hf_kvattn.quant.rotation import rotate, size_for

BITS = [8, 4, 3, 2]


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("pack", "unpack"), [(pack_keys, unpack_keys), (pack_values, unpack_values)])
def test_packing_loses_nothing_and_takes_the_bytes_it_says(pack, unpack, bits, dim):
    codes = torch.randint(0, 2**bits, (2, 3, BLOCK, dim), dtype=torch.uint8)
    planes = planes_of(bits)
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

    keys, values = (pack(codes, planes_of(bits)) for pack in (pack_keys, pack_values))
    for token, channel in torch.cartesian_prod(torch.arange(BLOCK), torch.arange(32)).tolist():
        expected = codes[token, channel].item()
        assert code(keys, channel // 4 * 2 + token // 16, token % 16 * 4 + channel % 4) == expected
        assert code(values, channel // 16 * 8 + token // 4, channel % 16 * 4 + token % 4) == expected


@pytest.mark.parametrize("dim", [16, 48, 80, 256])
@pytest.mark.parametrize("bits", BITS)
def test_codes_on_a_gpu_lie_in_words_of_four_tokens(bits, dim):
    """One word at a time, from the text of quant/layout.py; and back, and to the CPU's layout and back."""
    codes = torch.randint(0, 2**bits, (2, BLOCK, dim), dtype=torch.uint8)
    planes = planes_of(bits)
    with fake_cuda():
        packed = [pack(on_gpu(codes), planes) for pack in (pack_keys, pack_values)]
        assert all(
            t.shape == (2, 4 * bits * dim) and t.dtype == torch.uint8 and t.device.type == "cuda" for t in packed
        )
        for unpack, t in zip((unpack_keys, unpack_values), packed, strict=True):
            assert torch.equal(unpack(t, planes).data_on_cpu, codes)
        for move, pack, t in zip((keys_to, values_to), (pack_keys, pack_values), packed, strict=True):
            on_cpu = move(t, planes, "cpu")
            assert on_cpu.device.type == "cpu" and torch.equal(on_cpu, pack(codes, planes))
            assert torch.equal(move(on_cpu, planes, "cuda").data_on_cpu, t.data_on_cpu)
            assert move(t, planes, t.device) is t and move(on_cpu, planes, "cpu") is on_cpu
    keys, values = (t.data_on_cpu[1].tolist() for t in packed)

    def field(row: list[int], begin_bytes: int, bit: int, width: int) -> int:
        return int.from_bytes(row[begin_bytes:], "little") >> bit & 2**width - 1

    for token, channel in [(0, 0), (1, 0), (5, 3), (14, 7), (31, dim - 1)]:
        for row, word in ((keys, token // 4 * dim + channel), (values, channel * 8 + token // 4)):
            found, begin = 0, 0
            for i, width in enumerate(planes):
                found |= field(row, begin, (word * 4 + token % 4) * width, width) << sum(planes[:i])
                begin += 4 * width * dim
            assert found == codes[1, token, channel]


@pytest.mark.parametrize("dim", [16, 48, 64, 80])
def test_the_rotation_is_orthonormal_its_own_inverse_and_stays_in_its_block(dim):
    matrix, size = rotate(torch.eye(dim)), size_for(dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim))
    torch.testing.assert_close(rotate(rotate(torch.eye(dim))), torch.eye(dim))
    assert torch.equal(matrix != 0, torch.block_diag(*[torch.ones(size, size)] * (dim // size)) != 0)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(-1e4, 1e4),
    st.floats(1e-6, 1e4),
    st.sampled_from(["normal", "outlier", "constant", "zero", "two"]),
)
@example(0, 1e-6, 1e-6, "normal")
def test_codes_of_8_bits_are_within_half_a_step(seed, offset, spread, kind):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * spread + offset
    if kind == "outlier":
        x[:, 5] = 1000 * spread + offset
    if kind == "constant":
        x[:] = x[:, :1]
    if kind == "zero":
        x[:] = 0
    if kind == "two":
        x[:, 2:] = x[:, :1]
    codes, scale = symmetric.quantize(x, -1, torch.uint8)
    error = (symmetric.dequantize(codes, scale) - x).abs()
    # A scale is rounded to bfloat16, 2^-9 relative, before the codes are chosen: half a step inside the range, and at
    # its ends what the rounded scale falls short of.
    short = scale * 255 * 2**-8 + x.abs().amax(-1, keepdim=True) * 1e-6
    assert (scale >= 0).all() and (error <= scale / 2 + short).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.floats(-1e4, 1e4), st.floats(1e-6, 1e4), st.sampled_from([1, 30, 3e4, 0]))
@example(5, 0, 1, 0)
def test_fp8_rounds_by_a_sixteenth_at_most(seed, offset, spread, outlier):
    """Three bits of mantissa; below 2^-6 of the scale steps are equal. Nothing becomes NaN."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) * spread + offset
    x[:, 5] *= outlier
    x[2] = 0
    codes, scale = symmetric.quantize(x, -1, symmetric.FP8)
    assert codes.dtype == torch.float8_e4m3fn and (scale >= 0).all()
    read, size = symmetric.dequantize(codes, scale), x.abs().amax(-1, keepdim=True)
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
