// Attention over blocks of 32 quantized tokens, read as packed (the layout is that of quant/layout.py).
//
// Codes are never dequantized. A key's channel scales are multiplied into the query once a block, and a value's token
// scales into the weights. The zero points add one number a row. Queries and weights are quantized too, each row with a
// scale of its own, which serves kScaleBlocks blocks of keys or one tile of values. What remains are dot products of
// small integers: of bytes where the CPU has them (packed_vnni.h), else of 16-bit words (packed_words.h).
#pragma once
#include "scalar.h"

namespace {

constexpr int kBlock = 32;    // tokens
constexpr int kUnit = 64;     // codes of a unit: 4 for each of 16 lanes
constexpr int kUnits = 8;     // units that hold 16 channels of a block, in 64 * bits bytes
constexpr int kMaxDim = 512;  // channels

// Blocks of one KV head. Without zero points the codes are signed, with 128 added.
struct PackedKeys {
  PackedKeys at(int64_t block) const {
    return {codes + block * 4 * bits * d, scale + block * d, zero ? zero + block * d : nullptr, bits, d};
  }
  const uint8_t *codes;
  const bf16_t *scale, *zero;  // (blocks, d)
  int bits, d;                 // d is a multiple of 16
};

struct PackedValues {
  PackedValues at(int64_t block) const {
    int64_t scales = block * (d / group) * kBlock;
    return {codes + block * 4 * bits * d, scale + scales, zero ? zero + scales : nullptr, bits, d, group};
  }
  const uint8_t *codes;
  const bf16_t *scale, *zero;  // (blocks, d / group, 32)
  int bits, d, group;          // group is a multiple of 16 that divides d
};

constexpr int kPackedRows = 4;        // at most so many query rows are computed together
constexpr int kPrefetchBlocks = 6;    // distance of prefetches into the second-level cache
constexpr int kScaleBlocks = 16;      // blocks for which a query keeps its scale
constexpr float kQueryMax = 32512.f;  // of a quantized query: 512 products with -128 to 127 sum below 2^31
constexpr float kMinAbsMax = 1e-30f;  // lower bound of a row's largest magnitude: scales are not zero

// Prefetches bytes that are needed some tiles later. Hardware prefetching stops at each page, and a page holds one to
// eight blocks only. Call it for a few bytes at a time, between products: the CPU waits when too many loads are
// pending.
inline void prefetch(const void *p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) Simd::prefetch(static_cast<const char *>(p) + i);
}

// Each row's scale, with which its largest magnitude becomes `levels`, and the scale's inverse.
inline void choose_scales(const Simd::Vec *abs_max, float levels, float *scale, float *inverse) {
  float largest[kPackedRows];
  Simd::max4(abs_max[0], abs_max[1], abs_max[2], abs_max[3], largest);
  for (int r = 0; r < kPackedRows; ++r) inverse[r] = levels / largest[r];
  for (int r = 0; r < kPackedRows; ++r) scale[r] = largest[r] * (1.f / levels);
}

// R query rows divided by their scales, not yet rounded: `fold_queries` multiplies a block's key scales in first.
template <int R>
struct Queries {
  float x[R][kMaxDim];
  float scale[kPackedRows];
};

// Chooses scales that serve all of `blocks` blocks of keys.
template <int R>
void quantize_queries(PackedKeys keys, int blocks, const float *q, int64_t q_stride, Queries<R> &out) {
  Simd::Vec abs_max[kPackedRows];
#pragma GCC unroll 4
  for (int r = 0; r < kPackedRows; ++r) abs_max[r] = Simd::set(kMinAbsMax);
  for (int c = 0; c < keys.d; c += Simd::kLanes) {
    Simd::Vec key_scale = Simd::set(0.f);  // the largest of the blocks
    for (int b = 0; b < blocks; ++b)
      key_scale = Simd::max(key_scale, Simd::abs(Simd::widen(keys.scale + int64_t{b} * keys.d + c)));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      abs_max[r] = Simd::max(abs_max[r], Simd::abs(Simd::mul(Simd::load(q + r * q_stride + c), key_scale)));
  }
  float inverse[kPackedRows];
  choose_scales(abs_max, kQueryMax, out.scale, inverse);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < keys.d; c += Simd::kLanes)
      Simd::store(out.x[r] + c, Simd::mul(Simd::load(q + r * q_stride + c), Simd::set(inverse[r])));
    fill(out.x[r] + keys.d, out.x[r] + round_up(keys.d, 32), 0.f);
  }
}

