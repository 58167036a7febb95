"""Which codec serves which number of bits, or `"fp8"`, with the settings that measure best.

Keys are grouped per channel inside a block of 32 tokens, values per token in groups of channels (KIVI, Liu et al.,
2024, arXiv:2402.02750): keys have a few channels that are always large, values do not.
"""

from __future__ import annotations

import torch

from . import affine, float8, symmetric

FP8 = "fp8"
Bits = int | str  # 8, 4, 3, 2 or FP8
Table = dict[Bits, tuple[float, ...] | None]

# Bits to the shares of a group's range that are tried for its codes; None: symmetric codes, without zeros. Measured.
KEYS: Table = {8: None, FP8: None, 4: (1.0,), 3: (1.0, 0.95, 0.9), 2: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}
VALUES: Table = {8: None, FP8: None, 4: (1.0,), 3: (1.0, 0.95, 0.9, 0.85), 2: (0.8,)}


def check_bits(bits: Bits) -> None:
    if type(bits) not in (int, str) or bits not in KEYS:
        raise ValueError(f"bits must be one of {tuple(KEYS)}, got {bits!r}")


def has_zero(bits: Bits) -> bool:
    """Whether groups of so many bits have a zero of their own."""
    return KEYS[bits] is not None


def stored_bits(bits: Bits) -> int:
    """Bits that a code takes."""
    return 8 if isinstance(bits, str) else bits


def codes_dtype(bits: Bits) -> torch.dtype:
    """Of packed codes: the bytes of whole numbers, or float8_e4m3fn, which tells fp8 from 8 bits."""
    return float8.DTYPE if bits == FP8 else torch.uint8


def quantize(
    x: torch.Tensor, bits: Bits, dim: int, table: Table
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes (`codes_dtype`), scale and zero (float32 of bfloat16 precision) of `x`; no zero where codes are symmetric.

    Args:
        x: keys with `table=KEYS` or rotated values with `table=VALUES`, any shape, finite.
        bits: 8, 4, 3, 2 or "fp8".
        dim: the dimension along which numbers are one group.
    """
    shrink = table[bits]
    if shrink is not None:
        return affine.quantize(x, stored_bits(bits), dim, shrink)
    codec = float8 if bits == FP8 else symmetric
    return *codec.quantize(x, dim), None


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """float32 numbers of the shape of `codes`."""
    if zero is not None:
        return affine.dequantize(codes, scale, zero)
    return (float8 if codes.dtype == float8.DTYPE else symmetric).dequantize(codes, scale)
