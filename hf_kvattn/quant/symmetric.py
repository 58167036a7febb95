"""Symmetric integer codes of 8 bits: `x` is about `(code - 128) * scale`, with one scale a group.

With 256 levels a zero of its own buys nothing measurable, and would cost half a bit a number in groups of 32.
"""

from __future__ import annotations

import torch

ZERO_CODE = 128
_LARGEST = 127


def quantize(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `x`, the numbers along `dim` being one group.

    Args:
        x: any shape, finite; computed in fp32.
        dim: the group's dimension.

    Returns:
        codes: uint8, the shape of `x`, from 1 to 255; 128 stands for 0;
        scale: float32, the shape of `x` with `dim` of size 1, rounded to bfloat16 first, as it is stored.
    """
    x = x.float()
    scale = (x.abs().amax(dim, keepdim=True) / _LARGEST).bfloat16().float()
    levels = torch.where(scale > 0, x / scale, 0.0).round().clamp(-_LARGEST, _LARGEST)
    return (levels + ZERO_CODE).to(torch.uint8), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 numbers of the shape of `codes`."""
    return (codes.float() - ZERO_CODE) * scale.float()
