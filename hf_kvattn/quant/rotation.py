"""The rotation of values before they are quantized: it spreads a channel's outliers over all of them (QuaRot, Ashkboos
et al., 2024, arXiv:2404.00456).

Attention is linear in the values, so a kernel sums rotated values and turns the sum back once.
"""

from __future__ import annotations

import torch


def size_for(dim: int) -> int:
    """The largest power of two that divides `dim`: channels are rotated in blocks of so many."""
    return dim & -dim


def rotate(x: torch.Tensor) -> torch.Tensor:
    """`x` `(..., D)` times the orthonormal Hadamard matrix, block by block, in fp32. Its own inverse."""
    size = size_for(x.shape[-1])
    x = x.float().unflatten(-1, (-1, size))
    stride = 1
    while stride < size:
        pairs = x.unflatten(-1, (-1, 2, stride))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        stride *= 2
    return (x * size**-0.5).flatten(-2)
