"""Codes of 4 bits and fewer, for blocks of 32 tokens: keys with a width for each channel, values with one-byte scales.

Keys. A channel gets the more bits the more its rounding error changes scores (`widths.py` chooses). What a block stores
beside its codes is small, since a step `s` and a unit `u` of each channel serve all blocks. A channel of a block has an
offset `o`, -8 to 7 in four bits, and a multiplier `m`, one of `MULTIPLIERS` in two. With `b` bits a code `c` stands for

    k = mean + u * o + s * m * (c - (2**b - 1) / 2)

The offset is the middle of the block's range. Of the multipliers the one with the least sum of fourth powers of errors
is taken: large errors are what attention notices.

Values. They are rotated (`rotation.py`) and have no offset. A token's group of channels has a scale `t` in one byte:
`v = t * (c - (2**b - 1) / 2)`. Rounding to few levels shrinks a vector. So `t` is not the step that its numbers were
rounded with, but what gives the codes their length along them, <x, x> / <x, c>.

Every quantizer writes the same bits: all is float32, nothing is fused, and sums are those of `tree_sum`.
"""

from __future__ import annotations

import torch

MAX_WIDTH = 7  # bits of a key's code
LARGEST_OFFSET = 7
GROUP = 16  # channels that share a width
MULTIPLIERS = (0.55, 0.8, 1.1, 1.5)
# Steps, for numbers of unit variance, with the least square of errors at 1, 2, ... bits (Max, 1960).
STEPS = (1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0569)
LARGEST_STEPS = 2.0**20  # keys are cut off so many steps away, and values at the next: no sum is infinite
LARGEST_VALUE = 2.0**40
SCALE_BIAS = 110  # a scale's byte has 5 bits of exponent, so biased against float32's 8, and 3 of mantissa
LEAST_SCALE_BYTE = 8  # below it 0 alone: there are no denormal scales


def tree_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum along `dim`, which keeps size 1: halves are added while they are equal, what remains in its order."""
    while x.shape[dim] % 2 == 0:
        low, high = x.chunk(2, dim)
        x = low + high
    parts = x.split(1, dim)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def quantize_keys(
    x: torch.Tensor, step: torch.Tensor, unit: torch.Tensor, widths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of keys without their mean.

    Args:
        x: `(..., 32, D)` float32, channels in the order of their widths.
        step, unit: `(..., 1, D)`, positive.
        widths: `(..., 1, D)`, 0 to `MAX_WIDTH` bits of each channel.

    Returns:
        codes: uint8, the shape of `x`, each below 2**width;
        offset: uint8 `(..., D)`, `o + 8`;
        multiplier: uint8 `(..., D)`, an index in `MULTIPLIERS`.
    """
    inverse = step.float().reciprocal()
    w, unit = (x.float() * inverse).clamp(-LARGEST_STEPS, LARGEST_STEPS), unit.float() * inverse  # in steps
    middle = (w.amax(-2, keepdim=True) + w.amin(-2, keepdim=True)) * 0.5
    offset = (middle * unit.reciprocal()).clamp(-8, 7).round()
    y, top = w - offset * unit, torch.exp2(widths.float()) - 1
    best = None
    for i, m in enumerate(MULTIPLIERS):
        codes = (y * (1 / m) + top * 0.5).clamp(torch.zeros_like(top), top).round()
        error = tree_sum(((codes - top * 0.5) * m - y).square().square(), -2)
        if best is None:
            best, best_error, multiplier = codes, error, torch.zeros_like(error)
            continue
        better = error < best_error
        best, best_error = torch.where(better, codes, best), torch.where(better, error, best_error)
        multiplier = torch.where(better, float(i), multiplier)
    assert best is not None
    return best.to(torch.uint8), (offset + 8)[..., 0, :].to(torch.uint8), multiplier[..., 0, :].to(torch.uint8)


def dequantize_keys(
    codes: torch.Tensor, offset: torch.Tensor, multiplier: torch.Tensor, step: torch.Tensor, unit: torch.Tensor,
    widths: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """float32 `(..., 32, D)`: what the results of `quantize_keys` stand for, without the mean."""
    top = torch.exp2(widths.float()) - 1
    m = torch.tensor(MULTIPLIERS, device=codes.device)[multiplier.long()][..., None, :]
    o = (offset.float() - 8)[..., None, :]
    return o * unit.float() + m * (codes.float() - top * 0.5) * step.float()


def pack_sides(offset: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """`(..., 3 * D / 4)` bytes: two offsets a byte, then four multipliers a byte, the first ones in the low bits."""
    o, m = offset.unflatten(-1, (-1, 2)), multiplier.unflatten(-1, (-1, 4))
    return torch.cat([o[..., 0] | o[..., 1] << 4, m[..., 0] | m[..., 1] << 2 | m[..., 2] << 4 | m[..., 3] << 6], -1)


def unpack_sides(sides: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_sides`."""
    dim = sides.shape[-1] // 3 * 4
    o, m = sides[..., : dim // 2, None], sides[..., dim // 2 :, None]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=sides.device)
    return (o >> shifts[::2] & 15).flatten(-2), (m >> shifts & 3).flatten(-2)


def quantize_values(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of rotated values, the numbers along the last dimension being one group.

    Args:
        x: `(..., G)`, finite.
        bits: 2 to 4.

    Returns:
        codes: uint8, the shape of `x`;
        scale: uint8 `(..., 1)`, a byte that `scales_of` reads. It is 0 for a group of zeros.
    """
    x, top = x.float().clamp(-LARGEST_VALUE, LARGEST_VALUE), 2.0**bits - 1
    squares = tree_sum(x.square(), -1)
    step = (squares * (1 / x.shape[-1])).sqrt() * STEPS[bits - 1]
    inverse = torch.where(step > 0, step.reciprocal(), 0.0)
    codes = (x * inverse + top / 2).clamp(0, top).round()
    along = tree_sum(x * (codes - top / 2), -1)
    scale = torch.where(along > 0, squares / along, 0.0)
    rounded = ((scale.view(torch.int32) + (1 << 19)) >> 20) - (SCALE_BIAS << 3)
    rounded = torch.where(rounded < LEAST_SCALE_BYTE, 0, rounded.clamp(max=255))
    return codes.to(torch.uint8), rounded.to(torch.uint8)


def dequantize_values(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 numbers of the shape of `codes`; `scale` are bytes that broadcast to it."""
    return (codes.float() - (2.0**bits - 1) / 2) * scales_of(scale)


def scales_of(scale: torch.Tensor) -> torch.Tensor:
    """The float32 numbers that bytes of `quantize_values` stand for: 0, and 2**-16 to 2**14 * 1.875."""
    return (scale.to(torch.int32) << 20).view(torch.float32) * 2.0**SCALE_BIAS