struct Codes {
  Simd::Words even, odd;  // codes 0 and 2 of each lane, 1 and 3
};

// Unit i of 16 channels of a block. Their codes of unit 0 start at p.
template <int Bits>
__attribute__((always_inline)) inline Codes load_codes(const uint8_t *p, int i) {
  constexpr int kLow = Bits == 3 ? 2 : Bits, kShared = 8 / kLow;
  const uint8_t *low = p + i / kShared * kUnit, *high = Bits == 3 ? p + 2 * kUnit : nullptr;
  const int shift = i % kShared * kLow;
  return {Simd::codes(low, shift, kLow, high, i), Simd::codes(low, 8 + shift, kLow, high, 8 + i)};
}

}  // namespace

// Both headers define FoldedQueries and FoldedWeights (quantized, with the scales of a block multiplied in), the
// functions that make them, and the dot products of codes with them.
#ifdef __AVX512VNNI__
#include "packed_vnni.h"
#else
#include "packed_words.h"
#endif

namespace {

template <typename F>
inline void with_bits(int bits, F f) {
  switch (bits) {
    case 8: f(Rows<8>()); break;
    case 4: f(Rows<4>()); break;
    case 3: f(Rows<3>()); break;
    case 2: f(Rows<2>()); break;
  }
}

template <int R>
inline void score_block(const PackedKeys &keys, const FoldedQueries<R> &query, const float *scale, float *scores,
                        int64_t stride, Simd::Vec *row_max, int ahead) {
  with_bits(keys.bits, [&](auto bits) {
    score_codes<R, decltype(bits)::value>(keys, query, scale, scores, stride, row_max, ahead);
  });
}

// Adds the values' channels of group g, times the weights, to `acc`.
template <int R, int Limbs, int Blocks>
inline void add_group(const PackedValues &values, const FoldedWeights<R, Limbs> &weights, int g, float *acc,
                      int64_t acc_stride) {
  with_bits(values.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value, kVectors = wide_columns(Limbs), kWide = kVectors * Simd::kLanes;
    int c = g * values.group;
    const int end = c + values.group;
    for (; c + kWide <= end; c += kWide)
      add_columns<R, Limbs, kBits, Blocks, kVectors>(values, weights, c, acc, acc_stride);
    for (; c < end; c += Simd::kLanes) add_columns<R, Limbs, kBits, Blocks, 1>(values, weights, c, acc, acc_stride);
  });
}

// scores[r * stride + t] = q[r] . key[t] + offset[r], for one or two blocks.
template <int R>
void packed_scores(const PackedKeys &keys, int blocks, const float *q, int64_t q_stride, const float *offset,
                   float *scores, int64_t stride) {
  Queries<R> queries;
  FoldedQueries<R> folded;
  Simd::Vec row_max[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) row_max[r] = Simd::set(0.f);
  quantize_queries(keys, blocks, q, q_stride, queries);
  for (int b = 0; b < blocks; ++b) {
    fold_queries(keys.at(b), queries, offset, folded, 0);
    score_block<R>(keys.at(b), folded, queries.scale, scores + b * kBlock, stride, row_max, 0);
  }
}

// acc[r * acc_stride + c] += sum over the tokens t of one or two blocks of weights[r * stride + t] * value[t][c].
template <int R, int Limbs>
void packed_values(const PackedValues &values, int blocks, const float *weights, int64_t stride, float *acc,
                   int64_t acc_stride) {
  for (int g = 0; g < values.d / values.group; ++g) {
    FoldedWeights<R, Limbs> folded;
    if (blocks == 1) {
      fold_weights<R, Limbs, 1>(values, g, weights, stride, folded, 0);
      add_group<R, Limbs, 1>(values, folded, g, acc, acc_stride);
    } else {
      fold_weights<R, Limbs, 2>(values, g, weights, stride, folded, 0);
      add_group<R, Limbs, 2>(values, folded, g, acc, acc_stride);
    }
  }
}

