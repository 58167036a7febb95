"""Quantizes and packs whole blocks of 32 tokens in Triton, as `quant/` does: one program for each block and KV head.

Codes and scales are those of `quant/` on a CPU bit for bit: the operations and their order are the same, division and
square root are IEEE's, and nothing is contracted into fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...quant import rotation
from ...quant.blocks import Blocks, quantize_blocks
from ...quant.layout import BLOCK
from ...quant.packed import TABLE
from .attention import strides
from .attention_kernels import places, rotate


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for magnitudes below 2**22."""
    return x + 12582912.0 - 12582912.0


@triton.jit
def _quantize(x, members, AXIS: tl.constexpr):
    """`symmetric.quantize` of the numbers in `members` along AXIS, which is kept as 1: codes (float32) and scale."""
    largest = tl.max(tl.where(members, tl.abs(x), 0.0), AXIS, keep_dims=True)
    scale = tl.div_rn(largest, 127.0).to(tl.bfloat16).to(tl.float32)
    codes = tl.where(scale > 0, tl.div_rn(x, tl.where(scale > 0, scale, 1.0)), 0.0)
    return _round(tl.minimum(tl.maximum(codes, -127.0), 127.0)) + 128.0, scale


@triton.jit
def _sum_tokens(x, PADDED: tl.constexpr):
    """`few_bits.tree_sum` of `(32, PADDED)` over its rows: `(1, PADDED)`."""
    for i in tl.static_range(5):
        x = tl.sum(tl.reshape(x, (2, 2 ** (4 - i), PADDED)), 0)  # of two numbers: in any order
    return x


@triton.jit
def _sum_groups(x, GROUPS: tl.constexpr, LOG_GROUP: tl.constexpr):
    """`few_bits.tree_sum` of `(GROUPS, 2**LOG_GROUP)` over its columns: `(GROUPS, 1)`."""
    for i in tl.static_range(LOG_GROUP):
        x = tl.sum(tl.reshape(x, (GROUPS, 2, 2 ** (LOG_GROUP - 1 - i))), 1)
    return x


@triton.jit
def _with_multiplier(y, top, M: tl.constexpr, PADDED: tl.constexpr):
    """Codes of `y` `(32, PADDED)` in steps of M, and of each channel the sum of the fourth powers of their errors."""
    codes = _round(tl.minimum(tl.maximum(y * (1 / M) + top * 0.5, 0.0), top))
    error = (codes - top * 0.5) * M - y
    error = error * error
    return codes, _sum_tokens(error * error, PADDED)


@triton.jit
def _better(best, best_error, which, index, codes, error):
    """The best codes yet, their error, and which ones they are; `codes` are number `index`."""
    better = error < best_error
    return tl.where(better, codes, best), tl.where(better, error, best_error), tl.where(better, index, which)


@triton.jit
def _quantize_keys(x, step, unit, width, PADDED: tl.constexpr):
    """`few_bits.quantize_keys` of `(32, PADDED)`: codes, offset and multiplier, of type int32. The others are
    `(1, PADDED)`."""
    inverse = tl.div_rn(1.0, step)
    w = tl.minimum(tl.maximum(x * inverse, -1048576.0), 1048576.0)
    unit = unit * inverse
    middle = (tl.max(w, 0, keep_dims=True) + tl.min(w, 0, keep_dims=True)) * 0.5
    offset = _round(tl.minimum(tl.maximum(middle * tl.div_rn(1.0, unit), -8.0), 7.0))
    y = w - offset * unit
    top = ((1 << width) - 1).to(tl.float32)
    codes, error = _with_multiplier(y, top, 0.55, PADDED)
    multiplier = width * 0
    codes, error, multiplier = _better(codes, error, multiplier, 1, *_with_multiplier(y, top, 0.8, PADDED))
    codes, error, multiplier = _better(codes, error, multiplier, 2, *_with_multiplier(y, top, 1.1, PADDED))
    codes, error, multiplier = _better(codes, error, multiplier, 3, *_with_multiplier(y, top, 1.5, PADDED))
    return codes.to(tl.int32), offset.to(tl.int32) + 8, multiplier


