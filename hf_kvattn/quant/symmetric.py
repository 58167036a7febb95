"""Symmetric codes of 8 bits: `x` is about `level * scale`, with one scale a group. The dtype of the codes says how.

- uint8: whole numbers, stored with 128 added. With 256 levels a zero point buys nothing measurable, and would cost half
  a bit a number in groups of 32.
- float8_e4m3fn, for GPUs that convert it in hardware: four bits of exponent and three of mantissa round a number by up
  to 2**-4 of itself (Micikevicius et al., 2022, arXiv:2209.05433). Whole numbers round it by 2**-8 of the group's
  largest, which is less for most of a group: with as many bits they keep more.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
ZERO_CODE = 128  # of whole numbers
LARGEST = {torch.uint8: 127.0, FP8: 448.0}  # levels


def quantize(x: torch.Tensor, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `x`, the numbers along `dim` being one group.

    Args:
        x: any shape, finite; computed in fp32.
        dtype: of the codes, one of `LARGEST`.

    Returns:
        codes: the shape of `x`, finite; whole numbers are 1 to 255, and 128 stands for 0;
        scale: float32, the shape of `x` with `dim` of size 1, rounded to bfloat16 first, as it is stored.
    """
    x, largest = x.float(), LARGEST[dtype]
    scale = (x.abs().amax(dim, keepdim=True) / largest).bfloat16().float()
    levels = torch.where(scale > 0, x / scale, 0.0)
    # Clamped, since the scale may have been rounded down, and not every conversion to float8 saturates.
    if dtype == FP8:
        return levels.clamp(-largest, largest).to(FP8), scale
    return (levels.round().clamp(-largest, largest) + ZERO_CODE).to(torch.uint8), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 numbers of the shape of `codes`."""
    return (codes.float() - (0 if codes.dtype == FP8 else ZERO_CODE)) * scale.float()
