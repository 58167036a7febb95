"""Codes of 8 bits that are floats, float8_e4m3fn: `x` is about `code * scale`, with one scale a group.

For GPUs that convert them in hardware. Four bits of exponent and three of mantissa round a number by up to 2**-4 of
itself (Micikevicius et al., 2022, arXiv:2209.05433); whole numbers of 8 bits (`symmetric.py`) by 2**-8 of the group's
largest, which is less for most of a group: with as many bits they keep more.
"""

from __future__ import annotations

import torch

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0


def quantize(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `x`, the numbers along `dim` being one group.

    Args:
        x: any shape, finite; computed in fp32.
        dim: the group's dimension.

    Returns:
        codes: float8_e4m3fn, the shape of `x`, finite;
        scale: float32, the shape of `x` with `dim` of size 1, rounded to bfloat16 first, as it is stored.
    """
    x = x.float()
    scale = (x.abs().amax(dim, keepdim=True) / LARGEST).bfloat16().float()
    # Clamped, since the scale may have been rounded down, and not every conversion saturates.
    return torch.where(scale > 0, x / scale, 0.0).clamp(-LARGEST, LARGEST).to(DTYPE), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 numbers of the shape of `codes`."""
    return codes.float() * scale.float()