@triton.jit
def _quantize_values(x, BITS: tl.constexpr, GROUPS: tl.constexpr, LOG_GROUP: tl.constexpr):
    """`few_bits.quantize_values` of `(GROUPS, 2**LOG_GROUP)`: codes (float32) and scale, int32 `(GROUPS, 1)`."""
    x = tl.minimum(tl.maximum(x, -1099511627776.0), 1099511627776.0)  # 2**40
    squares = _sum_groups(x * x, GROUPS, LOG_GROUP)
    STEP: tl.constexpr = 0.9957 if BITS == 2 else 0.586 if BITS == 3 else 0.3352
    step = tl.sqrt_rn(squares * 2.0**-LOG_GROUP) * STEP
    inverse = tl.where(step > 0, tl.div_rn(1.0, step), 0.0)
    HALF: tl.constexpr = (2**BITS - 1) / 2
    codes = _round(tl.minimum(tl.maximum(x * inverse + HALF, 0.0), 2 * HALF))
    along = _sum_groups(x * (codes - HALF), GROUPS, LOG_GROUP)
    scale = tl.where(along > 0, tl.div_rn(squares, along), 0.0)
    rounded = ((scale.to(tl.int32, bitcast=True) + 524288) >> 20) - 880
    return codes, tl.where(rounded < 8, 0, tl.minimum(rounded, 255))


@triton.jit
def _not_finite(x):
    """Whether a number of `x` is infinite or NaN."""
    return tl.max(tl.max((x - x != 0).to(tl.int32), 1), 0) > 0


@triton.jit
def _words(codes, BITS: tl.constexpr, PADDED: tl.constexpr):
    """`(8, PADDED)`, four tokens' codes of BITS each, of `(32, PADDED)`."""
    return tl.sum(tl.reshape(codes, (8, 4, PADDED)) << (BITS * tl.arange(0, 4))[None, :, None], 1)


