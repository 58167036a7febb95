"""The memory layout of a block of 32 tokens' codes: the contract between `caches`, `kernels` and `csrc`.

There are two layouts, one for GPUs (PyTorch's device type `cuda`) and one for everything else, and no tensor says which
one it has: its device does. Either way a block of `D` channels, a multiple of 16, takes `4 * bits * D` bytes. A code is
cut into bit planes of 8, 4, 2 and 1 bits (`planes_of`): codes of 3 bits into a plane of the low two bits and one of the
third. Codes of 8 bits may be float8_e4m3fn instead of uint8, and keep that dtype.

Keys whose channels have widths of their own (`pack_by_width`): the 16 channels of a group take `64 * width` bytes, laid
out as a block of 16 channels. The groups follow each other, and take `4 * bits * D` bytes for an average of `bits`.

Units, on a CPU: a kernel multiplies codes with a broadcast of four numbers at a time and sums the four products into
one lane (dot products of bytes: `vpdpbusd` on x86, `udot` on Arm). So 64 codes, one vector, are a *unit* of 16 lanes
of 4:

- keys: a lane is a token, its 4 codes are neighbouring channels. Unit (c, h) holds channels 4c to 4c+3 of the tokens
  16h to 16h+15. The sum over units c of a half h gives the scores of 16 tokens, without any sum across lanes.
- values: a lane is a channel, its 4 codes are neighbouring tokens. Unit (c, t) holds tokens 4t to 4t+3 of the channels
  16c to 16c+15. The sum over t gives 16 channels of the output.

The 8 units of 16 channels of a block take `64 * bits` bytes: one plane after the other, the low bits first. In a plane
of 8 bits the units follow each other. In a plane of 4 bits, 64 bytes hold two units, the first one in the low bits;
with 2 bits four; with 1 bit eight.

    keys,   order of units: c outer, h inner;    values: c outer, t inner

Words, on a GPU: tensor cores multiply tiles of numbers. Four tokens of a channel share a *word* of `4 * bits` bits of a
plane, so that a tile of words, loaded once, is unpacked into four tiles, each of every fourth token, by shifts alone. A
block's planes follow each other, the low bits first, and the words of one lie in this order, packed from the low bits
of the first byte on:

    keys:   word (token // 4, channel): the channels of a word lie side by side, as a product over channels reads them
    values: word (channel, token // 4): the tokens of a channel lie side by side, as a sum over tokens reads them
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

PLANES = (8, 4, 2, 1)  # bits
BLOCK = 32  # tokens
WORD = 4  # tokens
LANES = 16
UNITS = 8  # of 16 channels of a block


def planes_of(bits: int) -> tuple[int, ...]:
    """Bits of each bit plane of a code, the lowest bits first."""
    return tuple(plane for plane in PLANES if bits & plane)


def pack_by_width(codes: torch.Tensor, widths: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys' codes, channels in the order of their widths, to bytes for their device.

    Args:
        codes: `(..., blocks, 32, D)` uint8, each below 2**width.
        widths: `(..., D / 16)` of each group, 0 to 7.
        bits: their average, everywhere.

    Returns:
        `(..., blocks, 4 * bits * D)` uint8.
    """
    packed = torch.zeros(*codes.shape[:-2], 4 * bits * codes.shape[-1], dtype=torch.int32, device=codes.device)
    for index, shift, low, mask in _places(widths):
        part = (codes.int() >> low & mask) << shift
        packed.scatter_add_(-1, index.flatten(-2).expand(*codes.shape[:-2], -1), part.flatten(-2))
    return packed.to(torch.uint8)