// `softmax_tile` of attend.h for R rows of a tile in which they see every token.
template <int R>
inline void softmax_rows(float (*x)[kTile], const Simd::Vec *row_max, float *reference, float *sum_lanes, float *acc,
                         int64_t acc_stride, int d) {
  float largest[kPackedRows];
  Simd::max4(row_max[0], row_max[1], row_max[2], row_max[3], largest);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float *lanes = sum_lanes + r * Simd::kLanes;
    if (!(largest[r] <= reference[r] + kRescaleThreshold))
      rescale(max(reference[r], largest[r]), reference + r, lanes, acc + r * acc_stride, d);
    exp_sum(x[r], kTile, 1.f, reference[r], lanes);
  }
}

// Attends to `tiles` tiles of two blocks, in which R rows see every token. The queries and offsets include log2(e), so
// that weights are powers of two. Software pipelining: the next tile's scores are computed between the stages of this
// tile, so that no stage waits for the result of the one just before it.
template <int R, int Limbs>
void attend_packed_tiles(const PackedKeys &keys, const PackedValues &values, int64_t tiles, const float *q,
                         int64_t q_stride, const float *offset, float *reference, float *sum_lanes, float *acc,
                         int64_t acc_stride) {
  Queries<R> queries;
  FoldedQueries<R> folded[2];
  float scores[2][R][kTile];
  Simd::Vec row_max[2][kPackedRows];
  // Prefetches a quarter of a later tile's value codes: all of them at once would make the CPU wait.
  auto prefetch_values = [&](int64_t tile, int quarter) {
    const int64_t bytes = int64_t{2} * values.bits * keys.d;
    prefetch(values.at(2 * tile + kPrefetchBlocks).codes + quarter * bytes, bytes);
  };
  auto fold = [&](int64_t tile) {
    const int64_t block = 2 * tile;
    if (block % kScaleBlocks == 0) {
      const int64_t left = 2 * tiles - block;
      quantize_queries(keys.at(block), static_cast<int>(min<int64_t>(kScaleBlocks, left)), q, q_stride, queries);
    }
    for (int b = 0; b < 2; ++b) fold_queries(keys.at(block + b), queries, offset, folded[b], kPrefetchBlocks);
#pragma GCC unroll 4
    for (int r = 0; r < kPackedRows; ++r) row_max[tile % 2][r] = Simd::set(-kInf);
  };
  auto score = [&](int64_t tile, int b) {
    float *to = scores[tile % 2][0] + b * kBlock;
    score_block<R>(keys.at(2 * tile + b), folded[b], queries.scale, to, kTile, row_max[tile % 2], kPrefetchBlocks);
  };
  fold(0), score(0, 0), score(0, 1);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const PackedValues now = values.at(2 * tile);
    float(*x)[kTile] = scores[tile % 2];
    const bool more = tile + 1 < tiles;
    FoldedWeights<R, Limbs> weights;
    prefetch_values(tile, 0);
    if (more) fold(tile + 1);
    prefetch_values(tile, 1);
    softmax_rows<R>(x, row_max[tile % 2], reference, sum_lanes, acc, acc_stride, keys.d);
    prefetch_values(tile, 2);
    if (more) score(tile + 1, 0);
    fold_weights<R, Limbs, 2>(now, 0, x[0], kTile, weights, kPrefetchBlocks);
    prefetch_values(tile, 3);
    if (more) score(tile + 1, 1);
    add_group<R, Limbs, 2>(now, weights, 0, acc, acc_stride);
    for (int g = 1; g < now.d / now.group; ++g) {
      fold_weights<R, Limbs, 2>(now, g, x[0], kTile, weights, kPrefetchBlocks);
      add_group<R, Limbs, 2>(now, weights, g, acc, acc_stride);
    }
  }
}

}  // namespace
