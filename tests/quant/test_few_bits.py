"""Codes of 4 bits and fewer: how far they may be from the numbers, and what is chosen for each channel."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from impostor import fake_cuda, on_gpu

from hf_kvattn.quant import few_bits, widths
from hf_kvattn.quant.few_bits import GROUP, MAX_WIDTH, MULTIPLIERS
from hf_kvattn.quant.layout import BLOCK, by_width_to, pack_by_width, pack_keys, planes_of, unpack_by_width

UNLIKE = [[7, 6, 5, 2, 0], [4, 3, 1, 0], [2, 2], [7, 1], [3, 0, 0]]


def codes_of(groups: list[int], *lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes `(*lead, 32, D)` of these widths, and the widths of the channels."""
    of_channels = torch.tensor(groups).repeat_interleave(GROUP)
    return (torch.rand(*lead, BLOCK, len(of_channels)) * 2**of_channels).to(torch.uint8), of_channels


@pytest.mark.parametrize("groups", UNLIKE, ids=str)
def test_packing_by_width_is_the_documented_layout_and_loses_nothing(groups):
    codes, _ = codes_of(groups, 2, 3)
    packed = pack_by_width(codes, torch.tensor(groups, dtype=torch.uint8).expand(2, -1), sum(groups) // len(groups))
    assert packed.shape == (2, 3, 64 * sum(groups)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_by_width(packed, torch.tensor(groups).expand(2, -1)), codes)
    parts = [pack_keys(part, planes_of(b)) for part, b in zip(codes.split(GROUP, -1), groups, strict=True) if b]
    assert torch.equal(packed, torch.cat([packed[..., :0], *parts], -1)), "each group is a block of 16 channels"


def test_heads_of_unlike_widths_lie_side_by_side():
    groups = torch.tensor([[[4, 2, 1, 1], [2, 2, 2, 2]], [[7, 1, 0, 0], [3, 3, 2, 0]]], dtype=torch.uint8)
    codes = (torch.rand(2, 2, 5, BLOCK, 64) * 2.0 ** groups.repeat_interleave(GROUP, -1)[:, :, None, None]).to(
        torch.uint8
    )
    packed = pack_by_width(codes, groups, 2)
    assert torch.equal(unpack_by_width(packed, groups), codes)
    for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert torch.equal(packed[b, h], pack_by_width(codes[b, h], groups[b, h], 2))


@pytest.mark.parametrize("groups", UNLIKE, ids=str)
def test_keys_on_a_gpu_lie_in_words_of_four_tokens_group_by_group(groups):
    codes, _ = codes_of(groups, 2)
    widths_ = torch.tensor(groups, dtype=torch.uint8)
    with fake_cuda():
        packed = pack_by_width(on_gpu(codes), on_gpu(widths_), sum(groups) // len(groups))
        assert torch.equal(unpack_by_width(packed, on_gpu(widths_)).data_on_cpu, codes)
        on_cpu = by_width_to(packed, on_gpu(widths_), "cpu")
        assert torch.equal(on_cpu, pack_by_width(codes, widths_, sum(groups) // len(groups)))
        assert torch.equal(by_width_to(on_cpu, widths_, "cuda").data_on_cpu, packed.data_on_cpu)
        assert by_width_to(packed, on_gpu(widths_), packed.device) is packed
        row, begin = packed.data_on_cpu[1].tolist(), 0
    for g, width in enumerate(groups):
        for token, channel in [(0, 0), (1, 0), (5, 3), (14, 7), (31, 15)]:
            found, at, low = 0, begin, 0
            for bits in planes_of(width):
                word = token // 4 * GROUP + channel
                field = int.from_bytes(row[at:], "little") >> (word * 4 + token % 4) * bits & 2**bits - 1
                found, at, low = found | field << low, at + 64 * bits, low + bits
            assert found == codes[1, token, g * GROUP + channel]
        begin += 64 * width


def test_sides_are_four_and_two_bits():
    offset, multiplier = torch.arange(16, dtype=torch.uint8).flip(0), torch.arange(16, dtype=torch.uint8) % 4
    packed = few_bits.pack_sides(offset, multiplier)
    assert packed.tolist() == [i | i - 1 << 4 for i in range(15, 0, -2)] + [0b11100100] * 4
    assert all(map(torch.equal, few_bits.unpack_sides(packed), (offset, multiplier)))


def test_a_sum_of_halves():
    x = torch.tensor([1.0, 1e8, 2.0, -1.0, -1e8, 4.0])
    assert few_bits.tree_sum(x, 0).item() == 6.0 != (x[0::2] + x[1::2]).sum().item()
    assert few_bits.tree_sum(torch.ones(3, 48), 1).flatten().tolist() == [48] * 3


KINDS = ["normal", "outlier", "constant", "zero", "two", "large", "small"]


def numbers(seed: int, kind: str, *shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if kind == "outlier":
        x[..., 5, :] *= 1000
    if kind == "constant":
        x[:] = x[..., :1, :]
    if kind == "zero":
        x[:] = 0
    if kind == "two":
        x[..., 2:, :] = x[..., :1, :]
    return x * {"large": 1e30, "small": 1e-30}.get(kind, 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.sampled_from(UNLIKE), st.floats(0.5, 30))
def test_a_key_in_reach_of_its_codes_is_within_half_a_step(seed, kind, groups, coarse):
    """Whatever the block: the offset moves the codes' range to the middle of the block's, as far as it reaches, and no
    multiplier is worse, by fourth powers, than the one that was taken."""
    _, of_channels = codes_of(groups)
    step = torch.rand(len(of_channels), generator=torch.Generator().manual_seed(seed)).add(0.2).bfloat16()
    unit = (step.float() * 2**of_channels / 8 * coarse).bfloat16()
    x = numbers(seed, kind, 3, BLOCK, len(of_channels))
    codes, offset, multiplier = few_bits.quantize_keys(x, step, unit, of_channels)
    assert (codes < 2**of_channels).all() and (offset < 16).all() and (multiplier < 4).all()
    read = few_bits.dequantize_keys(codes, offset, multiplier, step, unit, of_channels)
    assert read.isfinite().all()
    x, step, unit = (t.double() for t in (x, step, unit))
    middle = (x.amax(-2) + x.amin(-2)) / 2
    off = (offset.double() - 8) * unit
    assert ((middle - off).abs() <= unit / 2 * (1 + 1e-4))[(middle.abs() < 7 * unit)].all()
    m = torch.tensor(MULTIPLIERS, dtype=torch.float64)[multiplier.long()]
    reach, error = step * m * 2**of_channels / 2, (read.double() - x).abs()
    inside = ((x - off[:, None]).abs() <= reach[:, None]) & (of_channels > 0)
    assert (error <= (step * m / 2)[:, None] * (1 + 1e-4) + 1e-6)[inside].all()
    top = 2.0**of_channels - 1
    for other in MULTIPLIERS:
        y = (x - off[:, None]) / step
        again = ((y / other + top / 2).round().clamp(min=0).minimum(top) - top / 2) * other - y
        assert ((error / step).pow(4).sum(-2) <= again.pow(4).sum(-2) * (1 + 1e-3) + 1e-6).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.sampled_from([2, 3, 4]), st.sampled_from([16, 48, 64, 80]))
def test_values_keep_their_length_along_their_codes(seed, kind, bits, group):
    x = numbers(seed, kind, 6, group).clamp(-(2.0**13), 2.0**13)
    codes, scale = few_bits.quantize_values(x, bits)
    read = few_bits.dequantize_values(codes, scale, bits)
    assert codes.max() < 2**bits and read.isfinite().all()
    assert (read[x.abs().amax(-1) < 1e-7] == 0).all(), "what is too small for a scale is 0, as zeros are"
    kept = (scale >= few_bits.LEAST_SCALE_BYTE)[:, 0]
    along, own = (read * x).double().sum(-1), x.double().square().sum(-1)
    # The scale's byte rounds it by a sixteenth at most.
    assert ((along - own).abs() <= own * 2**-4 + 1e-6)[kept].all()
    error = (read - x).double().square().sum(-1)
    assert (error <= own * (1.0 if kind == "outlier" else 0.7))[kept].all()


def test_scales_have_three_bits_of_mantissa():
    scale = torch.arange(256, dtype=torch.uint8)
    found = few_bits.scales_of(scale).double()
    expected = torch.tensor([(1 + k % 8 / 8) * 2.0 ** (k // 8 - 17) for k in range(256)])
    assert found[0] == 0 and torch.equal(found[8:], expected[8:].double()) and found[-1] == 2**14 * 1.875


def test_bits_go_where_errors_count_and_every_head_has_as_many():
    k = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    k[..., 40:56] *= 30  # of large variance
    importance = torch.ones(2, 3, 128)
    importance[..., 100:] *= 500
    importance[..., 40:56] /= 1e5
    table = widths.choose(k, importance, 2)
    widths.check(table, 2)
    assert table.widths.sum(-1).unique().tolist() == [16] and (table.widths <= MAX_WIDTH).all()
    given = torch.empty(2, 3, 128, dtype=torch.uint8)
    given.scatter_(-1, table.order.long(), table.widths.repeat_interleave(GROUP, -1))
    assert (given[..., 104:].float().mean(-1) > given[..., :32].float().mean(-1) + 1).all()
    alone = widths.choose(k, None, 2)
    given.scatter_(-1, alone.order.long(), alone.widths.repeat_interleave(GROUP, -1))
    assert (given[..., 40:56].float().mean(-1) > 3).all(), "by variance alone"


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["zero channels", "one channel", "constant", "zeros", "huge", "bias"])
def test_a_table_for_any_keys_is_one_that_kernels_trust(kind, bits):
    k = torch.randn(1, 2, 96, 48, generator=torch.Generator().manual_seed(1))
    if kind == "zero channels":
        k[..., ::3] = 0
    if kind == "one channel":
        k[..., 1:] = 0
    if kind == "constant":
        k[:] = k[:, :, :1]
    if kind == "zeros":
        k[:] = 0
    if kind == "huge":
        k *= 1e30
    if kind == "bias":
        k += torch.randn(48) * 300
    for importance in (None, torch.zeros(1, 2, 48), torch.rand(1, 2, 48)):
        table = widths.choose(k, importance, bits)
        widths.check(table, bits)


def turned(amplitude: float, tokens: int, dim: int, theta: float, noise: torch.Tensor) -> torch.Tensor:
    """Keys with a large constant before their positions turn it (a bias, as Qwen2.5's), and `noise` beside it."""
    frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    return (torch.cat([angle.cos(), angle.sin()], -1) * amplitude + noise).float()


def test_offsets_reach_what_positions_turn_away():
    """By a table of the first 512 tokens: no key is further away than the codes' own step, all 4,096 of them."""
    noise = torch.randn(4096, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    k = turned(100, 4096, 64, 1e6, noise)[None, None]
    table = widths.choose(k[:, :, :512], None, 4)
    order = table.order.long()[..., None, None, :]
    step, unit = (t[..., None, None, :] for t in (table.step, table.unit))
    of_channels = table.widths.repeat_interleave(GROUP, -1)[..., None, None, :]
    blocks = (k - table.mean[..., None, :]).unflatten(-2, (-1, BLOCK))
    sorted_ = blocks.gather(-1, order.expand_as(blocks))
    made = few_bits.quantize_keys(sorted_, step, unit, of_channels)
    error = few_bits.dequantize_keys(*made, step, unit, of_channels) - sorted_
    assert error.square().mean().sqrt() < 3.0  # the constant is 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t._replace(widths=torch.tensor([[3, 2]], dtype=torch.uint8)), "2 bits on average"),
        (lambda t: t._replace(widths=torch.tensor([[1, 3]], dtype=torch.uint8)), "must fall"),
        (lambda t: t._replace(widths=torch.tensor([[8, 252]], dtype=torch.uint8)), "must fall from 7"),
        (lambda t: t._replace(order=torch.zeros_like(t.order)), "none of 32"),
        (lambda t: t._replace(order=t.order + 1), "none of 32"),
        (lambda t: t._replace(step=-t.step), "steps of keys must be from"),
        (lambda t: t._replace(unit=t.unit * torch.nan), "units of keys must be from"),
        (lambda t: t._replace(mean=t.mean / 0), "means of keys are NaN"),
    ],
)
def test_other_tables_are_refused(change, message):
    table = widths.choose(torch.randn(1, 64, 32), None, 2)
    widths.check(table, 2)
    with pytest.raises(ValueError, match=message):
        widths.check(change(table), 2)
