"""Products of a few rows with weights, as decode steps have them: `native.linear`."""

import pytest
import torch
from problems import VARIANTS
from torch.nn.functional import linear

from hf_kvattn.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="needs the native library")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def close(ours, x, weights):
    """As near to the product in float64 as PyTorch's own of the same dtype, twice, and a rounding."""
    exact = torch.cat([linear(x.double(), w.double()) for w in weights], 1)
    stock = torch.cat([linear(x, w.to(x.dtype)) for w in weights], 1)
    error, stocks = ((each.double() - exact).abs().max() / exact.abs().max() for each in (ours, stock))
    return ours.dtype == x.dtype and error <= 2 * stocks + torch.finfo(x.dtype).eps / 2


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 31, 33, 64, 100, 576, 1000])
def test_products_of_all_row_counts(variant, dtype, width):
    torch.manual_seed(width)
    outs = [(5,), (1, 2, 3), (64, 66, 7, 129)]
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 17, native.MAX_ROWS):
        for out in outs:
            x, weights = torch.randn(rows, width, dtype=dtype), [torch.randn(n, width, dtype=dtype) for n in out]
            assert close(native.linear(x, weights), x, weights), (rows, out)


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_weights(variant, dtype):
    for width in (1, 15, 16, 40, 576):
        x = torch.randn(3, width, dtype=dtype)
        weights = [torch.randint(-128, 128, (n, width), dtype=torch.int8) for n in (33, 6)]
        assert close(native.linear(x, weights), x, weights), width


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_nothing_beside_the_rows_is_read(variant, dtype):
    """Rows are parts of longer ones, whose rest would spoil a sum."""
    x = torch.full((4, 70), torch.nan)
    x[:, :50] = torch.randn(4, 50)
    weights = torch.full((9, 70), torch.nan) if dtype != torch.int8 else torch.full((9, 70), 127)
    weights[:, :50] = 3 * torch.randn(9, 50)
    wide = weights.to(dtype)
    x, narrow = x.to(torch.float32 if dtype == torch.int8 else dtype)[:, :50], wide[:, :50]
    assert close(native.linear(x, [narrow, narrow[2:7]]), x, [narrow, narrow[2:7]])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_number_of_threads_gives_the_same_bits(threads):
    torch.manual_seed(0)
    x, weights = torch.randn(2, 48), [torch.randn(n, 48) for n in (1, 30, 5)]
    before = torch.get_num_threads()
    expected = torch.cat([native.linear(x, [w]) for w in weights], 1)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(native.linear(x, weights), expected)
    finally:
        torch.set_num_threads(before)


def test_more_rows_or_weights_than_it_takes_are_refused():
    x, w = torch.ones(1, 8), torch.ones(3, 8)
    for rows, count in ((native.MAX_ROWS + 1, 1), (0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"not {rows} and {count}"):
            native.linear(x.expand(rows, 8), [w] * count)
    assert "float64" in native.cannot_multiply(torch.float64, torch.float64)
    assert "int32" in native.cannot_multiply(torch.float32, torch.int32)
