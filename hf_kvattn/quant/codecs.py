"""`CODECS`: how numbers become codes of few bits, one row a codec. A new width is a new row.

Keys are grouped per channel inside a block of 32 tokens, values per token in groups of channels (KIVI, Liu et al.,
2024, arXiv:2402.02750): keys have a few channels that are always large, values do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import affine, symmetric


@dataclass(frozen=True)
class Codec:
    """One way to store numbers.

    Attributes:
        name: what `caches.registry` and backends call it.
        planes: bits of each bit plane that a code is stored in (`layout.py`), the lowest bits first; they add up to
            the code's bits.
        symmetric: codes around 0, with a scale alone; else affine codes, with a scale and a zero point.
        dtype: of the stored codes.
        key_shares, value_shares: shares of a group's range that an affine quantizer tries for keys and for values
            (`affine.quantize`). Measured.
    """

    name: str
    planes: tuple[int, ...]
    symmetric: bool = False
    dtype: torch.dtype = torch.uint8
    key_shares: tuple[float, ...] = (1.0,)
    value_shares: tuple[float, ...] = (1.0,)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(self.planes)

    @property
    def argument(self) -> int | str:
        """What `QuantizedKVCache(bits=...)` calls it: a number of bits, or `"fp8"`."""
        return self.bits if self.dtype == torch.uint8 else self.name

    def quantize(
        self, x: torch.Tensor, dim: int, shares: tuple[float, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes (`dtype`), scale and zero point (None where codes are symmetric), as `affine.quantize` gives them.

        `shares` are `key_shares` for keys and `value_shares` for rotated values.
        """
        if not self.symmetric:
            return affine.quantize(x, self.bits, dim, shares)
        return *symmetric.quantize(x, dim, self.dtype), None

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """float32 numbers of the shape of `codes`."""
        if zero is not None:
            return affine.dequantize(codes, scale, zero)
        return symmetric.dequantize(codes, scale)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("int8", (8,), symmetric=True),
        Codec("fp8", (8,), symmetric=True, dtype=symmetric.FP8),
        Codec("int4", (4,)),
        Codec("int3", (2, 1), key_shares=(1.0, 0.95, 0.9), value_shares=(1.0, 0.95, 0.9, 0.85)),
        Codec("int2", (2,), key_shares=(1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), value_shares=(0.8,)),
    )
}


def codec_for(bits: int | str) -> Codec:
    """The codec that users call `bits`: 8, 4, 3, 2 or "fp8".

    Raises:
        ValueError: no codec of that name.
    """
    known = {codec.argument: codec for codec in CODECS.values()}
    if type(bits) not in (int, str) or bits not in known:
        raise ValueError(f"bits must be one of {tuple(known)}, got {bits!r}")
    return known[bits]
