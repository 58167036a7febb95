"""The tests of tests/kernels that run in every variant, in those for Arm, and which one each CPU chooses at load."""

import arm_library
import pytest
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

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the build


@pytest.mark.parametrize("cpu", arm_library.CPUS)
def test_each_cpu_chooses_the_best_variant_that_it_has(cpu, runner):
    library = arm_library.ArmLibrary(runner, cpu)
    here = arm_library.CPUS[cpu]
    assert library.kvattn_variant() == here[0].encode()
    for variant in arm_library.CPUS["max"]:
        assert library.kvattn_select(variant.encode()) == (variant not in here)
        assert not (variant in here and library.kvattn_variant() != variant.encode())
    assert library.close() == 0
