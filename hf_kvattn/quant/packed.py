"""`PackedKV`: the quantized part of a cache layer, as caches store it and kernels read it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from .codecs import Codec
from .layout import BLOCK, unpack_keys, unpack_values
from .rotation import rotate


def check_tensor(
    name: str, t: torch.Tensor, shape: tuple[int, ...], dtypes: Collection[torch.dtype], device: torch.device
) -> None:
    """Raises ValueError, saying what differs, unless `t` has this shape, one of these dtypes, and this device."""
    if t.shape != shape or t.dtype not in dtypes or t.device != device:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} is {tuple(t.shape)} {t.dtype} on {t.device}, not {tuple(shape)} {wanted} on {device}")


@dataclass(slots=True)
class PackedKV:
    """Quantized keys and values of consecutive tokens, in blocks of 32 (`quant/layout.py`).

    Attributes:
        start: tokens before them, at most 32, that are stored exactly: the first of the dense tensors beside this.
        tokens: how many, a multiple of 32; the arrays may have room for more blocks.
        k_codec, v_codec: rows of `quant.codecs.CODECS`.
        k_codes: `(B, Hkv, blocks, 4 * k_bits * D)` of the codec's dtype.
        k_scale, k_zero: `(B, Hkv, blocks, D)` bfloat16, one for each channel of a block; no zero
            point where codes are symmetric.
        k_mean: `(B, Hkv, D)` float32, added to every key.
        v_codes: `(B, Hkv, blocks, 4 * v_bits * D)`, as `k_codes`, of values in the basis of `quant/rotation.py`.
        v_scale, v_zero: `(B, Hkv, blocks, D / group, 32)` bfloat16, one for each token and group of channels; no
            zero point where codes are symmetric.
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
    k_zero: torch.Tensor | None
    k_mean: torch.Tensor
    v_codes: torch.Tensor
    v_scale: torch.Tensor
    v_zero: torch.Tensor | None
    slot: int = 0
    as_arguments: bytes | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        (*lead, blocks, dim), groups = self.k_scale.shape, self.v_scale.shape[3:4].numel()
        if not groups or dim % (16 * groups):
            raise ValueError(f"v_scale {tuple(self.v_scale.shape)}: groups of {dim} channels are multiples of 16")
        scales = {"k": (*lead, blocks, dim), "v": (*lead, blocks, groups, BLOCK)}
        expected = {"k_mean": ((*lead, dim), torch.float32)}
        for x, codec in (("k", self.k_codec), ("v", self.v_codec)):
            expected[f"{x}_codes"] = (*lead, blocks, 4 * codec.bits * dim), codec.dtype
            expected[f"{x}_scale"] = expected[f"{x}_zero"] = scales[x], torch.bfloat16
            if codec.symmetric != (getattr(self, f"{x}_zero") is None):
                raise ValueError(f"{codec.name} {x}_codes: zero points go with affine codes, and only there")
        for name, (shape, dtype) in expected.items():
            if (array := getattr(self, name)) is not None:
                check_tensor(name, array, shape, (dtype,), self.k_scale.device)
                if not array.is_contiguous():
                    raise ValueError(f"{name} must be contiguous, its strides are {array.stride()}")
        tokens_fit = 0 <= self.start <= BLOCK and 0 <= self.tokens <= blocks * BLOCK and self.tokens % BLOCK == 0
        slot_fits = self.slot == 0 or (0 < self.slot < blocks and self.slot % 2 == blocks % 2 == 0)
        if not (type(self.start) is type(self.tokens) is type(self.slot) is int and tokens_fit and slot_fits):
            numbers = f"start={self.start!r}, tokens={self.tokens!r} and slot={self.slot!r}"
            raise ValueError(f"{numbers} do not fit {blocks} blocks of {BLOCK}")

    def check_blocks(self, k: torch.Tensor, v: torch.Tensor, slot: int) -> None:
        """Raises ValueError unless `k` and `v` are what `quantize_blocks` takes for the slots from `slot` on."""
        (*lead, slots, dim), tokens = self.k_scale.shape, k.shape[2:3].numel()
        for name, t in (("k", k), ("v", v)):
            check_tensor(name, t, (*lead, tokens, dim), (k.dtype,), self.k_scale.device)
        if not tokens or tokens % BLOCK or not 0 <= slot <= slots - tokens // BLOCK:
            raise ValueError(f"{tokens} tokens from slot {slot} on are not whole blocks of {BLOCK} for {slots} slots")

    def arrays(self) -> tuple[torch.Tensor | None, ...]:
        """Its tensors, in the order of the attributes above; all contiguous."""
        return self.k_codes, self.k_scale, self.k_zero, self.k_mean, self.v_codes, self.v_scale, self.v_zero

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
        dim = self.k_scale.shape[-1]
        k_zero = None if self.k_zero is None else self.k_zero[:, :, blocks, None]
        k_codes = unpack_keys(self.k_codes[:, :, blocks], self.k_codec.planes)
        k = self.k_codec.dequantize(k_codes, self.k_scale[:, :, blocks, None], k_zero)
        group = dim // self.v_scale.shape[3]

        def spread(t: torch.Tensor) -> torch.Tensor:
            return t[:, :, blocks].transpose(-1, -2).repeat_interleave(group, -1)

        v_zero = None if self.v_zero is None else spread(self.v_zero)
        v_codes = unpack_values(self.v_codes[:, :, blocks], self.v_codec.planes)
        v = self.v_codec.dequantize(v_codes, spread(self.v_scale), v_zero)
        return k.flatten(2, 3) + self.k_mean[:, :, None], rotate(v.flatten(2, 3))