@triton.jit
def _store_words(to_ptr, codes, KEYS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Packs codes `(32, PADDED)`, int32, into the words of `quant/layout.py`, and stores those of D channels."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    words = _words(codes & (2**LOW - 1), LOW, PADDED)
    low_ptr = to_ptr
    if BITS == 8:
        low_ptr = to_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    elif BITS == 4:
        low_ptr = to_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    word, channel = tl.arange(0, 8)[:, None], tl.arange(0, PADDED)[None, :]
    at = word * D + channel if KEYS else channel * 8 + word
    tl.store(low_ptr + at, words.to(low_ptr.dtype.element_ty), mask=(word < 8) & (channel < D))
    if BITS == 3:  # words of four bits, two in a byte
        low, high = tl.split(tl.permute(tl.reshape(_words(codes >> 2, 1, PADDED), (4, 2, PADDED)), (0, 2, 1)))
        at = 8 * D + channel * 4 + tl.arange(0, 4)[:, None]
        tl.store(to_ptr + at, (low | high << 4).to(tl.uint8), mask=channel < D)


@triton.jit
def _store_planes(to_ptr, codes, width, begin, pair_width, pair_begin, PADDED: tl.constexpr):
    """Packs codes `(32, PADDED)`, int32, of keys by channel, and stores them; `places` says where."""
    word, channel = tl.arange(0, 8)[:, None], (tl.arange(0, PADDED) % 16)[None, :]
    width, begin, pair_width, pair_begin = width[None, :], begin[None, :], pair_width[None, :], pair_begin[None, :]
    fours = to_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + begin // 2 + word * 16 + channel
    tl.store(fours, _words(codes & 15, 4, PADDED).to(tl.int16), mask=width & 4 > 0)
    twos = to_ptr + begin + (width & 4) * 64 + word * 16 + channel
    tl.store(twos, _words((codes >> (width & 4)) & 3, 2, PADDED).to(tl.uint8), mask=width & 2 > 0)
    low, high = tl.split(tl.reshape(_words((codes >> (width & 6)) & 1, 1, PADDED), (8, PADDED // 2, 2)))
    ones = to_ptr + pair_begin + (pair_width & 6) * 64 + word * 8 + (tl.arange(0, PADDED // 2) % 8)[None, :]
    tl.store(ones, (low | high << 4).to(tl.uint8), mask=pair_width & 1 > 0)


@triton.jit
def _store_side(to_ptr, x, BITS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Packs `(1, PADDED)` numbers of BITS into bytes, the first ones in the low bits, and stores those of D channels."""
    EACH: tl.constexpr = 8 // BITS
    packed = tl.sum(tl.reshape(x, (PADDED // EACH, EACH)) << (BITS * tl.arange(0, EACH))[None, :], 1)
    at = tl.arange(0, PADDED // EACH)
    tl.store(to_ptr + at, packed.to(tl.uint8), mask=at < D // EACH)


@triton.jit
def _at(table_ptr, i, like):
    """Address number `i` of a row of the table, as a pointer like `like`."""
    return tl.load(table_ptr + i).to(tl.pointer_type(like.dtype.element_ty))


@triton.jit(do_not_specialize=["slot", "slots", "batches"])
def quantize_blocks_kernel(
    k_ptr, v_ptr, k_mean,
    k_codes, k_scale, k_step, k_unit, k_order, k_widths, v_codes, v_scale,
    finite_ptr,  # (2,) uint8, set to 0 where keys and values are not finite
    table_ptr,  # (jobs, 12) int64, the addresses of each job's tensors in the order above; None for one job
    batches, slot, slots, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, LOG_SIZE: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, GROUP: tl.constexpr, LOG_GROUP: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1).to(tl.int64), (tl.program_id(2) % batches).to(tl.int64)
    if table_ptr is not None:
        row = table_ptr + tl.program_id(2) // batches * 12
        k_ptr, v_ptr, k_mean = _at(row, 0, k_ptr), _at(row, 1, v_ptr), _at(row, 2, k_mean)
        k_codes, k_scale = _at(row, 3, k_codes), _at(row, 4, k_scale)
        if K_BITS != 8:
            k_step, k_unit = _at(row, 5, k_step), _at(row, 6, k_unit)
            k_order, k_widths = _at(row, 7, k_order), _at(row, 8, k_widths)
        v_codes, v_scale = _at(row, 9, v_codes), _at(row, 10, v_scale)
        finite_ptr = _at(row, 11, finite_ptr)
    kv, at_slot = batch * KV_HEADS + head, (slot + tl.program_id(0)) % slots
    block = kv * slots + at_slot
    token = (tl.program_id(0) * 32 + tl.arange(0, 32)).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = (d < D)[None, :]

    stored = d  # the channel whose codes lie there
    if K_BITS != 8:
        stored = tl.load(k_order + kv * D + d, mask=d < D, other=0).to(tl.int32)
    at = k_ptr + batch * stride_kb + head * stride_kh + token[:, None] * stride_kt + stored[None, :]
    x = tl.load(at, mask=inside, other=0).to(tl.float32)
    tl.store(finite_ptr, 0, mask=_not_finite(x))
    x = x - tl.load(k_mean + kv * D + stored, mask=d < D, other=0)[None, :]
    k_codes += block * (4 * K_BITS * D)
    if K_BITS == 8:
        codes, scale = _quantize(x, inside, 0)
        _store_words(k_codes, codes.to(tl.int32), True, K_BITS, D, PADDED)
        tl.store(k_scale + block * D + d[None, :], scale.to(tl.bfloat16), mask=inside)
    else:
        step = tl.load(k_step + kv * D + d[None, :], mask=inside, other=1).to(tl.float32)
        unit = tl.load(k_unit + kv * D + d[None, :], mask=inside, other=1).to(tl.float32)
        width, begin = places(k_widths, kv, d // 16, D, PADDED, 16)
        pair_width, pair_begin = places(k_widths, kv, tl.arange(0, PADDED // 2) // 8, D, PADDED, 8)
        codes, offset, multiplier = _quantize_keys(x, step, unit, width[None, :], PADDED)
        _store_planes(k_codes, codes, width, begin, pair_width, pair_begin, PADDED)
        _store_side(k_scale + block * (D // 4 * 3), offset, 4, D, PADDED)
        _store_side(k_scale + block * (D // 4 * 3) + D // 2, multiplier, 2, D, PADDED)

    at = v_ptr + batch * stride_vb + head * stride_vh + token[:, None] * stride_vt + d[None, :]
    x = tl.load(at, mask=inside, other=0).to(tl.float32)
    tl.store(finite_ptr + 1, 0, mask=_not_finite(x))
    x = rotate(x, 32, PADDED, LOG_SIZE)
    if V_BITS == 8:
        codes = tl.zeros((32, PADDED), tl.float32)
        for group in tl.range(0, D // GROUP):
            members = (d // GROUP == group)[None, :]
            group_codes, group_scale = _quantize(x, members, 1)
            codes = tl.where(members, group_codes, codes)
            at_token = (block * (D // GROUP) + group) * 32 + tl.arange(0, 32)[:, None]
            tl.store(v_scale + at_token, group_scale.to(tl.bfloat16))
    else:
        GROUPS: tl.constexpr = PADDED // GROUP
        codes, scale = _quantize_values(tl.reshape(x, (32 * GROUPS, GROUP)), V_BITS, 32 * GROUPS, LOG_GROUP)
        codes, group = tl.reshape(codes, (32, PADDED)), tl.arange(0, GROUPS)[None, :]
        at_token = (block * (D // GROUP) + group) * 32 + tl.arange(0, 32)[:, None]
        tl.store(v_scale + at_token, tl.reshape(scale, (32, GROUPS)).to(tl.uint8), mask=group < D // GROUP)
    _store_words(v_codes + block * (4 * V_BITS * D), codes.to(tl.int32), False, V_BITS, D, PADDED)


def launch(jobs: Sequence[Blocks]) -> torch.Tensor:
    """Queues the kernel, once for all jobs that are alike but for their tensors: those of a model's layers.

    Returns:
        `(jobs, 2)` uint8 on the GPU: whether keys and values are finite.
    """
    finite = torch.ones((len(jobs), 2), dtype=torch.uint8, device=jobs[0].k.device)
    alike: dict[tuple, list[tuple]] = {}
    for job, answer in zip(jobs, finite, strict=True):
        k, v, into, slot = job
        group = k.shape[-1] // into.v_scale.shape[3]
        if into.v_codec.by_channel and group & (group - 1):  # the kernel's sums are those of powers of two
            made = quantize_blocks([job])
            if made is not None:
                answer.copy_(made[0])
            continue
        k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
        codecs, groups = (into.k_codec, into.v_codec), into.v_scale.shape[3]
        kind = (k.shape, k.dtype, k.stride(), v.dtype, v.stride(), slot, into.k_codes.shape[2], codecs, groups)
        arrays = [getattr(into, name) for name in _ARRAYS]
        alike.setdefault(kind, []).append((k, v, *arrays, answer))
    for (shape, _, _, _, _, slot, slots, codecs, groups), tensors in alike.items():
        _queue(tensors, shape, slot, slots, [codec.bits for codec in codecs], groups)
    return finite


_ARRAYS = ("k_mean", "k_codes", "k_scale", *TABLE, "v_codes", "v_scale")
_TENSORS = ("k_ptr", "v_ptr", *_ARRAYS, "finite_ptr")


def _queue(
    tensors: list[tuple], shape: tuple[int, ...], slot: int, slots: int, bits: Sequence[int], groups: int
) -> None:
    """One launch for the blocks `(B, Hkv, n * 32, D)` of some layers, each with the kernel's tensors in its order."""
    batch, kv_heads, tokens, dim = shape
    first, table, group = tensors[0], None, dim // groups
    if len(tensors) > 1:  # pinned: the copy does not wait for the GPU
        addresses = [[0 if t is None else t.data_ptr() for t in each] for each in tensors]
        pinned = torch.tensor(addresses, device="cpu", pin_memory=first[0].is_cuda)
        table = pinned.to(first[0].device, non_blocking=True)
    quantize_blocks_kernel[(tokens // BLOCK, kv_heads, batch * len(tensors))](
        **dict(zip(_TENSORS, first, strict=True)), table_ptr=table, batches=batch, slot=slot, slots=slots,
        **strides(k=first[0], v=first[1]),
        KV_HEADS=kv_heads, D=dim, PADDED=triton.next_power_of_2(dim), GROUP=group,
        LOG_GROUP=group.bit_length() - 1, LOG_SIZE=rotation.size_for(dim).bit_length() - 1,
        K_BITS=bits[0], V_BITS=bits[1],
        num_warps=4 if dim <= 128 else 8 if torch.version.hip else 16,  # of 64 and of 32 threads; none spills
        enable_fp_fusion=False,
    )  # fmt: skip
