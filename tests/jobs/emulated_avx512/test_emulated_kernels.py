"""The tests of tests/kernels that run in every variant, in the emulated ones, and random calls in the best of them."""

import emulated_avx512
import pytest
from test_c_abi import test_a_change_of_one_field_is_refused_or_harmless  # noqa: F401
from test_kernels import test_native, test_rings_in_every_variant  # noqa: F401
from test_linear import test_int8_weights, test_products_of_all_row_counts  # noqa: F401
from test_packed import (  # noqa: F401
    test_native_packed_in_16_bits,
    test_native_quantizes_bit_for_bit_as_pytorch_does,
    test_native_reads_packed_heads_of_any_size,
    test_native_reads_packed_rings,
    test_native_reads_packed_tokens,
    test_native_reads_sinks_beside_packed_tokens,
    test_native_with_a_huge_channel_in_one_block,
    test_native_with_channels_of_very_different_kinds,
)
from test_random_calls import (  # noqa: F401
    test_blocks_are_quantized_alike_or_refused,
    test_right_calls_are_served_alike,
)
from test_requests import test_native_in_every_variant  # noqa: F401

from hf_kvattn.kernels import native

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the build


def test_the_library_is_the_emulated_one(emulated_library):
    assert native.library_path() == emulated_library and native.variant() == emulated_avx512.VARIANTS[0]


@pytest.mark.parametrize("variant", emulated_avx512.VARIANTS, indirect=True)
def test_each_emulated_variant_is_selected(variant):
    assert native.variant() == variant
