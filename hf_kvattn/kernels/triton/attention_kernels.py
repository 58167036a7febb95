"""The Triton kernels of decode attention over quantized and exact tokens; `attention.py` launches them.

The tokens are split over programs (flash-decoding), each of which serves all query rows of its KV head: codes are
loaded once, as they lie in memory, and become numbers in registers. Their scales are loaded once a block and spread by
broadcasting, never gathered. Some splits hold packed blocks, the others exact tokens, in the same launch. A second
kernel merges them and undoes the rotation of the values.

This module needs triton and is imported when the first call comes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_3_bits(codes, slot, there, BLOCKS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """`_load_units` of 3 bits: of 16 channels, 128 bytes hold the low two bits and 64 more the third ones."""
    count: tl.constexpr = BLOCKS * PADDED // 16
    channels = tl.arange(0, PADDED // 16)[None, :]
    at = tl.reshape((slot * (12 * D))[:, None] + channels * 192, (count, 1))
    mask = tl.reshape(there[:, None] & (channels < D // 16), (count, 1))
    low = tl.reshape(tl.load(codes + at + tl.arange(0, 128)[None, :], mask=mask, other=0), (count, 2, 1, 64))
    low = (low >> (2 * tl.arange(0, 4)).to(tl.uint8)[None, None, :, None]) & 3
    third = tl.expand_dims(tl.load(codes + at + 128 + tl.arange(0, 64)[None, :], mask=mask, other=0), 1)
    third = (third >> tl.arange(0, 8).to(tl.uint8)[None, :, None]) & 1
    return tl.reshape(low, (count, 8, 64)) | (third << 2)


@triton.jit
def _load_units(codes, slot, there, BLOCKS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """The units of `quant/layout.py` of some blocks, one code a number: `(BLOCKS * PADDED / 2, 64)`; zeros beyond D."""
    if BITS == 3:
        units = _load_3_bits(codes, slot, there, BLOCKS, D, PADDED)
    else:
        at = tl.arange(0, 4 * BITS * PADDED)[None, :]
        mask = there[:, None] & (at < 4 * BITS * D)
        floats: tl.constexpr = codes.dtype.element_ty == tl.float8e4nv
        units = tl.load(codes + (slot * (4 * BITS * D))[:, None] + at, mask=mask, other=0.0 if floats else 0)
        if not floats:
            units = tl.reshape(units, (BLOCKS * PADDED * BITS // 16, 1, 64))
            units = (units >> (BITS * tl.arange(0, 8 // BITS)).to(tl.uint8)[None, :, None]) & (2**BITS - 1)
    return tl.reshape(units, (BLOCKS * PADDED // 2, 64))


@triton.jit
def _load_keys(
    codes, scale, zero, slot, there, BLOCKS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr
):
    """float32 keys of some blocks without their mean, `(BLOCKS * 32, PADDED)`."""
    units = _load_units(codes, slot, there, BLOCKS, BITS, D, PADDED)
    lanes = tl.reshape(units, (BLOCKS, PADDED // 4, 2, 16, 4))  # block, channels, half, token, channel
    x = tl.reshape(tl.permute(lanes, (0, 2, 3, 1, 4)), (BLOCKS, 32, PADDED)).to(tl.float32)
    d = tl.arange(0, PADDED)
    at, mask = slot[:, None] * D + d[None, :], there[:, None] & (d[None, :] < D)
    step = tl.load(scale + at, mask=mask, other=0).to(tl.float32)[:, None, :]
    if codes.dtype.element_ty == tl.float8e4nv:
        x = x * step
    elif BITS == 8:
        x = (x - 128) * step
    else:
        x = x * step + tl.load(zero + at, mask=mask, other=0).to(tl.float32)[:, None, :]
    return tl.reshape(x, (BLOCKS * 32, PADDED))


@triton.jit
def _load_values(
    codes,
    scale,
    zero,
    slot,
    there,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """float32 rotated values of some blocks, `(BLOCKS * 32, PADDED)`; SPAN: largest power of two that divides GROUP."""
    units = _load_units(codes, slot, there, BLOCKS, BITS, D, PADDED)
    lanes = tl.reshape(units, (BLOCKS, PADDED // 16, 8, 16, 4))  # block, channels, tokens, channel, token
    spans: tl.constexpr = PADDED // SPAN
    x = tl.reshape(tl.permute(lanes, (0, 2, 4, 1, 3)), (BLOCKS, 32, spans, SPAN)).to(tl.float32)
    channel = tl.arange(0, spans)[None, :, None] * SPAN
    at = (slot * (D // GROUP * 32))[:, None, None] + channel // GROUP * 32 + tl.arange(0, 32)[None, None, :]
    mask = there[:, None, None] & (channel < D)
    step = tl.load(scale + at, mask=mask, other=0).to(tl.float32)
    step = tl.expand_dims(tl.permute(step, (0, 2, 1)), 3)
    if codes.dtype.element_ty == tl.float8e4nv:
        x = x * step
    elif BITS == 8:
        x = (x - 128) * step
    else:
        low = tl.load(zero + at, mask=mask, other=0).to(tl.float32)
        x = x * step + tl.expand_dims(tl.permute(low, (0, 2, 1)), 3)
    return tl.reshape(x, (BLOCKS * 32, PADDED))


@triton.jit
def _add_tile(
    scores,
    v,
    there,
    key,
    position,
    leftpad,
    scale,
    softcap,
    window,
    top,
    total,
    acc,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One step of the online softmax, in powers of two: keys at the positions `key`, queries at `position`."""
    if SOFTCAP:
        scores = scores * (scale / softcap)
        scores = (softcap * 1.4426950408889634) * (1 - 2 / (tl.exp2(scores * 2.8853900817779268) + 1))
    else:
        scores = scores * (scale * 1.4426950408889634)
    visible = (there & (key >= leftpad))[None, :] & (key[None, :] > position[:, None] - window)
    if CAUSAL:
        visible = visible & (key[None, :] <= position[:, None])
    scores = tl.where(visible, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing visible yet: no inf - inf
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(top - finite)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return new_top, total, acc


@triton.jit(
    do_not_specialize=["start", "packed_tokens", "block_begin", "blocks", "slot", "slots", "exact_begin", "exact"]
    + ["exact_slot", "ring", "kv_len", "window", "split_blocks", "packed_splits", "splits", "q_len"]
)
def decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    leftpad_ptr,
    lengths_ptr,  # (2,) int32: the packed and the exact tokens that there are, in the place of the host's; or None
    k_codes,
    k_scale,
    k_zero,
    k_mean,
    v_codes,
    v_scale,
    v_zero,
    partial_ptr,  # (B, Hkv, splits, G * Tq, D) float32
    lse_ptr,  # (B, Hkv, splits, G * Tq) float32, of base 2
    scale,
    softcap,
    start,
    packed_tokens,
    block_begin,
    blocks,
    slot,
    slots,
    exact_begin,
    exact,
    exact_slot,
    ring,
    kv_len,
    window,
    split_blocks,
    packed_splits,
    splits,
    q_len,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    KV_HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv = batch * KV_HEADS + head
    row_count = HEADS_PER_KV * q_len
    row_tiles = tl.cdiv(row_count, ROWS)  # neighbours, so that all but the first find keys and values in the L2 cache
    split = tl.program_id(0) // row_tiles
    rows = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    row_at = (head * HEADS_PER_KV + rows // q_len).to(tl.int64) * stride_qh + (rows % q_len) * stride_qt
    row_mask = (rows < row_count)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + batch * stride_qb + row_at[:, None] + d[None, :], mask=row_mask, other=0)
    leftpad = 0
    if leftpad_ptr is not None:
        leftpad = tl.load(leftpad_ptr + batch)
    seen_from = leftpad  # no query sees a key before it; what the host knows of a window is in the splits' begins
    if lengths_ptr is not None:
        exact = tl.load(lengths_ptr + 1)
        kv_len = exact
        if K_BITS:
            packed_tokens = tl.load(lengths_ptr)
            blocks = packed_tokens // 32
            kv_len += packed_tokens
        seen_from = tl.maximum(leftpad, kv_len - q_len - window + 1)
    position = kv_len - q_len + rows % q_len

    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    TILE: tl.constexpr = BLOCKS * 32

    if K_BITS:
        begin = block_begin + split * split_blocks
        end = tl.minimum(begin + split_blocks, tl.where(split < packed_splits, blocks, 0))
        begin = tl.maximum(begin, (seen_from - start) // 32 // BLOCKS * BLOCKS)
        mean = tl.load(k_mean + kv * D + d, mask=d < D, other=0)
        of_mean = tl.sum(q.to(tl.float32) * mean[None, :], 1)
        for at in tl.range(begin, end, BLOCKS):
            block = at + tl.arange(0, BLOCKS)
            there = block < end
            lies = slot + block
            lies = kv * slots + tl.where(lies >= slots, lies - slots, lies)
            k = _load_keys(k_codes, k_scale, k_zero, lies, there, BLOCKS, K_BITS, D, PADDED).to(q.dtype)
            v = _load_values(v_codes, v_scale, v_zero, lies, there, BLOCKS, V_BITS, D, PADDED, GROUP, SPAN)
            scores = tl.dot(q, tl.trans(k)) + of_mean[:, None]
            token = at * 32 + tl.arange(0, TILE)
            top, total, acc = _add_tile(
                scores, v.to(q.dtype), token < end * 32, start + token, position, leftpad, scale, softcap, window,
                top, total, acc, CAUSAL, SOFTCAP,
            )  # fmt: skip

    begin = exact_begin + (split - packed_splits) * split_blocks * 32
    end = tl.where(split < packed_splits, begin, tl.minimum(begin + split_blocks * 32, exact))
    if lengths_ptr is not None:
        begin = tl.maximum(begin, seen_from - packed_tokens)
    for at in tl.range(begin, end, TILE, num_stages=2):
        token = at + tl.arange(0, TILE)
        there = token < end
        lies = exact_slot + token
        lies = tl.where(lies >= ring, lies - ring, lies).to(tl.int64)
        mask = there[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + batch * stride_kb + head.to(tl.int64) * stride_kh + lies[:, None] * stride_kt + d[None, :],
                    mask=mask, other=0)  # fmt: skip
        v = tl.load(v_ptr + batch * stride_vb + head.to(tl.int64) * stride_vh + lies[:, None] * stride_vt + d[None, :],
                    mask=mask, other=0)  # fmt: skip
        scores = tl.dot(q, tl.trans(k))
        key = tl.where(token < start, token, token + packed_tokens)
        if SINKS:
            key += leftpad
        top, total, acc = _add_tile(
            scores, v, there, key, position, leftpad, scale, softcap, window,
            top, total, acc, CAUSAL, SOFTCAP,
        )  # fmt: skip

    row = (kv * splits + split) * row_count + rows
    tl.store(partial_ptr + row[:, None] * D + d[None, :], acc / tl.where(total > 0, total, 1.0)[:, None], mask=row_mask)
    tl.store(lse_ptr + row, top + tl.log2(total), mask=rows < row_count)


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
    partial_ptr,
    partial_lse_ptr,
    s_aux_ptr,  # (Hq,) scores without values, or None
    out_ptr,  # (B, Tq, Hq, D)
    lse_ptr,  # (B, Hq, Tq) float32, natural
    splits,
    packed_splits,
    q_len,
    HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    LOG_SIZE: tl.constexpr,
    MOST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    query, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_count = HEADS_PER_KV * q_len
    kv = batch * (HEADS // HEADS_PER_KV) + head // HEADS_PER_KV
    row = kv * splits * row_count + head % HEADS_PER_KV * q_len + query
    every = tl.arange(0, MOST)
    every_lse = tl.load(partial_lse_ptr + row + every * row_count, mask=every < splits, other=-float("inf"))
    top = tl.max(every_lse, 0)
    if s_aux_ptr is not None:
        own = tl.load(s_aux_ptr + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, own)
    finite = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp2(every_lse - finite), 0)
    if s_aux_ptr is not None:
        total += tl.exp2(own - finite)
    d = tl.arange(0, PADDED)
    packed = tl.zeros((PADDED,), tl.float32)
    exact = tl.zeros((PADDED,), tl.float32)
    for at in tl.range(0, splits, CHUNK):
        split = at + tl.arange(0, CHUNK)
        there = split < splits
        part = row + split.to(tl.int64) * row_count
        weight = tl.exp2(tl.load(partial_lse_ptr + part, mask=there, other=-float("inf")) - finite)
        mask = there[:, None] & (d < D)[None, :]
        weighted = tl.load(partial_ptr + part[:, None] * D + d[None, :], mask=mask, other=0) * weight[:, None]
        packed += tl.sum(tl.where((split < packed_splits)[:, None], weighted, 0.0), 0)
        exact += tl.sum(tl.where((split < packed_splits)[:, None], 0.0, weighted), 0)
    packed = tl.reshape(rotate(tl.reshape(packed, (1, PADDED)), 1, PADDED, LOG_SIZE), (PADDED,))
    out = (packed + exact) / tl.where(total > 0, total, 1.0)
    out_row = (batch * q_len + query) * HEADS + head
    tl.store(out_ptr + out_row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + (batch * HEADS + head) * q_len + query, (top + tl.log2(total)) * 0.6931471805599453)
