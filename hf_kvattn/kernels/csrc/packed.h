// Attention over blocks of 32 quantized tokens, read as packed (the layout is that of quant/layout.py).
//
// Codes are never dequantized. A key's channel scales are multiplied into the query once a block, and a value's token
// scales into the weights. The offsets of key channels add one number a row. Queries and weights are quantized too,
// each row with a scale of its own, which serves one tile of values, kScaleBlocks blocks of 8-bit keys, or all blocks
// of other keys: the queries include the steps of those, and are in the order of their codes. What remains are dot
// products of small integers: of bytes where the CPU has them (packed_vnni.h), else of 16-bit words (packed_words.h).
#pragma once
#include "scalar.h"

namespace {

constexpr int kBlock = 32;    // tokens
constexpr int kUnit = 64;     // codes of a unit: 4 for each of 16 lanes
constexpr int kUnits = 8;     // units that hold 16 channels of a block, in 64 * bits bytes
constexpr int kMaxDim = 512;  // channels

// What all blocks of a KV head share. The tables are null for keys of 8 bits.
struct KeyTable {
  KeyTable() = default;
  template <typename Args>
  KeyTable(const Args &a, int64_t head) {
    const int d = static_cast<int>(a.head_dim);
    const uint8_t *widths = a.k_widths ? a.k_widths + head * (d / 16) : nullptr;
    if (widths) {
      step = reinterpret_cast<const bf16_t *>(a.k_step) + head * d;
      unit = reinterpret_cast<const bf16_t *>(a.k_unit) + head * d;
      order = a.k_order + head * d;
    }
    for (int c = 0; c < d; c += 16)
      for (int width = 1; width <= (widths ? widths[c / 16] : 8); ++width) end[width] = c + 16;
  }
  int channel(int c) const { return order ? order[c] : c; }
  int width(int c) const {  // bits of channel c, in the order of the codes
    int width = 8;
    while (c >= end[width]) --width;
    return width;
  }
  const bf16_t *step = nullptr, *unit = nullptr;
  const int16_t *order = nullptr;
  int end[9] = {kMaxDim};  // channels before end[w] have codes of w bits or more
};

// Blocks of one KV head. Codes of 8 bits are signed, with 128 added; all others: quant/few_bits.py.
struct PackedKeys {
  PackedKeys at(int64_t block) const {
    return {codes + block * 4 * bits * d, scale + block * (by_channel() ? 3 * d / 4 : 2 * d), table, bits, d};
  }
  bool by_channel() const { return bits < 8; }
  const bf16_t *scales(int c) const { return reinterpret_cast<const bf16_t *>(scale) + c; }  // of 8-bit keys
  float offset(int c) const { return static_cast<float>(scale[c / 2] >> c % 2 * 4 & 15); }
  float multiplier(int c) const { return kMultipliers[scale[d / 2 + c / 4] >> c % 4 * 2 & 3]; }
  const uint8_t *codes, *scale;  // scale: (blocks, d) bf16 or, by channel, (blocks, 3 * d / 4) offsets and multipliers
  const KeyTable *table;
  int bits, d;  // d is a multiple of 16
};

struct PackedValues {
  PackedValues at(int64_t block) const {
    return {codes + block * 4 * bits * d, scale + block * scale_bytes() * (d / group * kBlock), bits, d, group};
  }
  int scale_bytes() const { return bits < 8 ? 1 : 2; }
  const uint8_t *scales(int g) const { return scale + g * kBlock * scale_bytes(); }
  Simd::Vec load_scales(int g, int t) const {  // of tokens from t on
    const uint8_t *at = scales(g) + t * scale_bytes();
    return bits < 8 ? Simd::scales(at) : Simd::widen(reinterpret_cast<const bf16_t *>(at));
  }
  const uint8_t *codes, *scale;  // scale: (blocks, d / group, 32)
  int bits, d, group;            // group is a multiple of 16 that divides d
};

// Bits of the lowest plane of codes (`planes_of` in quant/layout.py).
constexpr int first_plane(int bits) { return bits & 8 ? 8 : bits & 4 ? 4 : bits & 2 ? 2 : 1; }

// Twice the number that codes are relative to.
constexpr int twice_centre(int bits) { return bits == 8 ? 256 : (1 << bits) - 1; }

constexpr int kPackedRows = 4;        // at most so many query rows are computed together
constexpr int kPrefetchBlocks = 6;    // distance of prefetches into the second-level cache
constexpr int kScaleBlocks = 16;      // blocks for which a query keeps its scale
constexpr float kQueryMax = 32512.f;  // of a quantized query: 512 products with -128 to 127 sum below 2^31
constexpr float kOffsetZero = 8.f;    // what stands for an offset of 0
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

// Queries in the order of the keys' codes. By channel: times the steps, and times the units. `offset` is what all
// scores of a row include.
struct QueryRows {
  QueryRows at(int row) const { return {x + row * stride, unit ? unit + row * stride : nullptr, offset + row, stride}; }
  const float *x, *unit, *offset;
  int64_t stride;
};

// R query rows divided by their scales, not yet rounded: `fold_queries` multiplies a block's key scales in first.
template <int R>
struct Queries {
  float x[R][kMaxDim], unit[R][kMaxDim];  // the latter is not divided
  float scale[kPackedRows], offset[kPackedRows];
  int16_t centre[kMaxDim];  // that is to be subtracted from twice the codes
};

// Chooses scales that serve all of `blocks` blocks of 8-bit keys, or all blocks of others.
template <int R>
void quantize_queries(PackedKeys keys, int blocks, const QueryRows &rows, Queries<R> &out) {
  const float *q = rows.x;
  const int64_t q_stride = rows.stride;
  const int coded = keys.table->end[1];  // channels; those without bits make no query coarser
  Simd::Vec abs_max[kPackedRows];
#pragma GCC unroll 4
  for (int r = 0; r < kPackedRows; ++r) abs_max[r] = Simd::set(kMinAbsMax);
  for (int c = 0; c < coded; c += Simd::kLanes) {
    Simd::Vec key_scale = Simd::set(keys.by_channel() ? kMultipliers[3] : 0.f);  // the largest of the blocks
    for (int b = 0; b < blocks && !keys.by_channel(); ++b)
      key_scale = Simd::max(key_scale, Simd::abs(Simd::widen(keys.at(b).scales(c))));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      abs_max[r] = Simd::max(abs_max[r], Simd::abs(Simd::mul(Simd::load(q + r * q_stride + c), key_scale)));
  }
  float inverse[kPackedRows];
  choose_scales(abs_max, kQueryMax, out.scale, inverse);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < coded; c += Simd::kLanes)
      Simd::store(out.x[r] + c, Simd::mul(Simd::load(q + r * q_stride + c), Simd::set(inverse[r])));
    fill(out.x[r] + coded, out.x[r] + round_up(keys.d, 32), 0.f);
    out.offset[r] = rows.offset[r];
    if (keys.by_channel()) memcpy(out.unit[r], rows.unit + r * q_stride, keys.d * sizeof(float));
    fill(out.unit[r] + keys.d, out.unit[r] + round_up(keys.d, 32), 0.f);
  }
  for (int c = 0; c < round_up(keys.d, 32); ++c)
    out.centre[c] = static_cast<int16_t>(c < keys.d ? twice_centre(keys.table->width(c)) : 0);
}

