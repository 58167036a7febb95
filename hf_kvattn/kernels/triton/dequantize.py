"""A layer's keys and values, quantized and exact, written out in order: what a long chunk of queries reads.

One program for each block of 32 tokens and KV head. Values are turned back.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ...quant import rotation
from ...quant.layout import BLOCK
from ...quant.packed import ARRAYS
from ..call import AttendCall
from .attention import strides
from .attention_kernels import (
    dequantize,
    dequantize_key,
    half_of,
    load_planes,
    load_sides,
    load_words,
    places,
    rotate,
    scales_of,
)


@triton.jit(do_not_specialize=["start", "packed_tokens", "slot", "slots", "exact"])
def dequantize_kernel(
    k_ptr, v_ptr, k_out, v_out,  # (B, Hkv, Tk, D) the last two
    k_codes, k_scale, k_mean, k_step, k_unit, k_order, k_widths, v_codes, v_scale,
    start, packed_tokens, slot, slots, exact,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, LOG_SIZE: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kv = batch * KV_HEADS + head
    d = tl.arange(0, PADDED)
    inside = (d < D)[None, :]
    if block * 32 < packed_tokens:
        word = tl.arange(0, 8)
        at_slot = slot + block
        at_slot = kv * slots + tl.where(at_slot >= slots, at_slot - slots, at_slot) + word * 0
        every = word >= 0
        v = load_words(v_codes, at_slot, word, d, every, False, V_BITS, "", D, 8, PADDED)
        stored = d  # the channel whose codes lie there
        if K_BITS == 8:
            k = load_words(k_codes, at_slot, word, d, every, True, K_BITS, "", D, 8, PADDED)
            ks = tl.load(k_scale + at_slot[:, None] * D + d[None, :], mask=inside, other=0).to(tl.float32)
        else:
            stored = tl.load(k_order + kv * D + d, mask=d < D, other=0).to(tl.int32)
            step = tl.load(k_step + kv * D + d, mask=d < D, other=0).to(tl.float32)
            unit = tl.load(k_unit + kv * D + d, mask=d < D, other=0).to(tl.float32)
            width, begin = places(k_widths, kv, d // 16, D, PADDED, 16)
            pair_width, pair_begin = places(k_widths, kv, tl.arange(0, PADDED // 2) // 8, D, PADDED, 8)
            k = load_planes(
                k_codes, at_slot, word, width, begin, pair_width, pair_begin, every, K_BITS, "", D, 8, PADDED
            )
            ks, kz = load_sides(k_scale, at_slot, every, step, unit, width, D, 8, PADDED)
        mean = tl.load(k_mean + kv * D + stored, mask=d < D, other=0)[None, :]
        at = at_slot[:, None] * (D // GROUP * 32) + (d // GROUP * 32)[None, :] + word[:, None] * 4
        K_FLOATS: tl.constexpr = k_codes.dtype.element_ty == tl.float8e4nv
        V_FLOATS: tl.constexpr = v_codes.dtype.element_ty == tl.float8e4nv
        for token in tl.static_range(4):
            to = kv * (packed_tokens + exact) + (start + block * 32 + word * 4 + token)
            to = to[:, None] * D
            if K_BITS == 8:
                x = dequantize(k, ks, token, K_BITS, K_FLOATS, "")
            else:
                x = dequantize_key(k, width[None, :], half_of(width)[None, :], ks, kz, token, "")
            tl.store(k_out + to + stored[None, :], (x + mean).to(k_out.dtype.element_ty), mask=inside)
            vs = tl.load(v_scale + at + token, mask=inside, other=0)
            vs = vs.to(tl.float32) if V_BITS == 8 else scales_of(vs)
            x = rotate(dequantize(v, vs, token, V_BITS, V_FLOATS, ""), 8, PADDED, LOG_SIZE)
            tl.store(v_out + to + d[None, :], x.to(v_out.dtype.element_ty), mask=inside)
    else:
        row = block * 32 - packed_tokens + tl.arange(0, 32)
        there = inside & (row < exact)[:, None]
        copied = kv * (packed_tokens + exact) + tl.where(row < start, row, row + packed_tokens)
        copied = copied[:, None] * D + d[None, :]
        row_at = row.to(tl.int64)[:, None]
        from_k = k_ptr + batch * stride_kb + head * stride_kh + row_at * stride_kt + d[None, :]
        tl.store(k_out + copied, tl.load(from_k, mask=there, other=0), mask=there)
        from_v = v_ptr + batch * stride_vb + head * stride_vh + row_at * stride_vt + d[None, :]
        tl.store(v_out + copied, tl.load(from_v, mask=there, other=0), mask=there)


def dense(call: AttendCall) -> AttendCall:
    """`call` over dense keys and values of its dtype, `(B, Hkv, Tk, D)`: queues the kernel that writes them."""
    packed = call.packed
    assert packed is not None
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.k, call.v))
    batch, kv_heads, exact, dim = k.shape
    k_out, v_out = (torch.empty((batch, kv_heads, call.kv_len, dim), dtype=k.dtype, device=k.device) for _ in "kv")
    dequantize_kernel[(packed.tokens // BLOCK + triton.cdiv(exact, BLOCK), kv_heads, batch)](
        k_ptr=k, v_ptr=v, k_out=k_out, v_out=v_out, **dict(zip(ARRAYS, packed.arrays(), strict=True)),
        start=packed.start, packed_tokens=packed.tokens, slot=packed.slot, slots=packed.k_codes.shape[2],
        exact=exact, **strides(k=k, v=v),
        KV_HEADS=kv_heads, D=dim, PADDED=max(16, triton.next_power_of_2(dim)), GROUP=dim // packed.v_scale.shape[3],
        LOG_SIZE=rotation.size_for(dim).bit_length() - 1, K_BITS=packed.k_codec.bits, V_BITS=packed.v_codec.bits,
        num_warps=4,
    )  # fmt: skip
    return replace(call, k=k_out, v=v_out, packed=None)
