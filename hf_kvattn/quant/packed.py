"""`PackedKV`: the quantized part of a cache layer, as caches store it and kernels read it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .codecs import Codec
from .layout import unpack_keys, unpack_values
from .rotation import rotate


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

    @property
    def k_bits(self) -> int:
        return self.k_codec.bits

    @property
    def v_bits(self) -> int:
        return self.v_codec.bits

    def arrays(self) -> tuple[torch.Tensor | None, ...]:
        """Its tensors, in the order of the attributes above; contiguous, as caches allocate them."""
        keys = (self.k_codes, self.k_scale, self.k_zero, self.k_mean)
        arrays = (*keys, self.v_codes, self.v_scale, self.v_zero)
        assert all(t is None or t.is_contiguous() for t in arrays)
        return arrays

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
