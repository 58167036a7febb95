"""Quantizes and packs whole blocks of 32 tokens in Triton, as `quant/` does: one program for each block and KV head.

Codes, scales and zeros are those of `quant/` on a CPU bit for bit: the operations and their order are the same,
division is IEEE's, and nothing is contracted into fused multiply-adds. It serves 8 and 4 bits. With 3 and 2 bits each
group's range is searched for, which stays with PyTorch's operations: unrolled into this kernel it spills registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...quant import rotation
from ...quant.blocks import Blocks
from ...quant.layout import BLOCK
from .attention import strides
from .attention_kernels import rotate


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for magnitudes below 2**22."""
    return x + 12582912.0 - 12582912.0


@triton.jit
def _quantize(x, members, AXIS: tl.constexpr, BITS: tl.constexpr):
    """`codecs.quantize` of the numbers in `members` along AXIS, which is kept as 1: codes (float32), scale and zero."""
    if BITS == 8:
        largest = tl.max(tl.where(members, tl.abs(x), 0.0), AXIS, keep_dims=True)
        scale = tl.div_rn(largest, 127.0).to(tl.bfloat16).to(tl.float32)
        codes = tl.where(scale > 0, tl.div_rn(x, tl.where(scale > 0, scale, 1.0)), 0.0)
        return _round(tl.minimum(tl.maximum(codes, -127.0), 127.0)) + 128.0, scale, scale
    else:
        low = tl.min(tl.where(members, x, float("inf")), AXIS, keep_dims=True)
        high = tl.max(tl.where(members, x, -float("inf")), AXIS, keep_dims=True)
        zero = low.to(tl.bfloat16).to(tl.float32)
        scale = tl.div_rn(tl.maximum(high - zero, 0.0), 15.0).to(tl.bfloat16).to(tl.float32)
        codes = tl.where(scale > 0, tl.div_rn(x - zero, tl.where(scale > 0, scale, 1.0)), 0.0)
        return _round(tl.minimum(tl.maximum(codes, 0.0), 15.0)), scale, zero


@triton.jit
def _not_finite(x):
    """Whether a number of `x` is infinite or NaN."""
    return tl.max(tl.max((x - x != 0).to(tl.int32), 1), 0) > 0


