"""Decode attention in Triton over quantized and exact tokens: which program takes which, and the op that launches both
kernels (`attention_kernels.py`).

This module needs triton and is imported when the first call comes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from ...quant import rotation
from ...quant.layout import BLOCK
from ...quant.packed import PackedKV
from ..call import AttendCall, SinkKV
from .attention_kernels import decode_attention_kernel, merge_splits_kernel

MAX_SPLITS = 128
_SPLIT_PAYS = 16  # a split reads so many times the bytes that its partial result costs,
_SPLIT_BLOCKS = (8, 64)  # within these bounds: with many query rows it is more important that all multiprocessors read
_PROGRAMS_PER_MULTIPROCESSOR = 2


@dataclass(frozen=True)
class Tile:
    """How much a program takes at once: query rows, blocks of 32 tokens; its warps, and the stages of its loads."""

    rows: int
    blocks: int
    warps: int
    stages: int


def tile_for(rows: int, padded: int, three_bits: bool, amd: bool) -> Tile:
    """The tile for `rows` query rows a KV head and heads of `padded` numbers: none spills, two fit a multiprocessor.

    On AMD's GPUs, where the next loads wait in registers, one fits with 8-bit keys and heads of more than 128 numbers,
    and 32 rows of 128 numbers spill with codes of 3 bits.
    """
    most = 32 if padded <= 64 or (padded <= 128 and not (amd and three_bits)) else 16
    # More rows are tiles, which read the same keys and values one after another.
    stages = 2 if amd and padded <= 128 else 3
    return Tile(min(most, max(16, triton.next_power_of_2(rows))), 2 if padded <= 64 else 1, 4, stages)


@dataclass(frozen=True)
class Splits:
    """Which tokens which programs take: from `block_begin` and `exact_begin` on, `blocks` blocks' worth a split."""

    block_begin: int
    exact_begin: int
    blocks: int
    packed: int
    exact: int


def splits_for(
    call: AttendCall, programs: int, multiprocessors: int, blocks_at_once: int, any_length: bool = False
) -> Splits:
    """Splits that fill the GPU, where `programs` are needed for each; from lengths alone, so nothing waits for it.

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
    wanted = min(wanted, MAX_SPLITS - 2 - (call.sinks is not None))  # both kinds round up, and sinks are one more
    bits = 16 if call.packed is None else (call.packed.k_bits + call.packed.v_bits) / 2
    rows = call.q.shape[2] * call.q.shape[1] // call.k.shape[1]
    least, most = _SPLIT_BLOCKS
    pays = _SPLIT_PAYS * rows * 8 / (2 * BLOCK * bits / 8)  # of each channel: 4 bytes written and read; keys and values
    blocks = max(min(most, max(least, math.ceil(pays))), -(-(packed_blocks + exact_blocks) // wanted))
    blocks = -(-blocks // blocks_at_once) * blocks_at_once
    return Splits(block_begin, exact_begin, blocks, -(-packed_blocks // blocks), -(-exact_blocks // blocks))


def launch(
    call: AttendCall, multiprocessors: int, lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queues both kernels: `(B, Tq, Hq, D)` in the dtype of `q`, and the log-sum-exps `(B, Hq, Tq)` in float32.

    Args:
        call: no ring with `lengths`: its tokens lie in order from slot 0 on.
        multiprocessors: of the GPU.
        lengths: `(2,)` int32 on the device of `q`, read when the kernels run: how many packed tokens (a multiple of 32)
            and exact tokens there are; Tk is their sum. Those of `call`, the most that there may be, then only say how
            the work is split, so that one captured launch serves all lengths. Beyond them memory is read that is not
            the cache's: nothing can check it here. Without a packed part the first number is not read.

    Raises:
        ValueError: `lengths` of another shape, dtype or device, or beside a ring or sinks.
    """
    if lengths is not None:
        _check_lengths(call, lengths)
    batch, q_heads, q_len, dim = call.q.shape
    kv_heads, heads_per_kv = call.k.shape[1], q_heads // call.k.shape[1]
    rows, padded = heads_per_kv * q_len, max(16, triton.next_power_of_2(dim))
    three_bits = call.packed is not None and 3 in (call.packed.k_bits, call.packed.v_bits)
    tile = tile_for(rows, padded, three_bits, bool(torch.version.hip))
    programs = batch * kv_heads * triton.cdiv(rows, tile.rows)
    splits = splits_for(call, programs, multiprocessors, tile.blocks, lengths is not None)
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
        all_of_them = Splits(0, 0, 2 * tile.blocks, 0, 1)
        _queue_decode(sink_call, sinks.evicted + q_len - 1, None, tile, all_of_them, *last, n_splits)
    merge_splits_kernel[(q_len, q_heads, batch)](
        partial,
        partial_lse,
        call.s_aux,
        out,
        lse,
        n_splits,
        splits.packed,
        q_len,
        HEADS=q_heads,
        HEADS_PER_KV=heads_per_kv,
        D=dim,
        PADDED=padded,
        LOG_SIZE=rotation.size_for(dim).bit_length() - 1,
        MOST=MAX_SPLITS,
        CHUNK=8,
        num_warps=4,
    )
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

    With `n_splits` those are the last of so many splits, and the tokens are sinks: `kv_len` says what is seen of them.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.q, call.k, call.v))
    batch, q_heads, q_len, dim = q.shape
    kv_heads, heads_per_kv = k.shape[1], q_heads // k.shape[1]
    row_tiles = triton.cdiv(heads_per_kv * q_len, tile.rows)
    packed = call.packed
    group = dim if packed is None else dim // packed.v_scale.shape[3]
    decode_attention_kernel[(row_tiles * max(1, splits.packed + splits.exact), kv_heads, batch)](
        q,
        k,
        v,
        call.leftpad,
        lengths,
        *((None,) * 7 if packed is None else packed.arrays()),
        partial,
        partial_lse,
        call.scale,
        call.softcap or 0.0,
        0 if packed is None else packed.start,
        0 if packed is None else packed.tokens,
        splits.block_begin,
        0 if packed is None else packed.tokens // BLOCK,
        0 if packed is None else packed.slot,
        0 if packed is None else packed.k_codes.shape[2],
        splits.exact_begin,
        k.shape[2] if call.tokens is None else call.tokens,
        call.slot,
        k.shape[2],
        kv_len,
        2**31 - 1 if call.window is None else call.window,
        splits.blocks,
        splits.packed,
        partial.shape[2] if n_splits is None else n_splits,
        q_len,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        KV_HEADS=kv_heads,
        HEADS_PER_KV=heads_per_kv,
        D=dim,
        PADDED=max(16, triton.next_power_of_2(dim)),
        ROWS=tile.rows,
        BLOCKS=tile.blocks,
        K_BITS=0 if packed is None else packed.k_bits,
        V_BITS=0 if packed is None else packed.v_bits,
        GROUP=group,
        SPAN=group & -group,
        CAUSAL=call.causal,
        SOFTCAP=call.softcap is not None,
        SINKS=n_splits is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_registers(),
    )


