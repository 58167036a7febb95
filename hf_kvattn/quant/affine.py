"""Asymmetric integer codes: `x` is about `code * scale + zero`, with one scale and zero for each group of numbers.

Keys are grouped per channel inside a block of 32 tokens, values per token in groups of channels (KIVI, Liu et al.,
2024, arXiv:2402.02750): keys have a few channels that are always large, values do not.
"""

from __future__ import annotations

import torch

BITS = (8, 4, 2)


def quantize(x: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of `x`, the numbers along `dim` being one group.

    Args:
        x: any shape, finite; computed in fp32.
        bits: 8, 4 or 2.
        dim: the group's dimension.

    Returns:
        codes: uint8, the shape of `x`, each below `2 ** bits`;
        scale, zero: float32, the shape of `x` with `dim` of size 1, rounded to bfloat16 first, as they are stored, so
        that the codes make up for the rounding. A constant group has scale 0 and is exact up to that rounding.
    """
    check_bits(bits)
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = low.bfloat16().float()
    # The rounded zero may lie above a nearly constant group: scale 0 then, never below.
    scale = ((high - zero).clamp(min=0) / (2**bits - 1)).bfloat16().float()
    steps = torch.where(scale > 0, (x - zero) / scale, 0.0)
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8), scale, zero


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """float32 numbers of the shape of `codes`."""
    return codes.float() * scale.float() + zero.float()


def check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
