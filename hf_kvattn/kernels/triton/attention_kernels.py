"""The Triton kernels of decode attention over quantized and exact tokens; `attention.py` launches them.

The tokens are split over programs (flash-decoding). A program computes all query rows of its KV head, so that codes
are loaded once. They are dequantized in registers. Scales are loaded once a block and broadcast, never gathered. Some
splits hold packed blocks and the others exact tokens, in the same launch. A second kernel merges the splits and undoes
the rotation of the values.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_words(
    codes_ptr, slot, word, channel, valid,
    KEYS: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """The words of `quant/layout.py`, `(WORDS, PADDED)`, each the codes of four tokens; 0 beyond D. Of values of 3 bits
    a pair: those of the low two bits, and those of the third (with ASM the byte of the two words that share one)."""
    inside = valid[:, None] & (channel < D)[None, :]
    if KEYS:
        at = word[:, None] * D + channel[None, :]
    else:
        at = channel[None, :] * 8 + word[:, None]
    if BITS == 3:
        low = tl.load(codes_ptr + slot[:, None] * (12 * D) + at, mask=inside, other=0)
        at = slot[:, None] * (12 * D) + 8 * D + channel[None, :] * 4 + word[:, None] // 2
        at, _ = tl.split(tl.permute(tl.reshape(at, (WORDS // 2, 2, PADDED)), (0, 2, 1)))
        in_pair = tl.permute(tl.reshape(inside.to(tl.int32), (WORDS // 2, 2, PADDED)), (0, 2, 1))
        inside, _ = tl.split(in_pair)
        third = tl.load(codes_ptr + at, mask=inside > 0, other=0)
        third = tl.reshape(tl.permute(tl.join(third, third), (0, 2, 1)), (WORDS, PADDED))
        if ASM == "":
            third = (third >> (word % 2 * 4).to(tl.uint8)[:, None]) & 15
        words = low, third
    else:
        if BITS == 8:
            codes_ptr = codes_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
        elif BITS == 4:
            codes_ptr = codes_ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
        words = tl.load(codes_ptr + slot[:, None] * (8 * D) + at, mask=inside, other=0)
    return words


@triton.jit
def places(k_widths, kv, group, D: tl.constexpr, PADDED: tl.constexpr, SAME: tl.constexpr):
    """Of the groups of channels of keys the widths, 0 beyond D, and at which byte of a block each begins. So many
    neighbours are the SAME: loads of many bytes need to know."""
    k_widths += kv * (D // 16)
    width = tl.load(k_widths + group, mask=group < D // 16, other=0).to(tl.int32)
    index = tl.arange(0, PADDED // 16)[None, :]
    before = tl.load(k_widths + index, mask=index < D // 16, other=0).to(tl.int32)
    begin = 64 * tl.sum(tl.where(index < group[:, None], before, 0), 1)
    return width, tl.max_constancy(tl.multiple_of(begin, 64), SAME)


@triton.jit
def load_planes(
    codes_ptr, slot, word, width, begin, pair_width, pair_begin, valid,
    BITS: tl.constexpr, ASM: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The words of keys by channel, `(WORDS, PADDED)` each: of the plane of 4 bits, of 2 and of 1 (with ASM the byte of
    the two channels that share one); 0 where a channel has no such plane. `places` says where they are."""
    channel, pair = tl.arange(0, PADDED) % 16, tl.arange(0, PADDED // 2) % 8
    fours = codes_ptr.to(tl.pointer_type(tl.uint16), bitcast=True) + slot[:, None] * (2 * BITS * D)
    at = (begin // 2 + channel)[None, :] + (word * 16)[:, None]
    four = tl.load(fours + at, mask=valid[:, None] & (width & 4 > 0)[None, :], other=0)
    codes_ptr += slot[:, None] * (4 * BITS * D)
    at = (begin + (width & 4) * 64 + channel)[None, :] + (word * 16)[:, None]
    two = tl.load(codes_ptr + at, mask=valid[:, None] & (width & 2 > 0)[None, :], other=0)
    at = (pair_begin + (pair_width & 6) * 64 + pair)[None, :] + (word * 8)[:, None]
    one = tl.load(codes_ptr + at, mask=valid[:, None] & (pair_width & 1 > 0)[None, :], other=0)
    one = tl.reshape(tl.join(one, one), (WORDS, PADDED))
    if ASM == "":
        one = (one >> (channel % 2 * 4).to(tl.uint8)[None, :]) & 15
    return four, two, one


@triton.jit
def load_sides(
    sides_ptr, slot, valid, step, unit, width, D: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """What codes of keys by channel are multiplied with, and what is added, `(BLOCKS, PADDED)` each, in the dtype of
    the keys that are made: `few_bits.py` says how. `step` is of that dtype, `unit` and what is made of it float32."""
    words = sides_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + slot[:, None] * (3 * D // 16)
    index = tl.arange(0, PADDED // 8)[None, :]
    offset = tl.load(words + index, mask=valid[:, None] & (index < D // 8), other=0)
    offset = (offset[:, :, None] >> (tl.arange(0, 8) * 4).to(tl.uint32)[None, None, :]) & 15
    offset = tl.reshape(offset, (BLOCKS, PADDED)).to(tl.int32).to(tl.float32) - 8
    index = tl.arange(0, PADDED // 16)[None, :]
    which = tl.load(words + D // 8 + index, mask=valid[:, None] & (index < D // 16), other=0)
    which = (which[:, :, None] >> (tl.arange(0, 16) * 2).to(tl.uint32)[None, None, :]) & 3
    which = tl.reshape(which, (BLOCKS, PADDED))
    scale = tl.where(which == 0, 0.55, tl.where(which == 1, 0.8, tl.where(which == 2, 1.1, 1.5)))
    scale = (scale * step.to(tl.float32)[None, :]).to(step.dtype)
    # Codes are taken less half their number, which is small and whole, and half a step too much.
    half = tl.where(width > 0, 0.5, 0.0)[None, :] * scale.to(tl.float32)
    return scale, (offset * unit[None, :] + half).to(step.dtype)


@triton.jit
def dequantize_key(planes, width, scale, zero, TOKEN: tl.constexpr, ASM: tl.constexpr):
    """The keys by channel of token TOKEN of each word, in the dtype of `scale`: of codes less half their number
    `code * scale + zero`, rounded once. With ASM `width` is uint8."""
    four, two, one = planes
    if ASM == "":
        x = ((four >> (4 * TOKEN)) & 15).to(tl.int32) | (((two >> (2 * TOKEN)) & 3).to(tl.int32) << (width & 4))
        x = (x | (((one >> TOKEN) & 1).to(tl.int32) << (width & 6))) - ((1 << width) >> 1)
        x = (x.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32)).to(scale.dtype)
    else:
        x = tl.inline_asm_elementwise(
            ASM, "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r", [four, two, one, width, scale, zero, TOKEN],
            dtype=scale.dtype, is_pure=True, pack=4,
        )  # fmt: skip
    return x


@triton.jit
def dequantize(words, scale, TOKEN: tl.constexpr, BITS: tl.constexpr, FLOATS: tl.constexpr, ASM: tl.constexpr):
    """The numbers of token TOKEN of each word, in the dtype of `scale`, of codes that lie around 0; rounded once."""
    if FLOATS:
        x = ((words >> (8 * TOKEN)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        x = (x.to(tl.float32) * scale.to(tl.float32)).to(scale.dtype)
    elif ASM == "":
        if BITS == 3:
            low, third = words
            x = ((low >> (2 * TOKEN)) & 3) | (((third >> TOKEN) & 1) << 2)
        else:
            x = (words >> (BITS * TOKEN)) & (2**BITS - 1)
        ZERO: tl.constexpr = 128 if BITS == 8 else (2**BITS - 1) / 2
        x = ((x.to(tl.int32).to(tl.float32) - ZERO) * scale.to(tl.float32)).to(scale.dtype)
    elif BITS == 8:
        x = tl.inline_asm_elementwise(
            ASM, "=r,r,r,r,r,r", [words, scale, 0x4400 + 0x1111 * TOKEN], dtype=scale.dtype, is_pure=True, pack=2
        )
    elif BITS == 4:
        x = tl.inline_asm_elementwise(ASM, "=r,r,r,r,r", [words, scale, TOKEN], dtype=scale.dtype, is_pure=True, pack=2)
    elif BITS == 3:
        low, third = words
        x = tl.inline_asm_elementwise(
            ASM, "=r,=r,r,r,r,r,r,r,r,r", [low, third, scale, TOKEN], dtype=scale.dtype, is_pure=True, pack=4
        )
    else:
        x = tl.inline_asm_elementwise(
            ASM, "=r,=r,r,r,r,r,r,r,r", [words, scale, TOKEN], dtype=scale.dtype, is_pure=True, pack=4
        )
    return x


@triton.jit
def scales_of(bytes):
    """`few_bits.scales_of`, of numbers below 256."""
    return (bytes.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 1298074214633706907132624082305024.0  # 2**110


@triton.jit
def _scores(
    q, words, scale, zero, width, mean_score, from_first, span, factor, softcap,
    TOKEN: tl.constexpr, BITS: tl.constexpr, FLOATS: tl.constexpr, ASM: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores of token TOKEN of each word of keys, `(rows, words)`, in units of `factor`; -inf where it is not seen."""
    if BITS == 8:
        k = dequantize(words, scale, TOKEN, BITS, FLOATS, ASM)
    else:
        k = dequantize_key(words, width, scale, zero, TOKEN, ASM)
    scores = tl.dot(q, tl.trans(k))
    if SOFTCAP:
        scores = (scores + mean_score[:, None]) * factor
        scores = (softcap * 1.4426950408889634) * (1 - 2 / (tl.exp2(scores * 2.8853900817779268) + 1))
    return tl.where((from_first + TOKEN).to(tl.uint32) < span[:, None], scores, -float("inf"))


@triton.jit
def _spread(
    words, TOKEN: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr,
    WORDS: tl.constexpr, PADDED: tl.constexpr, RUNS: tl.constexpr, REPEATS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The scales of token TOKEN of each word of four, `(WORDS, RUNS, WARPS)`, for all channels. With codes of 8 bits a
    word is int64, else uint32."""
    if BITS == 8:
        if ASM == "":
            x = (words >> (16 * TOKEN)).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            x = tl.inline_asm_elementwise(
                "{.reg .b32 a, b, c, d; mov.b64 {a, b}, $1; mov.b64 {c, d}, $2;"
                " .reg .pred high; setp.ne.u32 high, $3, 0; selp.b32 a, b, a, high; selp.b32 c, d, c, high;"
                " prmt.b32 $0, a, c, $5;}",
                "=r,l,l,r,r,r,r", [words, TOKEN // 2, 0x5410 + TOKEN % 2 * 0x2222],
                dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    elif ASM == "":
        x = scales_of((words >> (8 * TOKEN)) & 255).to(tl.bfloat16)
    else:  # bfloat16 has a byte's bits 4 to 11; times 2**110
        x = tl.inline_asm_elementwise(
            "{.reg .b32 a, b, c; prmt.b32 a, $1, $2, $3; shr.u32 a, a, 4; and.b32 a, a, 0x0ff00ff0;"
            " mov.b32 b, 0x76807680; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, a, b, c;}",
            "=r,r,r,r,r", [words, 0x4400 + TOKEN * 0x1111], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    INNER: tl.constexpr = PADDED // (RUNS * REPEATS * WARPS)
    x = tl.broadcast_to(x[:, :, None, :, None], (WORDS, RUNS, REPEATS, WARPS, INNER))
    return tl.reshape(x, (WORDS, PADDED))


@triton.jit
def _add_values(
    acc, weights, words, scale,
    TOKEN: tl.constexpr, BITS: tl.constexpr, FLOATS: tl.constexpr, ASM: tl.constexpr,
    WORDS: tl.constexpr, PADDED: tl.constexpr, RUNS: tl.constexpr, REPEATS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """`acc` and the values of token TOKEN of each word by their `weights` `(rows, words)`."""
    scale = _spread(scale, TOKEN, BITS, ASM, WORDS, PADDED, RUNS, REPEATS, WARPS).to(weights.dtype)
    v = dequantize(words, scale, TOKEN, BITS, FLOATS, ASM)
    return tl.dot(weights, v, acc)


@triton.jit
def _add_tile(
    scores, v, valid, key, position, leftpad, scale, softcap, window, row_max, row_sum, acc,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in powers of two: keys at the positions `key`, queries at `position`."""
    if SOFTCAP:
        scores = scores * (scale / softcap)
        scores = (softcap * 1.4426950408889634) * (1 - 2 / (tl.exp2(scores * 2.8853900817779268) + 1))
    else:
        scores = scores * (scale * 1.4426950408889634)
    visible = (valid & (key >= leftpad))[None, :] & (key[None, :] > position[:, None] - window)
    if CAUSAL:
        visible = visible & (key[None, :] <= position[:, None])
    scores = tl.where(visible, scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)  # nothing visible yet: avoids inf - inf
    weights = tl.exp2(scores - finite_max[:, None])
    rescale = tl.exp2(row_max - finite_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])
    return new_max, row_sum, acc


@triton.jit
def _share(first, end, split, splits, UNIT: tl.constexpr):
    """The part of [first, end) that split number `split` of `splits` reads: as many UNITs as any other, or one more."""
    units = tl.cdiv(tl.maximum(end - first, 0), UNIT)
    splits = tl.maximum(splits, 1)
    return first + units * split // splits * UNIT, tl.minimum(first + units * (split + 1) // splits * UNIT, end)


@triton.jit(
    do_not_specialize=["start", "packed_tokens", "block_begin", "blocks", "slot", "slots", "exact_begin", "exact"]
    + ["exact_slot", "ring", "kv_len", "window", "split_blocks", "packed_splits", "splits", "q_len"]
)
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, leftpad_ptr,
    lengths_ptr,  # (2,) int32, numbers of packed and exact tokens that replace the host's; or None
    k_codes, k_scale, k_mean, k_step, k_unit, k_order, k_widths, v_codes, v_scale,
    partial_ptr,  # (B, Hkv, splits, G * Tq, D) float32
    lse_ptr,  # (B, Hkv, splits, G * Tq) float32, of base 2
    scale, softcap,
    start, packed_tokens, block_begin, blocks, slot, slots,  # of packed tokens
    exact_begin, exact, exact_slot, ring,  # of exact tokens
    kv_len, window, split_blocks, packed_splits, splits, q_len,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    KV_HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    EXACT_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    GROUP: tl.constexpr, SPAN: tl.constexpr, K_ASM: tl.constexpr, V_ASM: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv = batch * KV_HEADS + head
    row_count = HEADS_PER_KV * q_len
    row_tiles = tl.cdiv(row_count, ROWS)  # neighbouring programs, so that all but the first hit the L2 cache
    split = tl.program_id(0) // row_tiles
    rows = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    row_at = (head * HEADS_PER_KV + rows // q_len).to(tl.int64) * stride_qh + (rows % q_len) * stride_qt
    row_mask = (rows < row_count)[:, None] & (d < D)[None, :]
    BY_CHANNEL: tl.constexpr = K_BITS != 0 and K_BITS != 8
    stored = d  # the channel whose codes lie there
    if BY_CHANNEL:
        stored = tl.load(k_order + kv * D + d, mask=d < D, other=0).to(tl.int32)
        stored = tl.where(split < packed_splits, stored, d)
    q = tl.load(q_ptr + batch * stride_qb + row_at[:, None] + stored[None, :], mask=row_mask, other=0)
    leftpad = 0
    if leftpad_ptr is not None:
        leftpad = tl.load(leftpad_ptr + batch)
    first_visible = leftpad  # no query sees an earlier key; with host lengths the splits begin at the window already
    if lengths_ptr is not None:
        exact = tl.load(lengths_ptr + 1)
        kv_len = exact
        if K_BITS:
            packed_tokens = tl.load(lengths_ptr)
            blocks = packed_tokens // 32
            kv_len += packed_tokens
        first_visible = tl.maximum(tl.maximum(leftpad, kv_len - q_len - window + 1), 0)
    position = kv_len - q_len + rows % q_len

    row_max = tl.full((ROWS,), -float("inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    TILE: tl.constexpr = EXACT_BLOCKS * 32
    added = tl.zeros((ROWS,), tl.float32)  # to all scores of this split
    column = d

    if K_BITS:
        K_FLOATS: tl.constexpr = k_codes.dtype.element_ty == tl.float8e4nv
        V_FLOATS: tl.constexpr = v_codes.dtype.element_ty == tl.float8e4nv
        V_SCALES: tl.constexpr = tl.int64 if V_BITS == 8 else tl.uint32  # of four tokens
        WORDS: tl.constexpr = BLOCKS * 8
        # Each warp multiplies 8 columns of values in turn. They are loaded in an order in which all columns of a warp
        # are neighbouring channels: so it needs the scales of its own channels only.
        WARPS: tl.constexpr = 4 if PADDED >= 32 else 2
        OF_WARP: tl.constexpr = PADDED // WARPS
        channel = d // 8 % WARPS * OF_WARP + d // (8 * WARPS) * 8 + d % 8
        RUNS: tl.constexpr = OF_WARP // SPAN if OF_WARP > SPAN else 1
        REPEATS: tl.constexpr = OF_WARP // 8 // RUNS
        OF_SCALE: tl.constexpr = WARPS if SPAN <= OF_WARP else PADDED // SPAN
        run = (tl.arange(0, OF_SCALE) * (PADDED // OF_SCALE))[None, :] + (tl.arange(0, RUNS) * SPAN)[:, None]

        begin = block_begin + split * split_blocks
        end = tl.minimum(begin + split_blocks, tl.where(split < packed_splits, blocks, 0))
        first = tl.maximum(first_visible - start, 0) // 32 // BLOCKS * BLOCKS
        begin = tl.maximum(begin, first)
        if lengths_ptr is not None:  # what there is, not what there is room for, is shared out
            begin, end = _share(first, tl.where(split < packed_splits, blocks, 0), split, packed_splits, BLOCKS)
        mean = tl.load(k_mean + kv * D + stored, mask=d < D, other=0)
        mean_score = tl.sum(q.to(tl.float32) * mean[None, :], 1)
        # Row i sees `span[i]` tokens from `first[i]` on, counted from `start`; no difference of these overflows.
        first = tl.maximum(tl.maximum(tl.maximum(position, 0) - window + 1, leftpad), start) - start
        last = (
            tl.minimum(position, start + end * 32 - 1) if CAUSAL else tl.zeros_like(position) + (start + end * 32 - 1)
        )
        span = tl.maximum(tl.maximum(last - start, -1) - first + 1, 0).to(tl.uint32)
        if SOFTCAP:
            factor, in_powers = scale / softcap, 1.0
        else:
            factor, in_powers = 1.0, scale * 1.4426950408889634
            added = tl.where(split < packed_splits, mean_score * in_powers, 0.0)
        bits = d
        if BY_CHANNEL:
            step = tl.load(k_step + kv * D + d, mask=d < D, other=0).to(q.dtype)
            unit = tl.load(k_unit + kv * D + d, mask=d < D, other=0).to(tl.float32)
            width, begins = places(k_widths, kv, d // 16, D, PADDED, 16)
            pair_width, pair_begins = places(k_widths, kv, tl.arange(0, PADDED // 2) // 8, D, PADDED, 8)
            bits = tl.broadcast_to((width if K_ASM == "" else width.to(tl.uint8))[None, :], (WORDS, PADDED))
        sums = tl.zeros((ROWS, WORDS), tl.float32)
        index = tl.arange(0, WORDS)
        for at in tl.range(begin, end, BLOCKS):
            block = at + index // 8
            valid = block < end
            at_slot = slot + block
            at_slot = kv * slots + tl.where(at_slot >= slots, at_slot - slots, at_slot)
            k_block = at + tl.arange(0, BLOCKS)
            k_valid = k_block < end
            k_slot = slot + k_block
            k_slot = kv * slots + tl.where(k_slot >= slots, k_slot - slots, k_slot)
            if BY_CHANNEL:
                ks, kz = load_sides(k_scale, k_slot, k_valid, step, unit, width, D, BLOCKS, PADDED)
                # Side by side, since their layouts change: without that each warp would compute all scales anew.
                sides = tl.broadcast_to(tl.join(ks, kz)[:, None, :, :], (BLOCKS, 8, PADDED, 2))
                ks, kz = tl.split(tl.reshape(sides, (WORDS, PADDED, 2)))
                k = load_planes(
                    k_codes, at_slot, index % 8, width, begins, pair_width, pair_begins, valid,
                    K_BITS, K_ASM, D, WORDS, PADDED,
                )  # fmt: skip
            else:
                k_at = k_slot[:, None] * D + d[None, :]
                ks = tl.load(k_scale + k_at, mask=k_valid[:, None] & (d < D)[None, :], other=0).to(q.dtype)
                ks = tl.reshape(tl.broadcast_to(ks[:, None, :], (BLOCKS, 8, PADDED)), (WORDS, PADDED))
                kz = ks
                k = load_words(k_codes, at_slot, index % 8, d, valid, True, K_BITS, K_ASM, D, WORDS, PADDED)
            seen = (at * 32 + index * 4)[None, :] - first[:, None]
            s0 = _scores(
                q, k, ks, kz, bits, mean_score, seen, span, factor, softcap, 0, K_BITS, K_FLOATS, K_ASM, SOFTCAP
            )
            s1 = _scores(
                q, k, ks, kz, bits, mean_score, seen, span, factor, softcap, 1, K_BITS, K_FLOATS, K_ASM, SOFTCAP
            )
            s2 = _scores(
                q, k, ks, kz, bits, mean_score, seen, span, factor, softcap, 2, K_BITS, K_FLOATS, K_ASM, SOFTCAP
            )
            s3 = _scores(
                q, k, ks, kz, bits, mean_score, seen, span, factor, softcap, 3, K_BITS, K_FLOATS, K_ASM, SOFTCAP
            )

            new_max = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 1) * in_powers
            new_max = tl.maximum(row_max, new_max)
            finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)  # nothing visible yet: avoids inf - inf
            rescale = tl.exp2(row_max - finite_max)
            row_max = new_max
            s0 = tl.exp2(s0 * in_powers - finite_max[:, None])
            s1 = tl.exp2(s1 * in_powers - finite_max[:, None])
            s2 = tl.exp2(s2 * in_powers - finite_max[:, None])
            s3 = tl.exp2(s3 * in_powers - finite_max[:, None])
            sums = sums * rescale[:, None] + ((s0 + s1) + (s2 + s3))  # of each row: once, after the loop
            acc = acc * rescale[:, None]

            v = load_words(v_codes, at_slot, index % 8, channel, valid, False, V_BITS, V_ASM, D, WORDS, PADDED)
            v_at = (
                at_slot[:, None, None] * (D // GROUP * 8) + (index % 8)[:, None, None] + (run // GROUP * 8)[None, :, :]
            )
            v_valid = valid[:, None, None] & (run < D)[None, :, :]
            vs = tl.load(v_scale.to(tl.pointer_type(V_SCALES), bitcast=True) + v_at, mask=v_valid, other=0)
            acc = _add_values(
                acc, s0.to(q.dtype), v, vs, 0, V_BITS, V_FLOATS, V_ASM, WORDS, PADDED, RUNS, REPEATS, OF_SCALE
            )
            acc = _add_values(
                acc, s1.to(q.dtype), v, vs, 1, V_BITS, V_FLOATS, V_ASM, WORDS, PADDED, RUNS, REPEATS, OF_SCALE
            )
            acc = _add_values(
                acc, s2.to(q.dtype), v, vs, 2, V_BITS, V_FLOATS, V_ASM, WORDS, PADDED, RUNS, REPEATS, OF_SCALE
            )
            acc = _add_values(
                acc, s3.to(q.dtype), v, vs, 3, V_BITS, V_FLOATS, V_ASM, WORDS, PADDED, RUNS, REPEATS, OF_SCALE
            )
        row_sum = tl.sum(sums, 1)
        column = tl.where(split < packed_splits, channel, d)

    begin = exact_begin + (split - packed_splits) * split_blocks * 32
    end = tl.where(split < packed_splits, begin, tl.minimum(begin + split_blocks * 32, exact))
    if lengths_ptr is not None:
        first = tl.where(first_visible < start, first_visible, tl.maximum(start, first_visible - packed_tokens))
        first = tl.maximum(first, exact - ring)
        end = tl.where(split < packed_splits, 0, exact)
        begin, end = _share(first, end, split - packed_splits, splits - packed_splits, TILE)
    for at in tl.range(begin, end, TILE, num_stages=2):
        token = at + tl.arange(0, TILE)
        valid = token < end
        at_slot = exact_slot + token
        if lengths_ptr is not None:  # of a ring all tokens are counted, those that are gone too
            at_slot = (token % ring).to(tl.int64)
        else:
            at_slot = tl.where(at_slot >= ring, at_slot - ring, at_slot).to(tl.int64)
        mask = valid[:, None] & (d < D)[None, :]
        k_at = k_ptr + batch * stride_kb + head.to(tl.int64) * stride_kh + at_slot[:, None] * stride_kt + d[None, :]
        k = tl.load(k_at, mask=mask, other=0)
        v_at = v_ptr + batch * stride_vb + head.to(tl.int64) * stride_vh + at_slot[:, None] * stride_vt + d[None, :]
        v = tl.load(v_at, mask=mask, other=0)
        scores = tl.dot(q, tl.trans(k))
        key = tl.where(token < start, token, token + packed_tokens)
        if SINKS:
            key += leftpad
        row_max, row_sum, acc = _add_tile(
            scores, v, valid, key, position, leftpad, scale, softcap, window,
            row_max, row_sum, acc, CAUSAL, SOFTCAP,
        )  # fmt: skip

    row = (kv * splits + split) * row_count + rows
    # What is not stored is not merged: its log-sum-exp is -inf.
    row_mask = (rows < row_count)[:, None] & (column < D)[None, :] & (row_sum > 0)[:, None]
    tl.store(partial_ptr + row[:, None] * D + column[None, :], acc / row_sum[:, None], mask=row_mask)
    tl.store(lse_ptr + row, row_max + added + tl.log2(row_sum), mask=rows < row_count)


@triton.jit
def rotate(x, ROWS: tl.constexpr, PADDED: tl.constexpr, LOG_SIZE: tl.constexpr):
    """`quant/rotation.py` on `(ROWS, PADDED)` float32, in blocks of `2**LOG_SIZE` channels, in its order of sums."""
    for i in tl.static_range(LOG_SIZE):
        pairs = tl.permute(tl.reshape(x, (ROWS * PADDED // 2 ** (i + 1), 2, 2**i)), (0, 2, 1))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, PADDED))
    return x * (2**LOG_SIZE) ** -0.5


@triton.jit(do_not_specialize=["splits", "packed_splits", "q_len"])
def merge_splits_kernel(
    partial_ptr, partial_lse_ptr,
    s_aux_ptr,  # (Hq,) scores without values, or None
    out_ptr,  # (B, Tq, Hq, D)
    lse_ptr,  # (B, Hq, Tq) float32, natural
    splits, packed_splits, q_len,
    HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    LOG_SIZE: tl.constexpr, MAX_SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    query, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_count = HEADS_PER_KV * q_len
    kv = batch * (HEADS // HEADS_PER_KV) + head // HEADS_PER_KV
    row = kv * splits * row_count + head % HEADS_PER_KV * q_len + query
    split_index = tl.arange(0, MAX_SPLITS)
    split_lse = tl.load(partial_lse_ptr + row + split_index * row_count, mask=split_index < splits, other=-float("inf"))
    row_max = tl.max(split_lse, 0)
    if s_aux_ptr is not None:
        aux = tl.load(s_aux_ptr + head).to(tl.float32) * 1.4426950408889634
        row_max = tl.maximum(row_max, aux)
    finite_max = tl.where(row_max == -float("inf"), 0.0, row_max)
    row_sum = tl.sum(tl.exp2(split_lse - finite_max), 0)
    if s_aux_ptr is not None:
        row_sum += tl.exp2(aux - finite_max)
    d = tl.arange(0, PADDED)
    packed = tl.zeros((PADDED,), tl.float32)
    exact = tl.zeros((PADDED,), tl.float32)
    for at in tl.range(0, splits, CHUNK):
        split = at + tl.arange(0, CHUNK)
        valid = split < splits
        part = row + split.to(tl.int64) * row_count
        weight = tl.exp2(tl.load(partial_lse_ptr + part, mask=valid, other=-float("inf")) - finite_max)
        mask = (weight > 0)[:, None] & (d < D)[None, :]
        weighted = tl.load(partial_ptr + part[:, None] * D + d[None, :], mask=mask, other=0) * weight[:, None]
        packed += tl.sum(tl.where((split < packed_splits)[:, None], weighted, 0.0), 0)
        exact += tl.sum(tl.where((split < packed_splits)[:, None], 0.0, weighted), 0)
    packed = tl.reshape(rotate(tl.reshape(packed, (1, PADDED)), 1, PADDED, LOG_SIZE), (PADDED,))
    out = (packed + exact) / tl.where(row_sum > 0, row_sum, 1.0)
    out_row = (batch * q_len + query) * HEADS + head
    tl.store(out_ptr + out_row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + (batch * HEADS + head) * q_len + query, (row_max + tl.log2(row_sum)) * 0.6931471805599453)