def _check_lengths(call: AttendCall, lengths: torch.Tensor) -> None:
    found, expected = (lengths.shape, lengths.dtype, lengths.device), ((2,), torch.int32, call.q.device)
    if found != expected or not lengths.is_contiguous():
        shape, dtype, device = found
        raise ValueError(f"lengths are {tuple(shape)} {dtype} on {device}, expected (2,) torch.int32 on {expected[2]}")
    if call.sinks is not None:
        raise ValueError("lengths in a tensor are not served beside sinks: what is seen of those is the host's number")
    slots = (call.slot, 0 if call.packed is None else call.packed.slot)
    if slots != (0, 0):
        raise ValueError(f"lengths in a tensor are for tokens in order, not for a ring from slots {slots} on")


def _registers() -> dict[str, int]:
    """Lets a thread have the 255 registers that still leave room for two blocks of 4 warps: without this option the
    assembler spills a few bytes here and there to fit a third. Triton has it for NVIDIA alone."""
    return {} if torch.version.hip else {"maxnreg": 255}


@torch.library.custom_op("hf_kvattn::decode_attention", mutates_args=())
def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    leftpad: torch.Tensor | None,
    packed: list[torch.Tensor | None],
    layout: list[int],
    tokens: int | None,
    slot: int,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: list[torch.Tensor],
    evicted: int,
    s_aux: torch.Tensor | None,
    multiprocessors: int,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`launch` as an op of `torch.library`: the fields of an `AttendCall`, see there and `op_arguments`."""
    call = _call(q, k, v, leftpad, packed, layout, tokens, slot, scale, causal, window, softcap, sinks, evicted)
    call.s_aux = s_aux
    return launch(call, multiprocessors, lengths)


@decode_attention.register_fake
def _(
    q,
    k,
    v,
    leftpad,
    packed,
    layout,
    tokens,
    slot,
    scale,
    causal,
    window,
    softcap,
    sinks,
    evicted,
    s_aux,
    multiprocessors,
    lengths=None,
):
    batch, q_heads, q_len, dim = q.shape
    for tensor in (k, v, leftpad, s_aux, lengths, *packed, *sinks):
        torch._check(tensor is None or tensor.device == q.device, lambda: f"q is on {q.device}, not all others are")
    return q.new_empty(batch, q_len, q_heads, dim), q.new_empty(batch, q_heads, q_len, dtype=torch.float32)


def op_arguments(call: AttendCall) -> tuple:
    """`call` as the arguments of the op.

    `packed` holds a packed part's arrays, `layout` its numbers; `sinks` their k, v, q and perhaps first.
    """
    packed, sinks = call.packed, call.sinks
    return (
        call.q,
        call.k,
        call.v,
        _on_device(call.leftpad, call.q.device),
        [] if packed is None else list(packed.arrays()),
        [] if packed is None else [packed.start, packed.tokens, packed.k_bits, packed.v_bits, packed.slot],
        call.tokens,
        call.slot,
        call.scale,
        call.causal,
        call.window,
        call.softcap,
        []
        if sinks is None
        else [
            sinks.k,
            sinks.v,
            sinks.q,
            *([] if sinks.leftpad is None else [_on_device(sinks.leftpad, call.q.device)]),
        ],
        0 if sinks is None else sinks.evicted,
        call.s_aux,
    )


def _on_device(leftpad: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if leftpad is None else leftpad.to(device, torch.int32)


def _call(q, k, v, leftpad, packed, layout, tokens, slot, scale, causal, window, softcap, sinks, evicted) -> AttendCall:
    """The inverse of `op_arguments`."""
    call = AttendCall(q, k, v, scale, causal, window, softcap, leftpad, tokens=tokens, slot=slot)
    if sinks:
        own_k, own_v, own_q, *own_first = sinks
        call.sinks = SinkKV(own_k, own_v, own_q, evicted, *own_first)
    if layout:
        *numbers, packed_slot = layout
        call.packed = PackedKV(*numbers, *packed)
        call.packed.slot = packed_slot
    return call
