"""`quantize_blocks`: turns whole blocks of keys and values into codes. Every quantizer writes the same bits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .layout import BLOCK, pack_keys, pack_values
from .packed import PackedKV
from .rotation import rotate

Quantize = Callable[[torch.Tensor, torch.Tensor, PackedKV, int], None]  # as `quantize_blocks`


def quantize_blocks(k: torch.Tensor, v: torch.Tensor, into: PackedKV, slot: int) -> None:
    """Writes whole blocks `(B, Hkv, n * 32, D)` of finite numbers to the arrays of `into`, from `slot` on.

    The fields `start`, `tokens` and `slot` of `into` are ignored.
    """
    slots, groups = slice(slot, slot + k.shape[2] // BLOCK), into.v_scale.shape[3]
    k_codec, v_codec = into.k_codec, into.v_codec
    blocks = (k.float() - into.k_mean[:, :, None]).unflatten(2, (-1, BLOCK))
    codes, scale, zero = k_codec.quantize(blocks, -2, k_codec.key_shares)
    into.k_codes[:, :, slots], into.k_scale[:, :, slots] = pack_keys(codes, k_codec.planes), scale[..., 0, :]
    if into.k_zero is not None and zero is not None:
        into.k_zero[:, :, slots] = zero[..., 0, :]
    rotated = rotate(v).unflatten(2, (-1, BLOCK)).unflatten(-1, (groups, -1))
    codes, scale, zero = v_codec.quantize(rotated, -1, v_codec.value_shares)
    into.v_codes[:, :, slots] = pack_values(codes.flatten(-2), v_codec.planes)
    into.v_scale[:, :, slots] = scale[..., 0].transpose(-1, -2)
    if into.v_zero is not None and zero is not None:
        into.v_zero[:, :, slots] = zero[..., 0].transpose(-1, -2)
