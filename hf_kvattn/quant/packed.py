"""`PackedKV`: the quantized part of a cache layer, as caches store it and kernels read it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from . import few_bits, symmetric
from .codecs import Codec
from .layout import BLOCK, planes_of, unpack_by_width, unpack_keys, unpack_values
from .rotation import rotate


def check_tensor(
    name: str, t: torch.Tensor, shape: tuple[int, ...], dtypes: Collection[torch.dtype], device: torch.device
) -> None:
    """Raises ValueError, saying what differs, unless `t` has this shape, one of these dtypes, and this device."""
    if t.shape != shape or t.dtype not in dtypes or t.device != device:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} is {tuple(t.shape)} {t.dtype} on {t.device}, not {tuple(shape)} {wanted} on {device}")


ARRAYS = ("k_codes", "k_scale", "k_mean", "k_step", "k_unit", "k_order", "k_widths", "v_codes", "v_scale")
TABLE = ("k_step", "k_unit", "k_order", "k_widths")  # of codecs with widths by channel
OF_BLOCKS = ("k_codes", "k_scale", "v_codes", "v_scale")  # the others serve all blocks


@dataclass(slots=True)
class PackedKV:
    """Quantized keys and values of consecutive tokens, in blocks of 32 (`quant/layout.py`).

    Attributes:
        start: tokens before them, at most 32, that are stored exactly: the first of the dense tensors beside this.
        tokens: how many, a multiple of 32; the arrays may have room for more blocks.
        k_codec, v_codec: rows of `quant.codecs.CODECS`.
        k_codes: `(B, Hkv, blocks, 4 * k_bits * D)` of the codec's dtype.
        k_scale: `(B, Hkv, blocks, D)` bfloat16, one for each channel of a block; with a codec by channel
            `(B, Hkv, blocks, 3 * D / 4)` uint8, offsets and multipliers as `few_bits.pack_sides` lays them out.
        k_mean: `(B, Hkv, D)` float32, added to every key.
        k_step, k_unit, k_order, k_widths: the rest of a `widths.KeyTable`, of a codec by channel; else None. Two of
            `(B, Hkv, D)` bfloat16, positive; `(B, Hkv, D)` int16; `(B, Hkv, D / 16)` uint8. What `k_order` and
            `k_widths` hold is not checked: a permutation, and 0 to 7 bits that fall and add up to `k_bits * D / 16`.
        v_codes: `(B, Hkv, blocks, 4 * v_bits * D)`, as `k_codes`, of values in the basis of `quant/rotation.py`.
        v_scale: `(B, Hkv, blocks, D / group, 32)` bfloat16, one for each token and group of channels; with a codec by
            channel uint8 (`few_bits.scales_of`).
        slot: where the first block lies; block `i` lies in slot `(slot + i) % blocks` (a ring, of sliding windows).
            Must be even, and not 0 only if the number of slots is even: kernels read blocks in pairs.
        as_arguments: what the `native` backend passes to its kernel for all this, made once; nothing changes after it.

    Raises:
        ValueError: lengths that do not fit, or an array of another shape, dtype or device, or that is not contiguous.
    """

    start: int
    tokens: int
    k_codec: Codec
    v_codec: Codec
    k_codes: torch.Tensor
    k_scale: torch.Tensor
    k_mean: torch.Tensor
    k_step: torch.Tensor | None
    k_unit: torch.Tensor | None
    k_order: torch.Tensor | None
    k_widths: torch.Tensor | None
    v_codes: torch.Tensor
    v_scale: torch.Tensor
    slot: int = 0
    as_arguments: bytes | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        (*lead, dim), blocks, groups = (
            self.k_mean.shape,
            self.k_codes.shape[2:3].numel(),
            self.v_scale.shape[3:4].numel(),
        )
        if not (dim and groups) or dim % (16 * groups):
            raise ValueError(f"v_scale {tuple(self.v_scale.shape)}: groups of {dim} channels are multiples of 16")
        shapes = shapes_of(self.k_codec, self.v_codec, dim, dim // groups)
        for name in ARRAYS:
            array = getattr(self, name)
            if (name in shapes) != (array is not None):
                raise ValueError(
                    f"{name} goes with key codecs by channel, and only there, not with {self.k_codec.name}"
                )
            if array is None:
                continue
            shape, dtype = shapes[name]
            check_tensor(
                name, array, (*lead, *((blocks,) if name in OF_BLOCKS else ()), *shape), (dtype,), self.k_mean.device
            )
            if not array.is_contiguous():
                raise ValueError(f"{name} must be contiguous, its strides are {array.stride()}")
        integers = all(type(number) is int for number in (self.start, self.tokens, self.slot))
        tokens_fit = integers and 0 <= self.start <= BLOCK and 0 <= self.tokens <= blocks * BLOCK
        slot_fits = integers and (self.slot == 0 or (0 < self.slot < blocks and self.slot % 2 == blocks % 2 == 0))
        if not (tokens_fit and slot_fits and self.tokens % BLOCK == 0):
            numbers = f"start={self.start!r}, tokens={self.tokens!r} and slot={self.slot!r}"
            raise ValueError(f"{numbers} do not fit {blocks} blocks of {BLOCK}")

    def check_blocks(self, k: torch.Tensor, v: torch.Tensor, slot: int) -> None:
        """Raises ValueError unless `k` and `v` are what `quantize_blocks` takes for the slots from `slot` on."""
        (*lead, dim), slots, tokens = self.k_mean.shape, self.k_codes.shape[2], k.shape[2:3].numel()
        for name, t in (("k", k), ("v", v)):
            check_tensor(name, t, (*lead, tokens, dim), (k.dtype,), self.k_mean.device)
        if not tokens or tokens % BLOCK or not 0 <= slot <= slots - tokens // BLOCK:
            raise ValueError(f"{tokens} tokens from slot {slot} on are not whole blocks of {BLOCK} for {slots} slots")

    def arrays(self) -> tuple[torch.Tensor | None, ...]:
        """Its tensors, in the order of `ARRAYS`; all contiguous."""
        return tuple(getattr(self, name) for name in ARRAYS)

    def by_stored_channel(self) -> tuple[torch.Tensor, ...]:
        """Order (int64), steps, units and widths of a codec by channel, `(B, Hkv, 1, 1, D)` each."""
        assert self.k_step is not None and self.k_unit is not None
        assert self.k_order is not None and self.k_widths is not None
        widths = self.k_widths.repeat_interleave(few_bits.GROUP, -1)
        return tuple(t[:, :, None, None] for t in (self.k_order.long(), self.k_step, self.k_unit, widths))

    def dense(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 keys and values of the blocks [first, end): `(B, Hkv, (end - first) * 32, D)` each."""
        slots = self.k_codes.shape[2]
        begin = (self.slot + first) % slots
        if begin + end - first <= slots:
            return self._dense(slice(begin, begin + end - first))
        pair = zip(self._dense(slice(begin, slots)), self._dense(slice(begin + end - first - slots)), strict=True)
        k, v = (torch.cat(parts, 2) for parts in pair)
        return k, v

    def _dense(self, blocks: slice) -> tuple[torch.Tensor, torch.Tensor]:
        k_codes, k_scale = self.k_codes[:, :, blocks], self.k_scale[:, :, blocks]
        if self.k_codec.by_channel:
            assert self.k_widths is not None
            order, *table = self.by_stored_channel()
            codes, sides = unpack_by_width(k_codes, self.k_widths), few_bits.unpack_sides(k_scale)
            stored = few_bits.dequantize_keys(codes, *sides, *table)
            k = torch.empty_like(stored).scatter_(-1, order.expand_as(stored), stored)
        else:
            k = symmetric.dequantize(unpack_keys(k_codes, planes_of(8)), k_scale[..., None, :])
        group = self.k_mean.shape[-1] // self.v_scale.shape[3]
        v_scale = self.v_scale[:, :, blocks].transpose(-1, -2).repeat_interleave(group, -1)
        v_codes = unpack_values(self.v_codes[:, :, blocks], planes_of(self.v_codec.bits))
        if self.v_codec.by_channel:
            v = few_bits.dequantize_values(v_codes, v_scale, self.v_codec.bits)
        else:
            v = symmetric.dequantize(v_codes, v_scale)
        return k.flatten(2, 3) + self.k_mean[:, :, None], rotate(v.flatten(2, 3))


def shapes_of(k_codec: Codec, v_codec: Codec, dim: int, group: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What follows `(B, Hkv)`, or `(B, Hkv, blocks)` of `OF_BLOCKS`, in the arrays of a `PackedKV`, and their dtypes.

    Args:
        group: channels that share a value scale.
    """
    shapes = {
        "k_codes": ((4 * k_codec.bits * dim,), k_codec.dtype),
        "k_scale": ((3 * dim // 4,), torch.uint8) if k_codec.by_channel else ((dim,), torch.bfloat16),
        "k_mean": ((dim,), torch.float32),
        "v_codes": ((4 * v_codec.bits * dim,), v_codec.dtype),
        "v_scale": ((dim // group, BLOCK), torch.uint8 if v_codec.by_channel else torch.bfloat16),
    }
    if k_codec.by_channel:
        shapes |= dict.fromkeys(("k_step", "k_unit"), ((dim,), torch.bfloat16))
        shapes |= {"k_order": ((dim,), torch.int16), "k_widths": ((dim // few_bits.GROUP,), torch.uint8)}
    return shapes
