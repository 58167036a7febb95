"""Whole blocks of keys and values to codes: what every quantizer must write, bit for bit."""

from __future__ import annotations

import torch

from .codecs import KEYS, VALUES, quantize
from .layout import BLOCK, pack_keys, pack_values
from .packed import PackedKV
from .rotation import rotate


def quantize_blocks(k: torch.Tensor, v: torch.Tensor, into: PackedKV, slot: int) -> None:
    """Writes whole blocks `(B, Hkv, n * 32, D)` of finite numbers to the arrays of `into`, from `slot` on.

    Of `into`, `start`, `tokens` and its own `slot` do not count.
    """
    slots, groups = slice(slot, slot + k.shape[2] // BLOCK), into.v_scale.shape[3]
    k_codec, v_codec = into.codecs
    blocks = (k.float() - into.k_mean[:, :, None]).unflatten(2, (-1, BLOCK))
    codes, scale, zero = quantize(blocks, k_codec, -2, KEYS)
    into.k_codes[:, :, slots], into.k_scale[:, :, slots] = pack_keys(codes, into.k_bits), scale[..., 0, :]
    if into.k_zero is not None and zero is not None:
        into.k_zero[:, :, slots] = zero[..., 0, :]
    turned = rotate(v).unflatten(2, (-1, BLOCK)).unflatten(-1, (groups, -1))
    codes, scale, zero = quantize(turned, v_codec, -1, VALUES)
    into.v_codes[:, :, slots] = pack_values(codes.flatten(-2), into.v_bits)
    into.v_scale[:, :, slots] = scale[..., 0].transpose(-1, -2)
    if into.v_zero is not None and zero is not None:
        into.v_zero[:, :, slots] = zero[..., 0].transpose(-1, -2)