def unpack_by_width(packed: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_by_width`: `(..., blocks, 32, D)` uint8."""
    codes = torch.zeros((), dtype=torch.int32, device=packed.device)
    for index, shift, low, mask in _places(widths):
        found = packed.gather(-1, index.flatten(-2).expand(*packed.shape[:-1], -1)).unflatten(-1, (BLOCK, -1))
        codes = codes | (found.int() >> shift & mask) << low
    return codes.to(torch.uint8)


def by_width_to(packed: torch.Tensor, widths: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """As `keys_to`, of what `pack_by_width` made; `widths` are where `packed` is."""
    device = torch.device(device)
    if in_words(packed.device) == in_words(device):
        return packed.to(device)
    codes = unpack_by_width(packed, widths)
    return pack_by_width(codes.to(device), widths.to(device), packed.shape[-1] // (4 * codes.shape[-1]))


def _places(widths: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each plane: of every code `(..., 1, 32, D)` the byte it is in, the shift there, its place in the code, and
    its mask, 0 where the code has no such plane."""
    device = widths.device
    width = widths.long()
    begin = 64 * (width.cumsum(-1) - width)
    width, begin = (t.repeat_interleave(LANES, -1)[..., None, None, :] for t in (width, begin))
    token, channel = torch.arange(BLOCK, device=device)[:, None], torch.arange(width.shape[-1], device=device) % LANES
    low = torch.zeros_like(width)
    for bits in PLANES[1:]:
        if in_words(device):
            bit = ((token // WORD * LANES + channel) * WORD + token % WORD) * bits
            byte, shift = bit // 8, bit % 8
        else:
            unit, shared = channel // 4 * 2 + token // LANES, 8 // bits
            byte, shift = unit // shared * 64 + token % LANES * 4 + channel % 4, unit % shared * bits
        there = width & bits > 0
        index = torch.where(there, begin + 64 * low + byte, 0)
        yield index, shift.int(), low.int(), torch.where(there, 2**bits - 1, 0).int()
        low = low + there * bits


def pack_keys(codes: torch.Tensor, planes: tuple[int, ...]) -> torch.Tensor:
    """`(..., 32, D)` uint8 codes of `planes`, `bits` in all, to `(..., 4 * bits * D)` bytes for their device."""
    if in_words(codes.device):
        return _pack_words(codes.unflatten(-2, (-1, WORD)).transpose(-1, -2).flatten(-3), planes)
    units = codes.unflatten(-1, (-1, 4)).unflatten(-3, (2, LANES))  # (..., h, lane, c, 4)
    return _pack(units.movedim(-2, -4).flatten(-2).flatten(-3, -2), planes)


def unpack_keys(packed: torch.Tensor, planes: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `pack_keys`: `(..., 32, D)` uint8."""
    if in_words(packed.device):
        words = _unpack_words(packed, planes).unflatten(-1, (BLOCK // WORD, -1, WORD))
        return words.transpose(-1, -2).flatten(-3, -2)
    units = _unpack(packed, planes).unflatten(-2, (-1, 2)).unflatten(-1, (LANES, 4))  # (..., c, h, lane, 4)
    return units.movedim(-4, -2).flatten(-2).flatten(-3, -2)


def pack_values(codes: torch.Tensor, planes: tuple[int, ...]) -> torch.Tensor:
    """As `pack_keys`, of values."""
    if in_words(codes.device):
        return _pack_words(codes.transpose(-1, -2).flatten(-2), planes)
    units = codes.unflatten(-1, (-1, LANES)).unflatten(-3, (BLOCK // 4, 4))  # (..., t, 4, c, lane)
    return _pack(units.movedim(-2, -4).transpose(-2, -1).flatten(-2).flatten(-3, -2), planes)


def unpack_values(packed: torch.Tensor, planes: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `pack_values`: `(..., 32, D)` uint8."""
    if in_words(packed.device):
        return _unpack_words(packed, planes).unflatten(-1, (-1, BLOCK)).transpose(-1, -2)
    units = _unpack(packed, planes).unflatten(-2, (-1, BLOCK // 4)).unflatten(-1, (LANES, 4))  # (..., c, t, lane, 4)
    return units.transpose(-2, -1).movedim(-4, -2).flatten(-2).flatten(-3, -2)


def keys_to(packed: torch.Tensor, planes: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    """What `pack_keys` made, on `device` and in the layout of that; itself if it is there already."""
    device = torch.device(device)
    if in_words(packed.device) == in_words(device):
        return packed.to(device)
    return pack_keys(unpack_keys(packed, planes).to(device), planes)


def values_to(packed: torch.Tensor, planes: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    """As `keys_to`, of what `pack_values` made."""
    device = torch.device(device)
    if in_words(packed.device) == in_words(device):
        return packed.to(device)
    return pack_values(unpack_values(packed, planes).to(device), planes)


def in_words(device: torch.device) -> bool:
    """Whether codes on `device` lie in words, not in units."""
    return device.type == "cuda"


def _pack_words(codes: torch.Tensor, planes: tuple[int, ...]) -> torch.Tensor:
    """`(..., n)` codes in the order of their words to `(..., n / 8 * bits)` bytes."""
    if planes == (8,):
        return codes
    parts = (codes >> sum(planes[:i]) & (2**bits - 1) for i, bits in enumerate(planes))
    return torch.cat([_pack_plane(part[..., None], bits) for part, bits in zip(parts, planes, strict=True)], dim=-1)


def _unpack_words(packed: torch.Tensor, planes: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `_pack_words`: `(..., n)`."""
    if planes == (8,):
        return packed
    of_each = packed.shape[-1] // sum(planes)
    parts = packed.split([bits * of_each for bits in planes], dim=-1)
    codes, *higher = (_unpack_plane(part, bits, 1).flatten(-2) for part, bits in zip(parts, planes, strict=True))
    for i, plane in enumerate(higher, 1):
        codes = codes | plane << sum(planes[:i])
    return codes


def _pack(units: torch.Tensor, planes: tuple[int, ...]) -> torch.Tensor:
    """`(..., units, 64)` codes to bytes `(..., units * 8 * bits)`."""
    if planes == (8,):
        return units.flatten(-2)  # of any dtype of one byte
    parts = []
    for i, bits in enumerate(planes):
        plane = units >> sum(planes[:i]) & (2**bits - 1)
        parts.append(_pack_plane(plane, bits).unflatten(-1, (-1, UNITS * 8 * bits)))
    return torch.cat(parts, dim=-1).flatten(-2)


def _unpack(packed: torch.Tensor, planes: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `_pack`: `(..., units, 64)`."""
    if planes == (8,):
        return packed.unflatten(-1, (-1, 64))
    sizes = [UNITS * 8 * bits for bits in planes]
    parts = packed.unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
    codes, *higher = (_unpack_plane(part.flatten(-2), bits, 64) for part, bits in zip(parts, planes, strict=True))
    for i, plane in enumerate(higher, 1):
        codes = codes | plane << sum(planes[:i])
    return codes


def _pack_plane(units: torch.Tensor, bits: int) -> torch.Tensor:
    """`(..., units, n)` codes, those of `8 // bits` units in the same bytes, to `(..., bytes)`."""
    together = units.unflatten(-2, (-1, 8 // bits))  # units that share their bytes
    packed = together[..., 0, :].clone()
    for i in range(1, 8 // bits):
        packed |= together[..., i, :] << (bits * i)
    return packed.flatten(-2)


def _unpack_plane(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """The inverse of `_pack_plane` for units of `size` codes: `(..., units, size)`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    shared = packed.unflatten(-1, (-1, 1, size))
    return ((shared >> shifts[:, None]) & (2**bits - 1)).flatten(-3, -2)
