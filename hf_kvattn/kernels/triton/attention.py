"""Decode attention in Triton over quantized and exact tokens: how the tokens are split over programs, and the launch of
both kernels (`attention_kernels.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ...quant import rotation
from ...quant.layout import BLOCK
from ...quant.packed import ARRAYS, PackedKV, check_tensor
from ..call import AttendCall
from .attention_kernels import decode_attention_kernel, merge_splits_kernel

MAX_SPLITS = 128
# A split reads at least so many times the bytes that are written and read for its partial result, if that takes no more
# blocks than the second bound: with many query rows it is more important that all multiprocessors have work.
_SPLIT_READ_RATIO = 16
_SPLIT_BLOCKS = (8, 64)
_PROGRAMS_PER_MULTIPROCESSOR = 2
_SMALLEST_SCALE = 1e-30  # for 0: no product of it and -inf is NaN


def _assembly(bits: int, dtype: torch.dtype) -> str:
    """PTX of `attention_kernels.dequantize`, or `dequantize_key` for 0 bits, for NVIDIA's GPUs: of two numbers at a
    time, or of four where codes are read byte by byte.

    No integer is converted: a code among the low bits of the mantissa of 128 (float16: 1,024) makes that number plus
    the code. Subtracting it again is exact, so that products are rounded once.
    """
    fma, magic = ("fma.rn.bf16x2", 128) if dtype == torch.bfloat16 else ("fma.rn.f16x2", 1024)
    start = f"{{.reg .b32 a, b, m, n, s, none; mov.b32 none, {0x80008000};"
    if bits == 8:  # $1, $2: a word each; $3: their scales; $4: which byte of each. Codes stand for themselves less 128.
        start += ".reg .b32 one, off;"
        if dtype == torch.float16:
            part = f"mov.b32 one, {_twice(1, dtype)}; mov.b32 off, {_twice(-1152, dtype)}; prmt.b32 a, $1, $2, $4;"
            part += f"lop3.b32 a, a, {0x00FF00FF}, {_twice(magic, dtype)}, 0xea; {fma} a, a, one, off;"
        else:  # seven bits fit: the eighth decides whether 128 or 256 is subtracted
            part = f"mov.b32 one, {_twice(-1, dtype)}; prmt.b32 a, $1, $2, $4;"
            part += f"lop3.b32 b, a, {0x00800080}, {_twice(magic, dtype)}, 0xae;"
            part += f"lop3.b32 a, a, {0x007F007F}, {_twice(magic, dtype)}, 0xea; {fma} a, b, one, a;"
        return start + part + f"{fma} $0, a, $3, none;}}"
    # Values' codes are put in doubled: half of that, less half of the largest, is exact.
    half, off = (0.5, -(magic + 2**bits - 1) / 2) if bits else (1, 0)
    start += f".reg .b32 one, off; mov.b32 one, {_twice(half, dtype)}; mov.b32 off, {_twice(off, dtype)};"
    in_words = f"{_twice(magic, dtype)}, 0xea; {fma} a, a, one, off;"
    if bits == 4:  # $1: two words; $2: their scales; $3: a token
        turn = "shl.b32 s, $3, 2; sub.u32 s, 1, s; shf.l.wrap.b32 a, $1, $1, s;"
        return start + turn + f"lop3.b32 a, a, {0x001E001E}, {in_words} {fma} $0, a, $2, none;}}"
    if bits == 2:  # $2: four words, a byte each; $3, $4: their scales; $5: a token
        start += "shl.b32 s, $5, 1; sub.u32 s, 1, s;"
        return start + "".join(
            f"prmt.b32 a, $2, $2, {pick}; shf.l.wrap.b32 a, a, a, s; lop3.b32 a, a, {0x00060006}, {in_words}"
            f"{fma} ${to}, a, ${scale}, none;" for to, pick, scale in ((0, 0x1100, 3), (1, 0x3322, 4))
        ) + "}"  # fmt: skip
    # A code is put together in a byte, and that with a byte of the magic number.
    pick = "shr.u32 n, ${0}, 4; lop3.b32 n, n, ${0}, 0x0f000f00, 0xe4;"  # words of 4 bits, two in a byte
    if bits == 3:  # $2: four words' low bits, a byte each; $3: the third ones'; $4, $5: their scales; $6: a token
        part = f"shl.b32 s, $6, 1; sub.u32 s, 1, s; shf.l.wrap.b32 a, $2, $2, s; {pick.format(3)}"
        part += "sub.u32 s, 3, $6; shf.l.wrap.b32 n, n, n, s; and.b32 n, n, 0x08080808;"
        part += "lop3.b32 n, a, 0x06060606, n, 0xea;"
        ends = (0, 0x4140, "$4, none"), (1, 0x4342, "$5, none")
    else:
        # $2, $3: words of 4 bits of four channels; $4: of 2, a byte each; $5: of 1; $6: their width, in each byte;
        # $7, $8: scales; $9, $10: zeros; $11: a token. Half the number of codes is subtracted with the magic number.
        part = "and.b32 s, $6, 4; mov.b32 m, 0x03030303; shf.l.wrap.b32 m, m, m, s; shf.l.wrap.b32 b, $4, $4, s;"
        part += f"shl.b32 s, $11, 1; shf.r.wrap.b32 b, b, b, s; {pick.format(5)} and.b32 s, $6, 6;"
        part += "shf.l.wrap.b32 n, n, n, s; shf.r.wrap.b32 n, n, n, $11; mov.b32 a, 0x01010101;"
        part += "shf.l.wrap.b32 a, a, a, s; and.b32 n, n, a; lop3.b32 n, b, m, n, 0xea;"
        part += "shr.u32 s, $11, 1; mad.lo.u32 s, s, 0x1111, 0x6420; prmt.b32 a, $2, $3, s;"
        part += "and.b32 s, $11, 1; shl.b32 s, s, 2; shr.u32 a, a, s; lop3.b32 n, a, 0x0f0f0f0f, n, 0xea;"
        part += "and.b32 s, $6, 7; mov.b32 a, 1; shl.b32 a, a, s; shr.u32 a, a, 1;"
        part += f"mov.b32 m, {_twice(-magic, dtype) >> 24}; prmt.b32 off, a, m, 0x4040;"
        ends = (0, 0x4140, "$7, $9"), (1, 0x4342, "$8, $10")
    part += f"mov.b32 m, {_twice(magic, dtype) >> 24};"
    return start + part + "".join(
        f"prmt.b32 a, n, m, {pick}; {fma} a, a, one, off; {fma} ${to}, a, {last};" for to, pick, last in ends
    ) + "}"  # fmt: skip


def _twice(x: float, dtype: torch.dtype) -> int:
    """The bits of two numbers `x` of 16 bits."""
    return (int(torch.tensor(x, dtype=dtype).view(torch.int16)) & 0xFFFF) * 0x10001


BY_CHANNEL = 0  # bits
ASSEMBLY = {
    (bits, dtype): _assembly(bits, dtype)
    for bits in (8, 4, 3, 2, BY_CHANNEL)
    for dtype in (torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Tile:
    """What a program of 4 warps computes at once: query rows, packed blocks of 32 tokens, as many of exact tokens; the
    stages of its loads."""

    rows: int
    blocks: int
    exact_blocks: int
    stages: int


def tile_for(rows: int, padded: int, bits: Sequence[int], amd: bool) -> Tile:
    """The tile for `rows` query rows a KV head, heads of `padded` numbers, and `bits` of keys and values.

    Four blocks are eight words (`quant/layout.py`) for each warp, a whole tile of the tensor cores. So that no kernel
    spills registers in its loops on NVIDIA's GPUs, heads of 256 take fewer blocks at once, and keys by channel fewer
    rows; these spill with heads of 256 in any case, and take fewer instructions a token with four blocks. On AMD's,
    loads wait in registers: more than two blocks would leave room for one program.
    """
    by_channel = bool(bits) and bits[0] < 8
    max_rows = 32 if padded <= 64 or (padded <= 128 and not by_channel) else 16
    # More query rows take several tiles, which read the same keys and values.
    rows = min(max_rows, max(16, triton.next_power_of_2(rows)))
    if amd:
        return Tile(rows, 2, 2 if padded <= 64 else 1, 2 if rows * padded <= 16 * 128 else 1)
    return Tile(rows, 2 if padded > 128 and 8 in bits else 4, 2 if padded <= 64 else 1, 3 if padded <= 128 else 2)


@dataclass(frozen=True)
class Splits:
    """How the tokens from `block_begin` and `exact_begin` on are split: into `packed` splits of `blocks` blocks, and
    `exact` splits of as many exact tokens."""

    block_begin: int
    exact_begin: int
    blocks: int
    packed: int
    exact: int


def splits_for(
    call: AttendCall, programs: int, multiprocessors: int, blocks_at_once: int, any_length: bool = False
) -> Splits:
    """Splits that fill the GPU, where each takes `programs` programs. They depend on lengths alone, not on tensors.

    With `any_length` they serve every length up to that of `call`: a window may begin anywhere.
    """
    start, packed_tokens = (0, 0) if call.packed is None else (call.packed.start, call.packed.tokens)
    exact = call.kv_len - packed_tokens
    unseen = 0 if any_length or call.window is None else max(0, call.kv_len - call.q.shape[2] - call.window + 1)
    block_begin = min(max(0, unseen - start) // BLOCK, packed_tokens // BLOCK)
    exact_begin = unseen if unseen < start else min(exact, start + max(0, unseen - start - packed_tokens))
    packed_blocks = packed_tokens // BLOCK - block_begin
    exact_blocks = -(-(exact - exact_begin) // BLOCK)
    wanted = max(1, multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR // programs)
    wanted = min(wanted, MAX_SPLITS - 2 - (call.sinks is not None))  # both kinds round up; sinks are one more split
    bits = 16 if call.packed is None else (call.packed.k_codec.bits + call.packed.v_codec.bits) / 2
    rows = call.q.shape[2] * call.q.shape[1] // call.k.shape[1]
    low, high = _SPLIT_BLOCKS
    # Of each channel: a partial result in float32, written and read, against the keys and values of a block.
    pays = math.ceil(_SPLIT_READ_RATIO * (rows * 8) / (2 * BLOCK * bits / 8))
    blocks = max(min(high, max(low, pays)), -(-(packed_blocks + exact_blocks) // wanted))
    blocks = -(-blocks // blocks_at_once) * blocks_at_once
    return Splits(block_begin, exact_begin, blocks, -(-packed_blocks // blocks), -(-exact_blocks // blocks))


def launch(
    call: AttendCall, multiprocessors: int, lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queues both kernels: `(B, Tq, Hq, D)` in the dtype of `q`, and the log-sum-exps `(B, Hq, Tq)` in float32.

    Args:
        call: with `lengths` its tokens lie in order from slot 0 on, or it is a ring of which all slots are given.
        lengths: `(2,)` int32 on the device of `q`, read when the kernels run: how many packed tokens (a multiple of 32)
            and exact tokens there are; Tk is their sum. Of a ring (`call.tokens` is not None) it is how many there have
            been: token `t` lies in slot `t % slots`, and what is visible must still be there. The lengths of `call` are
            then upper bounds, which decide into how many splits the kernel shares out what there is: one captured
            launch serves all lengths. Greater numbers in `lengths` would read beyond the cache's memory: this cannot be
            checked here. Without a packed part the first number is not read.

    Raises:
        ValueError: `lengths` of another shape, dtype or device, or beside sinks or a ring of which a part is given.
    """
    if lengths is not None:
        _check_lengths(call, lengths)
    batch, q_heads, q_len, dim = call.q.shape
    kv_heads, heads_per_kv = call.k.shape[1], q_heads // call.k.shape[1]
    rows, padded = heads_per_kv * q_len, max(16, triton.next_power_of_2(dim))
    bits = () if call.packed is None else (call.packed.k_codec.bits, call.packed.v_codec.bits)
    tile = tile_for(rows, padded, bits, bool(torch.version.hip))
    programs = batch * kv_heads * triton.cdiv(rows, tile.rows)
    at_once = tile.exact_blocks if call.packed is None else tile.blocks
    splits = splits_for(call, programs, multiprocessors, at_once, lengths is not None)
    own_splits = max(1, splits.packed + splits.exact)
    n_splits = own_splits + (call.sinks is not None)
    device = call.q.device
    out = torch.empty((batch, q_len, q_heads, dim), dtype=call.q.dtype, device=device)
    lse = torch.empty((batch, q_heads, q_len), dtype=torch.float32, device=device)
    partial = torch.empty((batch, kv_heads, n_splits, rows, dim), dtype=torch.float32, device=device)
    partial_lse = torch.empty(partial.shape[:-1], dtype=torch.float32, device=device)
    _queue_decode(call, call.kv_len, lengths, tile, splits, partial, partial_lse)
    if (sinks := call.sinks) is not None:  # exact tokens with queries of their own: the last split
        sink_call = AttendCall(sinks.q, sinks.k, sinks.v, call.scale, softcap=call.softcap, leftpad=sinks.leftpad)
        last = partial.narrow(2, own_splits, 1), partial_lse.narrow(2, own_splits, 1)
        one_split = Splits(0, 0, 2 * tile.exact_blocks, 0, 1)
        _queue_decode(sink_call, sinks.evicted + q_len - 1, None, tile, one_split, *last, n_splits)
    merge_splits_kernel[(q_len, q_heads, batch)](
        partial_ptr=partial, partial_lse_ptr=partial_lse, s_aux_ptr=call.s_aux, out_ptr=out, lse_ptr=lse,
        splits=n_splits, packed_splits=splits.packed, q_len=q_len,
        HEADS=q_heads, HEADS_PER_KV=heads_per_kv, D=dim, PADDED=padded,
        LOG_SIZE=rotation.size_for(dim).bit_length() - 1, MAX_SPLITS=MAX_SPLITS, CHUNK=8, num_warps=4,
    )  # fmt: skip
    return out, lse


