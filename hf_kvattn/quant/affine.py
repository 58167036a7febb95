"""Affine codes of few bits (4, 3, 2): `x` is about `code * scale + zero`, a scale and a zero point for each group."""

from __future__ import annotations

import torch


def quantize(
    x: torch.Tensor, bits: int, dim: int, shares: tuple[float, ...] = (1.0,)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of `x`, the numbers along `dim` being one group.

    With few levels it pays to give up the ends of the range for finer levels. Of the shares of the range in `shares`,
    each group takes the one with the least sum of fourth powers of its errors: large errors are what attention
    notices (a plain least-squares choice measures worse).

    Args:
        x: any shape, finite; computed in fp32.
        bits: of a code, 1 to 7.
        shares: of the range, to try, each in (0, 1].

    Returns:
        codes: uint8, the shape of `x`, each below `2 ** bits`;
        scale, zero: float32, the shape of `x` with `dim` of size 1, rounded to bfloat16 first, as they are stored, so
        that the codes make up for the rounding. A constant group has scale 0 and is exact up to that rounding.
    """
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    best = _encode(x, low, high, bits)
    if shares == (1.0,):
        return best
    best_error = None
    for share in shares:
        trim = (1 - share) / 2 * (high - low)
        made = _encode(x, low + trim, high - trim, bits)
        error = (dequantize(*made) - x).square().square().sum(dim, keepdim=True)
        if best_error is None:
            best, best_error = made, error
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        codes, scale, zero = (torch.where(better, new, old) for new, old in zip(made, best, strict=True))
        best = codes, scale, zero
    return best


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """float32 numbers of the shape of `codes`."""
    return codes.float() * scale.float() + zero.float()


def _encode(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    zero = low.bfloat16().float()
    # The rounded zero may lie above a nearly constant group: scale 0 then, never below.
    scale = ((high - zero).clamp(min=0) / (2**bits - 1)).bfloat16().float()
    levels = torch.where(scale > 0, (x - zero) / scale, 0.0)
    return levels.round().clamp(0, 2**bits - 1).to(torch.uint8), scale, zero
