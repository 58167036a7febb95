"""Whole blocks of keys and values to codes: what every quantizer must write, bit for bit."""

from __future__ import annotations

import torch

from .codecs import KEYS, VALUES, quantize
from .layout import BLOCK, pack_keys, pack_values
from .rotation import rotate


def quantize_blocks(
    k: torch.Tensor,
    v: torch.Tensor,
    k_mean: torch.Tensor,
    k_codes: torch.Tensor,
    k_scale: torch.Tensor,
    k_zero: torch.Tensor | None,
    v_codes: torch.Tensor,
    v_scale: torch.Tensor,
    v_zero: torch.Tensor | None,
    k_bits: int,
    v_bits: int,
    slot: int,
) -> None:
    """Writes whole blocks `(B, Hkv, n * 32, D)` of finite numbers to the arrays of a `PackedKV`, from `slot` on."""
    slots, groups = slice(slot, slot + k.shape[2] // BLOCK), v_scale.shape[3]
    blocks = (k.float() - k_mean[:, :, None]).unflatten(2, (-1, BLOCK))
    codes, scale, zero = quantize(blocks, k_bits, -2, KEYS)
    k_codes[:, :, slots], k_scale[:, :, slots] = pack_keys(codes, k_bits), scale[..., 0, :]
    if k_zero is not None and zero is not None:
        k_zero[:, :, slots] = zero[..., 0, :]
    codes, scale, zero = quantize(rotate(v).unflatten(2, (-1, BLOCK)).unflatten(-1, (groups, -1)), v_bits, -1, VALUES)
    v_codes[:, :, slots], v_scale[:, :, slots] = pack_values(codes.flatten(-2), v_bits), scale[..., 0].transpose(-1, -2)
    if v_zero is not None and zero is not None:
        v_zero[:, :, slots] = zero[..., 0].transpose(-1, -2)