@triton.jit
def _store_words(to_ptr, codes, KEYS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Packs codes `(32, PADDED)`, float32, into the words of `quant/layout.py`, and stores those of D channels."""
    shift = (BITS * tl.arange(0, 4))[None, :, None]
    words = tl.sum(tl.reshape(codes.to(tl.int32), (8, 4, PADDED)) << shift, 1)
    if BITS == 8:
        to_ptr = to_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        to_ptr = to_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    word, channel = tl.arange(0, 8)[:, None], tl.arange(0, PADDED)[None, :]
    at = word * D + channel if KEYS else channel * 8 + word
    tl.store(to_ptr + at, words.to(to_ptr.dtype.element_ty), mask=(word < 8) & (channel < D))


@triton.jit
def _at(table_ptr, i, like):
    """Address number `i` of a row of the table, as a pointer like `like`."""
    return tl.load(table_ptr + i).to(tl.pointer_type(like.dtype.element_ty))


@triton.jit(do_not_specialize=["slot", "slots", "batches"])
def quantize_blocks_kernel(
    k_ptr, v_ptr, k_mean,
    k_codes, k_scale, k_zero, v_codes, v_scale, v_zero,
    finite_ptr,  # (2,) uint8, set to 0 where keys and values are not finite
    table_ptr,  # (jobs, 10) int64, the addresses of each job's tensors in the order above; None for one job
    batches, slot, slots, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, LOG_SIZE: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1).to(tl.int64), (tl.program_id(2) % batches).to(tl.int64)
    if table_ptr is not None:
        row = table_ptr + tl.program_id(2) // batches * 10
        k_ptr, v_ptr, k_mean = _at(row, 0, k_ptr), _at(row, 1, v_ptr), _at(row, 2, k_mean)
        k_codes, k_scale = _at(row, 3, k_codes), _at(row, 4, k_scale)
        v_codes, v_scale = _at(row, 6, v_codes), _at(row, 7, v_scale)
        if K_BITS != 8:
            k_zero = _at(row, 5, k_zero)
        if V_BITS != 8:
            v_zero = _at(row, 8, v_zero)
        finite_ptr = _at(row, 9, finite_ptr)
    kv, at_slot = batch * KV_HEADS + head, (slot + tl.program_id(0)) % slots
    block = kv * slots + at_slot
    token = (tl.program_id(0) * 32 + tl.arange(0, 32)).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = (d < D)[None, :]

    at = k_ptr + batch * stride_kb + head * stride_kh + token[:, None] * stride_kt + d[None, :]
    x = tl.load(at, mask=inside, other=0).to(tl.float32)
    tl.store(finite_ptr, 0, mask=_not_finite(x))
    x = x - tl.load(k_mean + kv * D + d, mask=d < D, other=0)[None, :]
    codes, scale, zero = _quantize(x, inside, 0, K_BITS)
    _store_words(k_codes + block * (4 * K_BITS * D), codes, True, K_BITS, D, PADDED)
    channel = d[None, :]
    tl.store(k_scale + block * D + channel, scale.to(tl.bfloat16), mask=inside)
    if K_BITS != 8:
        tl.store(k_zero + block * D + channel, zero.to(tl.bfloat16), mask=inside)

    at = v_ptr + batch * stride_vb + head * stride_vh + token[:, None] * stride_vt + d[None, :]
    x = tl.load(at, mask=inside, other=0).to(tl.float32)
    tl.store(finite_ptr + 1, 0, mask=_not_finite(x))
    x = rotate(x, 32, PADDED, LOG_SIZE)
    all_codes = tl.zeros((32, PADDED), tl.float32)
    for group in tl.range(0, D // GROUP):
        members = (d // GROUP == group)[None, :]
        group_codes, group_scale, group_zero = _quantize(x, members, 1, V_BITS)
        all_codes = tl.where(members, group_codes, all_codes)
        at_token = (block * (D // GROUP) + group) * 32 + tl.arange(0, 32)[:, None]
        tl.store(v_scale + at_token, group_scale.to(tl.bfloat16))
        if V_BITS != 8:
            tl.store(v_zero + at_token, group_zero.to(tl.bfloat16))
    _store_words(v_codes + block * (4 * V_BITS * D), all_codes, False, V_BITS, D, PADDED)


def launch(jobs: Sequence[Blocks]) -> torch.Tensor:
    """Queues the kernel, once for all jobs that are alike but for their tensors: those of a model's layers.

    Returns:
        `(jobs, 2)` uint8 on the GPU: whether keys and values are finite.
    """
    finite = torch.ones((len(jobs), 2), dtype=torch.uint8, device=jobs[0].k.device)
    alike: dict[tuple, list[tuple]] = {}
    for (k, v, into, slot), answer in zip(jobs, finite, strict=True):
        k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
        codecs, groups = (into.k_codec, into.v_codec), into.v_scale.shape[3]
        kind = (k.shape, k.dtype, k.stride(), v.dtype, v.stride(), slot, into.k_codes.shape[2], codecs, groups)
        arrays = (into.k_codes, into.k_scale, into.k_zero, into.v_codes, into.v_scale, into.v_zero)
        alike.setdefault(kind, []).append((k, v, into.k_mean, *arrays, answer))
    for (shape, _, _, _, _, slot, slots, codecs, groups), tensors in alike.items():
        _queue(tensors, shape, slot, slots, [codec.bits for codec in codecs], groups)
    return finite


_TENSORS = ("k_ptr", "v_ptr", "k_mean", "k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero", "finite_ptr")


def _queue(
    tensors: list[tuple], shape: tuple[int, ...], slot: int, slots: int, bits: Sequence[int], groups: int
) -> None:
    """One launch for the blocks `(B, Hkv, n * 32, D)` of some layers, each with the kernel's tensors in its order."""
    batch, kv_heads, tokens, dim = shape
    first, table = tensors[0], None
    if len(tensors) > 1:  # pinned: the copy does not wait for the GPU
        addresses = [[0 if t is None else t.data_ptr() for t in each] for each in tensors]
        pinned = torch.tensor(addresses, device="cpu", pin_memory=first[0].is_cuda)
        table = pinned.to(first[0].device, non_blocking=True)
    quantize_blocks_kernel[(tokens // BLOCK, kv_heads, batch * len(tensors))](
        **dict(zip(_TENSORS, first, strict=True)), table_ptr=table, batches=batch, slot=slot, slots=slots,
        **strides(k=first[0], v=first[1]),
        KV_HEADS=kv_heads, D=dim, PADDED=triton.next_power_of_2(dim), GROUP=dim // groups,
        LOG_SIZE=rotation.size_for(dim).bit_length() - 1, K_BITS=bits[0], V_BITS=bits[1],
        num_warps=4 if dim <= 128 else 8 if torch.version.hip else 16,  # of 64 and of 32 threads; none spills
        enable_fp_fusion=False,
    )  # fmt: skip
