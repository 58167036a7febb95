"""Which codec serves which number of bits, with the settings that measure best.

Keys are grouped per channel inside a block of 32 tokens, values per token in groups of channels (KIVI, Liu et al.,
2024, arXiv:2402.02750): keys have a few channels that are always large, values do not.
"""

from __future__ import annotations

import torch

from . import affine, symmetric

Table = dict[int, tuple[float, ...] | None]

# Bits to the shares of a group's range that are tried for its codes; None: symmetric codes, without zeros. Measured.
KEYS: Table = {8: None, 4: (1.0,), 3: (1.0, 0.95, 0.9), 2: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}
VALUES: Table = {8: None, 4: (1.0,), 3: (1.0, 0.95, 0.9, 0.85), 2: (0.8,)}


def check_bits(bits: int) -> None:
    if bits not in KEYS:
        raise ValueError(f"bits must be one of {tuple(KEYS)}, got {bits!r}")


def has_zero(bits: int) -> bool:
    """Whether groups of so many bits have a zero of their own."""
    return KEYS[bits] is not None


def quantize(
    x: torch.Tensor, bits: int, dim: int, table: Table
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes (uint8), scale and zero (float32 of bfloat16 precision) of `x`; no zero where codes are symmetric.

    Args:
        x: keys with `table=KEYS` or rotated values with `table=VALUES`, any shape, finite.
        bits: 8, 4, 3 or 2.
        dim: the dimension along which numbers are one group.
    """
    shrink = table[bits]
    if shrink is None:
        return *symmetric.quantize(x, dim), None
    return affine.quantize(x, bits, dim, shrink)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """float32 numbers of the shape of `codes`."""
    return symmetric.dequantize(codes, scale) if zero is None else affine.dequantize(codes, scale, zero)