def _queue_decode(
    call: AttendCall,
    kv_len: int,
    lengths: torch.Tensor | None,
    tile: Tile,
    splits: Splits,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    n_splits: int | None = None,
) -> None:
    """Queues the kernel that writes the results of `splits` to `partial` and `partial_lse`.

    With `n_splits` these are the last of so many splits, and the tokens are sinks: `kv_len` says how many are visible.
    """
    # The kernel's scale is positive: the largest score is that of the largest product then.
    q = call.q if call.scale > 0 else -call.q
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, call.k, call.v))
    batch, q_heads, q_len, dim = q.shape
    kv_heads, heads_per_kv = k.shape[1], q_heads // k.shape[1]
    row_tiles = triton.cdiv(heads_per_kv * q_len, tile.rows)
    decode_attention_kernel[(row_tiles * max(1, splits.packed + splits.exact), kv_heads, batch)](
        q_ptr=q, k_ptr=k, v_ptr=v, lengths_ptr=lengths,
        leftpad_ptr=None if call.leftpad is None else call.leftpad.contiguous(),
        partial_ptr=partial, lse_ptr=partial_lse,
        scale=max(abs(call.scale), _SMALLEST_SCALE), softcap=call.softcap or 0.0,
        **_packed_arguments(call.packed, dim, q.dtype),
        block_begin=splits.block_begin, exact_begin=splits.exact_begin, split_blocks=splits.blocks,
        packed_splits=splits.packed, splits=partial.shape[2] if n_splits is None else n_splits,
        exact=k.shape[2] if call.tokens is None else call.tokens, exact_slot=call.slot, ring=k.shape[2],
        kv_len=kv_len, window=2**31 - 1 if call.window is None else call.window, q_len=q_len,
        **strides(q=q, k=k, v=v),
        KV_HEADS=kv_heads, HEADS_PER_KV=heads_per_kv, D=dim, PADDED=max(16, triton.next_power_of_2(dim)),
        ROWS=tile.rows, EXACT_BLOCKS=tile.exact_blocks, BLOCKS=tile.blocks,
        CAUSAL=call.causal, SOFTCAP=call.softcap is not None, SINKS=n_splits is not None,
        num_warps=4, num_stages=tile.stages,
        # With 255 registers a thread two programs of 4 warps fit a multiprocessor. Without this option, which Triton
        # has for NVIDIA only, the assembler spills a few bytes to make room for a third.
        **({} if torch.version.hip else {"maxnreg": 255}),
    )  # fmt: skip


