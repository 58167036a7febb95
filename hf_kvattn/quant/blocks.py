"""`quantize_blocks`: turns whole blocks of keys and values into codes. Every quantizer writes the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .layout import BLOCK, pack_keys, pack_values
from .packed import PackedKV
from .rotation import rotate


class Blocks(NamedTuple):
    """Whole blocks that become codes.

    Attributes:
        k, v: `(B, Hkv, n * 32, D)`.
        into: its arrays are written to but for `k_mean`; its fields `start`, `tokens` and `slot` are ignored.
        slot: of the first block in them. The others follow.
    """

    k: torch.Tensor
    v: torch.Tensor
    into: PackedKV
    slot: int


Quantize = Callable[[Sequence[Blocks]], torch.Tensor | None]  # as `quantize_blocks`


def quantize_blocks(jobs: Sequence[Blocks]) -> torch.Tensor | None:
    """Turns all `jobs`, of one device, into codes.

    Returns:
        On a GPU `(jobs, 2)`, there: whether keys and values were finite, 0 or False if not. None elsewhere: there the
        caller has seen to it.
    """
    for job in jobs:
        _quantize(*job)
    if not jobs or jobs[0].k.device.type != "cuda":
        return None
    return torch.stack([torch.stack([k.isfinite().all(), v.isfinite().all()]) for k, v, *_ in jobs])


def _quantize(k: torch.Tensor, v: torch.Tensor, into: PackedKV, slot: int) -> None:
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
