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
def _load_3_bits(codes_ptr, slot, valid, BLOCKS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """`_load_units` of 3 bits: for 16 channels, 128 bytes hold the low two bits of each code and 64 bytes the third."""
    count: tl.constexpr = BLOCKS * PADDED // 16
    channels = tl.arange(0, PADDED // 16)[None, :]
    at = tl.reshape((slot * (12 * D))[:, None] + channels * 192, (count, 1))
    mask = tl.reshape(valid[:, None] & (channels < D // 16), (count, 1))
    low = tl.reshape(tl.load(codes_ptr + at + tl.arange(0, 128)[None, :], mask=mask, other=0), (count, 2, 1, 64))
    low = (low >> (2 * tl.arange(0, 4)).to(tl.uint8)[None, None, :, None]) & 3
    third = tl.expand_dims(tl.load(codes_ptr + at + 128 + tl.arange(0, 64)[None, :], mask=mask, other=0), 1)
    third = (third >> tl.arange(0, 8).to(tl.uint8)[None, :, None]) & 1
    return tl.reshape(low, (count, 8, 64)) | (third << 2)


@triton.jit
def _load_units(
    codes_ptr, slot, valid, BLOCKS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr
):
    """The unpacked codes of some blocks in the units of `quant/layout.py`, `(BLOCKS * PADDED / 2, 64)`; 0 beyond D."""
    if BITS == 3:
        units = _load_3_bits(codes_ptr, slot, valid, BLOCKS, D, PADDED)
    else:
        at = tl.arange(0, 4 * BITS * PADDED)[None, :]
        mask = valid[:, None] & (at < 4 * BITS * D)
        floats: tl.constexpr = codes_ptr.dtype.element_ty == tl.float8e4nv
        units = tl.load(codes_ptr + (slot * (4 * BITS * D))[:, None] + at, mask=mask, other=0.0 if floats else 0)
        if not floats:
            units = tl.reshape(units, (BLOCKS * PADDED * BITS // 16, 1, 64))
            units = (units >> (BITS * tl.arange(0, 8 // BITS)).to(tl.uint8)[None, :, None]) & (2**BITS - 1)
    return tl.reshape(units, (BLOCKS * PADDED // 2, 64))


@triton.jit
def _load_keys(
    codes_ptr, scale_ptr, zero_ptr, slot, valid,
    BLOCKS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """float32 keys of some blocks without their mean, `(BLOCKS * 32, PADDED)`."""
    units = _load_units(codes_ptr, slot, valid, BLOCKS, BITS, D, PADDED)
    lanes = tl.reshape(units, (BLOCKS, PADDED // 4, 2, 16, 4))  # block, channels, half, token, channel
    x = tl.reshape(tl.permute(lanes, (0, 2, 3, 1, 4)), (BLOCKS, 32, PADDED)).to(tl.float32)
    d = tl.arange(0, PADDED)
    at, mask = slot[:, None] * D + d[None, :], valid[:, None] & (d[None, :] < D)
    scale = tl.load(scale_ptr + at, mask=mask, other=0).to(tl.float32)[:, None, :]
    if codes_ptr.dtype.element_ty == tl.float8e4nv:
        x = x * scale
    elif BITS == 8:
        x = (x - 128) * scale
    else:
        x = x * scale + tl.load(zero_ptr + at, mask=mask, other=0).to(tl.float32)[:, None, :]
    return tl.reshape(x, (BLOCKS * 32, PADDED))


@triton.jit
def _load_values(
    codes_ptr, scale_ptr, zero_ptr, slot, valid,
    BLOCKS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
    PADDED: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """float32 rotated values of some blocks, `(BLOCKS * 32, PADDED)`; SPAN: largest power of two that divides GROUP."""
    units = _load_units(codes_ptr, slot, valid, BLOCKS, BITS, D, PADDED)
    lanes = tl.reshape(units, (BLOCKS, PADDED // 16, 8, 16, 4))  # block, channels, tokens, channel, token
    spans: tl.constexpr = PADDED // SPAN
    x = tl.reshape(tl.permute(lanes, (0, 2, 4, 1, 3)), (BLOCKS, 32, spans, SPAN)).to(tl.float32)
    channel = tl.arange(0, spans)[None, :, None] * SPAN
    at = (slot * (D // GROUP * 32))[:, None, None] + channel // GROUP * 32 + tl.arange(0, 32)[None, None, :]
    mask = valid[:, None, None] & (channel < D)
    scale = tl.load(scale_ptr + at, mask=mask, other=0).to(tl.float32)
    scale = tl.expand_dims(tl.permute(scale, (0, 2, 1)), 3)
    if codes_ptr.dtype.element_ty == tl.float8e4nv:
        x = x * scale
    elif BITS == 8:
        x = (x - 128) * scale
    else:
        zero = tl.load(zero_ptr + at, mask=mask, other=0).to(tl.float32)
        x = x * scale + tl.expand_dims(tl.permute(zero, (0, 2, 1)), 3)
    return tl.reshape(x, (BLOCKS * 32, PADDED))


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
    k_codes, k_scale, k_zero, k_mean, v_codes, v_scale, v_zero,
    partial_ptr,  # (B, Hkv, splits, G * Tq, D) float32
    lse_ptr,  # (B, Hkv, splits, G * Tq) float32, of base 2
    scale, softcap,
    start, packed_tokens, block_begin, blocks, slot, slots,  # of packed tokens
    exact_begin, exact, exact_slot, ring,  # of exact tokens
    kv_len, window, split_blocks, packed_splits, splits, q_len,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    KV_HEADS: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
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
    q = tl.load(q_ptr + batch * stride_qb + row_at[:, None] + d[None, :], mask=row_mask, other=0)
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
    TILE: tl.constexpr = BLOCKS * 32

    if K_BITS:
        begin = block_begin + split * split_blocks
        end = tl.minimum(begin + split_blocks, tl.where(split < packed_splits, blocks, 0))
        first = tl.maximum(first_visible - start, 0) // 32 // BLOCKS * BLOCKS
        begin = tl.maximum(begin, first)
        if lengths_ptr is not None:  # what there is, not what there is room for, is shared out
            begin, end = _share(first, tl.where(split < packed_splits, blocks, 0), split, packed_splits, BLOCKS)
        mean = tl.load(k_mean + kv * D + d, mask=d < D, other=0)
        mean_score = tl.sum(q.to(tl.float32) * mean[None, :], 1)
        for at in tl.range(begin, end, BLOCKS):
            block = at + tl.arange(0, BLOCKS)
            valid = block < end
            at_slot = slot + block
            at_slot = kv * slots + tl.where(at_slot >= slots, at_slot - slots, at_slot)
            k = _load_keys(k_codes, k_scale, k_zero, at_slot, valid, BLOCKS, K_BITS, D, PADDED).to(q.dtype)
            v = _load_values(v_codes, v_scale, v_zero, at_slot, valid, BLOCKS, V_BITS, D, PADDED, GROUP, SPAN)
            scores = tl.dot(q, tl.trans(k)) + mean_score[:, None]
            token = at * 32 + tl.arange(0, TILE)
            row_max, row_sum, acc = _add_tile(
                scores, v.to(q.dtype), token < end * 32, start + token, position, leftpad, scale, softcap, window,
                row_max, row_sum, acc, CAUSAL, SOFTCAP,
            )  # fmt: skip

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
    row_mask = row_mask & (row_sum > 0)[:, None]  # what is not stored is not merged: its log-sum-exp is -inf
    tl.store(partial_ptr + row[:, None] * D + d[None, :], acc / row_sum[:, None], mask=row_mask)
    tl.store(lse_ptr + row, row_max + tl.log2(row_sum), mask=rows < row_count)


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