def _packed_arguments(packed: PackedKV | None, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """What `decode_attention_kernel` is told of the quantized tokens of heads of `dim`."""
    if packed is None:
        numbers = dict.fromkeys(("start", "packed_tokens", "blocks", "slot", "slots", "K_BITS", "V_BITS"), 0)
        return {**dict.fromkeys(ARRAYS), **numbers, "GROUP": dim, "SPAN": dim & -dim, "K_ASM": "", "V_ASM": ""}
    group, slots = dim // packed.v_scale.shape[3], packed.k_codes.shape[2]
    arrays = dict(zip(ARRAYS, packed.arrays(), strict=True))
    lengths = {"start": packed.start, "packed_tokens": packed.tokens, "blocks": packed.tokens // BLOCK}
    widths = {"K_BITS": packed.k_codec.bits, "V_BITS": packed.v_codec.bits, "GROUP": group, "SPAN": group & -group}
    fast = torch.version.hip is None and isinstance(decode_attention_kernel, triton.JITFunction)  # not the interpreter
    of_keys = BY_CHANNEL if packed.k_codec.by_channel else packed.k_codec.bits
    made = {"K_ASM": of_keys, "V_ASM": packed.v_codec.bits}
    assembly = {name: ASSEMBLY.get((bits, dtype), "") if fast else "" for name, bits in made.items()}
    return {**arrays, **lengths, "slot": packed.slot, "slots": slots, **widths, **assembly}


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """`stride_qb`, `stride_qh` and `stride_qt` of a tensor `q` `(B, H, T, D)`, and so on."""
    return {f"stride_{name}{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate("bht")}


def _check_lengths(call: AttendCall, lengths: torch.Tensor) -> None:
    check_tensor("lengths", lengths, (2,), (torch.int32,), call.q.device)
    if not lengths.is_contiguous():
        raise ValueError(f"lengths are not side by side, their stride is {lengths.stride()}")
    if call.sinks is not None:
        raise ValueError("lengths in a tensor are not served beside sinks: what is seen of those is the host's number")
    slots = (call.slot, 0 if call.packed is None else call.packed.slot)
    if slots != (0, 0) or call.tokens not in (None, call.k.shape[2]):
        raise ValueError(
            f"lengths in a tensor are for tokens in order, or a whole ring, not for {call.kv_len} from slots {slots} on"
        )
