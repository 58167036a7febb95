"""`PackedKV`: the quantized part of a cache layer, as caches store it and kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .affine import dequantize
from .layout import BLOCK, unpack_keys, unpack_values


@dataclass(slots=True)
class PackedKV:
    """Quantized keys and values of the first tokens of a cache, in blocks of 32 (`quant/layout.py`).

    Attributes:
        tokens: how many, a multiple of 32; the arrays may have room for more blocks.
        k_bits, v_bits: 8, 4 or 2.
        k_codes: `(B, Hkv, blocks, 4 * k_bits * padded_dim(D))` uint8.
        k_scale, k_zero: `(B, Hkv, blocks, D)` bfloat16, one for each channel of a block.
        k_mean: `(B, Hkv, D)` float32, added to every key.
        v_codes: `(B, Hkv, blocks, 4 * v_bits * padded_dim(D))` uint8.
        v_scale, v_zero: `(B, Hkv, blocks, D / group, 32)` bfloat16, one for each token and group of channels.
    """

    tokens: int
    k_bits: int
    v_bits: int
    k_codes: torch.Tensor
    k_scale: torch.Tensor
    k_zero: torch.Tensor
    k_mean: torch.Tensor
    v_codes: torch.Tensor
    v_scale: torch.Tensor
    v_zero: torch.Tensor

    def dense(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 keys and values of the tokens [start, end), whole blocks: `(B, Hkv, end - start, D)` each."""
        blocks, dim = slice(start // BLOCK, end // BLOCK), self.k_scale.shape[-1]
        k = dequantize(
            unpack_keys(self.k_codes[:, :, blocks], self.k_bits, dim),
            self.k_scale[:, :, blocks, None],
            self.k_zero[:, :, blocks, None],
        )
        codes = unpack_values(self.v_codes[:, :, blocks], self.v_bits, dim)
        group = dim // self.v_scale.shape[3]
        scale, zero = (
            t[:, :, blocks].transpose(-1, -2).repeat_interleave(group, -1) for t in (self.v_scale, self.v_zero)
        )
        v = dequantize(codes, scale, zero)
        return k.flatten(2, 3) + self.k_mean[:, :, None], v.flatten(2, 3)
