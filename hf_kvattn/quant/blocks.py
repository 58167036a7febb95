"""`quantize_blocks`: turns whole blocks of keys and values into codes. Every quantizer writes the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import few_bits, symmetric
from .layout import BLOCK, pack_by_width, pack_keys, pack_values, planes_of
from .packed import PackedKV
from .rotation import rotate


class Blocks(NamedTuple):
    """Whole blocks that become codes.

    Attributes:
        k, v: `(B, Hkv, n * 32, D)`.
        into: its arrays of blocks are written to (`packed.OF_BLOCKS`); `start`, `tokens` and `slot` are ignored.
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
    slots = slice(slot, slot + k.shape[2] // BLOCK)
    blocks = (k.float() - into.k_mean[:, :, None]).unflatten(2, (-1, BLOCK))
    if into.k_codec.by_channel:
        order, *table = into.by_stored_channel()
        codes, *sides = few_bits.quantize_keys(blocks.gather(-1, order.expand_as(blocks)), *table)
        assert into.k_widths is not None
        into.k_codes[:, :, slots] = pack_by_width(codes, into.k_widths, into.k_codec.bits)
        into.k_scale[:, :, slots] = few_bits.pack_sides(*sides)
    else:
        codes, scale = symmetric.quantize(blocks, -2, into.k_codec.dtype)
        into.k_codes[:, :, slots], into.k_scale[:, :, slots] = pack_keys(codes, planes_of(8)), scale[..., 0, :]
    rotated = rotate(v).unflatten(2, (-1, BLOCK)).unflatten(-1, (into.v_scale.shape[3], -1))
    if into.v_codec.by_channel:
        codes, scale = few_bits.quantize_values(rotated, into.v_codec.bits)
    else:
        codes, scale = symmetric.quantize(rotated, -1, into.v_codec.dtype)
    into.v_codes[:, :, slots] = pack_values(codes.flatten(-2), planes_of(into.v_codec.bits))
    into.v_scale[:, :, slots] = scale[..., 0].transpose(-1, -2)
