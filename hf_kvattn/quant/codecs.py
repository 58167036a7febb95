"""`CODECS`: how numbers become codes of few bits, one row a codec. A new width is a new row.

Keys are grouped per channel inside a block of 32 tokens, values per token in groups of channels (KIVI, Liu et al.,
2024, arXiv:2402.02750): keys have a few channels that are always large, values do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import symmetric


@dataclass(frozen=True)
class Codec:
    """One way to store numbers.

    Attributes:
        name: what `caches.registry` and backends call it.
        bits: of a code; where it is `by_channel`, of a key's on average.
        by_channel: each key channel has a width of its own, and values have scales of one byte (`few_bits.py`). Else
            codes are around 0, with a bfloat16 scale for each group (`symmetric.py`).
        dtype: of the stored codes.
    """

    name: str
    bits: int
    by_channel: bool = False
    dtype: torch.dtype = torch.uint8

    @property
    def argument(self) -> int | str:
        """What `QuantizedKVCache(bits=...)` calls it: a number of bits, or `"fp8"`."""
        return self.bits if self.dtype == torch.uint8 else self.name


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("int8", 8),
        Codec("fp8", 8, dtype=symmetric.FP8),
        Codec("int4", 4, by_channel=True),
        Codec("int3", 3, by_channel=True),
        Codec("int2", 2, by_channel=True),
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