struct Codes {
  Simd::Words even, odd;  // codes 0 and 2 of each lane, 1 and 3
};

// Unit i of 16 channels of a block, four codes a lane, each in a byte. Their codes of unit 0 start at p. The planes
// from bit Low on.
template <int Bits, int Low = 0>
__attribute__((always_inline)) inline Simd::Words load_bytes(const uint8_t *p, int i) {
  constexpr int kPlane = first_plane(Bits), kShared = 8 / kPlane, kMask = ((1 << kPlane) - 1) << Low;
  const Simd::Words plane =
      Simd::codes(p + (Low + i / kShared) * kUnit, i % kShared * kPlane - Low, kMask << 8 | kMask);
  if constexpr (Bits == kPlane)
    return plane;
  else
    return Simd::join(plane, load_bytes<Bits - kPlane, Low + kPlane>(p, i));
}

template <int Bits>
__attribute__((always_inline)) inline Codes load_codes(const uint8_t *p, int i) {
  if constexpr (Bits == first_plane(Bits)) {
    constexpr int kShared = 8 / Bits, kMask = (1 << Bits) - 1;
    const uint8_t *at = p + i / kShared * kUnit;
    const int shift = i % kShared * Bits;
    return {Simd::codes(at, shift, kMask), Simd::codes(at, 8 + shift, kMask)};
  } else {
    const Simd::Words bytes = load_bytes<Bits>(p, i);
    return {Simd::low_bytes(bytes), Simd::high_bytes(bytes)};
  }
}

// Calls f(Rows<bits>) for all widths of keys' codes, the largest first.
template <typename F>
__attribute__((always_inline)) inline void for_widths(F f) {
  f(Rows<8>()), f(Rows<7>()), f(Rows<6>()), f(Rows<5>()), f(Rows<4>()), f(Rows<3>()), f(Rows<2>()), f(Rows<1>());
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
void packed_scores(const PackedKeys &keys, int blocks, const QueryRows &rows, float *scores, int64_t stride) {
  Queries<R> queries;
  FoldedQueries<R> folded;
  Simd::Vec row_max[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) row_max[r] = Simd::set(0.f);
  quantize_queries(keys, blocks, rows, queries);
  for (int b = 0; b < blocks; ++b) {
    fold_queries(keys.at(b), queries, folded, 0);
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
void attend_packed_tiles(const PackedKeys &keys, const PackedValues &values, int64_t tiles, const QueryRows &rows,
                         float *reference, float *sum_lanes, float *acc, int64_t acc_stride) {
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
    if (block == 0 || (block % kScaleBlocks == 0 && !keys.by_channel())) {
      const int64_t left = 2 * tiles - block;
      quantize_queries(keys.at(block), static_cast<int>(min<int64_t>(kScaleBlocks, left)), rows, queries);
    }
    for (int b = 0; b < 2; ++b) fold_queries(keys.at(block + b), queries, folded[b], kPrefetchBlocks);
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
