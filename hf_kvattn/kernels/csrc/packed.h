// Attention over blocks of 32 quantized tokens, read as packed (the layout is that of quant/layout.py).
//
// Scales never touch the codes: a key's channel scales are folded into the query once per block, a value's token scales
// into the weights, and the zeros become one number a row. Queries and weights become whole numbers of a row's step,
// which serves kStretch blocks or a tile. What remains are products of small whole numbers: of bytes where the CPU has
// them (packed_vnni.h), else of 16-bit numbers (packed_words.h).
#pragma once
#include "scalar.h"

namespace {

constexpr int kBlock = 32;    // tokens
constexpr int kUnit = 64;     // codes of a unit: 16 lanes of 4
constexpr int kUnits = 8;     // units of 16 channels of a block, in 64 * bits bytes
constexpr int kMaxDim = 512;  // channels

// Blocks of one KV head. Without zeros the codes are signed numbers to which 128 was added.
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

constexpr int kFour = 4;               // rows served together at most, as are their maxima and sums
constexpr int kAhead = 6;              // blocks that are on their way from memory to the second-level cache
constexpr int kStretch = 16;           // blocks that share a query's step
constexpr float kMostSteps = 32512.f;  // of a query: sums of 512 products with -128 to 127 stay below 2^31
constexpr float kLeast = 1e-30f;       // what largest numbers start from, so that steps are not zero

// Asks for bytes that are needed some tiles later: hardware prefetching stops at each page, and a page holds one to
// eight blocks only. A few at a time, between products: more at once than the CPU can have under way would block it.
inline void prefetch(const void *p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) Simd::prefetch(static_cast<const char *>(p) + i);
}

// Rows' steps of which `count` make the largest number in `top`.
inline void choose_steps(const Simd::Vec *top, float count, float *step, float *inverse) {
  float largest[kFour];
  Simd::max4(top[0], top[1], top[2], top[3], largest);
  for (int r = 0; r < kFour; ++r) inverse[r] = count / largest[r];
  for (int r = 0; r < kFour; ++r) step[r] = largest[r] * (1.f / count);
}

// The queries of R rows in steps of their own, which serve all blocks whose scales were looked at.
template <int R>
struct Queries {
  float x[R][kMaxDim];
  float step[kFour];
};

template <int R>
void count_in_steps(PackedKeys keys, int blocks, const float *q, int64_t q_stride, Queries<R> &out) {
  Simd::Vec top[kFour];
#pragma GCC unroll 4
  for (int r = 0; r < kFour; ++r) top[r] = Simd::set(kLeast);
  for (int c = 0; c < keys.d; c += Simd::kLanes) {
    Simd::Vec largest = Simd::set(0.f);
    for (int b = 0; b < blocks; ++b)
      largest = Simd::max(largest, Simd::abs(Simd::widen(keys.scale + int64_t{b} * keys.d + c)));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      top[r] = Simd::max(top[r], Simd::abs(Simd::mul(Simd::load(q + r * q_stride + c), largest)));
  }
  float inverse[kFour];
  choose_steps(top, kMostSteps, out.step, inverse);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < keys.d; c += Simd::kLanes)
      Simd::store(out.x[r] + c, Simd::mul(Simd::load(q + r * q_stride + c), Simd::set(inverse[r])));
    fill(out.x[r] + keys.d, out.x[r] + round_up(keys.d, 32), 0.f);
  }
}

}  // namespace

// Each defines FoldedQueries and FoldedWeights, how to fold, and how to multiply codes by them.
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
inline void score_block(const PackedKeys &keys, const FoldedQueries<R> &query, const float *step, float *scores,
                        int64_t stride, Simd::Vec *top, int ahead) {
  with_bits(keys.bits,
            [&](auto bits) { score_codes<R, decltype(bits)::value>(keys, query, step, scores, stride, top, ahead); });
}

// The channels of group g.
template <int R, int Digits, int Blocks>
inline void add_group(const PackedValues &values, const FoldedWeights<R, Digits> &weights, int g, float *acc,
                      int64_t acc_stride) {
  with_bits(values.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value, kVectors = wide_columns(Digits), kWide = kVectors * Simd::kLanes;
    int c = g * values.group;
    const int end = c + values.group;
    for (; c + kWide <= end; c += kWide)
      add_columns<R, Digits, kBits, Blocks, kVectors>(values, weights, c, acc, acc_stride);
    for (; c < end; c += Simd::kLanes) add_columns<R, Digits, kBits, Blocks, 1>(values, weights, c, acc, acc_stride);
  });
}

// scores[r * stride + t] = q[r] . key[t] + offset[r], for one or two blocks.
template <int R>
void packed_scores(const PackedKeys &keys, int blocks, const float *q, int64_t q_stride, const float *offset,
                   float *scores, int64_t stride) {
  Queries<R> queries;
  FoldedQueries<R> folded;
  Simd::Vec top[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) top[r] = Simd::set(0.f);
  count_in_steps(keys, blocks, q, q_stride, queries);
  for (int b = 0; b < blocks; ++b) {
    fold_queries(keys.at(b), queries, offset, folded, 0);
    score_block<R>(keys.at(b), folded, queries.step, scores + b * kBlock, stride, top, 0);
  }
}

// acc[r * acc_stride + c] += sum over the tokens t of one or two blocks of weights[r * stride + t] * value[t][c].
template <int R, int Digits>
void packed_values(const PackedValues &values, int blocks, const float *weights, int64_t stride, float *acc,
                   int64_t acc_stride) {
  for (int g = 0; g < values.d / values.group; ++g) {
    FoldedWeights<R, Digits> folded;
    if (blocks == 1) {
      fold_weights<R, Digits, 1>(values, g, weights, stride, folded, 0);
      add_group<R, Digits, 1>(values, folded, g, acc, acc_stride);
    } else {
      fold_weights<R, Digits, 2>(values, g, weights, stride, folded, 0);
      add_group<R, Digits, 2>(values, folded, g, acc, acc_stride);
    }
  }
}

// `soften` of attend.h for R rows of a tile that all of them see whole; `top` holds the rows' largest scores.
template <int R>
inline void soften_rows(float (*x)[kTile], const Simd::Vec *top, float *reference, float *sum_lanes, float *acc,
                        int64_t acc_stride, int d) {
  float largest[kFour];
  Simd::max4(top[0], top[1], top[2], top[3], largest);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float *lanes = sum_lanes + r * Simd::kLanes;
    if (!(largest[r] <= reference[r] + kSlack))
      follow(most(reference[r], largest[r]), reference + r, lanes, acc + r * acc_stride, d);
    weigh(x[r], kTile, reference[r], lanes);
  }
}

// `tiles` whole tiles of two blocks, seen whole by R rows whose queries and offsets are scaled for powers of two. The
// next tile's scores are made between the steps of this one: each step then finds what it needs finished, where one
// after the other each would wait for the one before.
template <int R, int Digits>
void attend_run(const PackedKeys &keys, const PackedValues &values, int64_t tiles, const float *q, int64_t q_stride,
                const float *offset, float *reference, float *sum_lanes, float *acc, int64_t acc_stride) {
  Queries<R> queries;
  FoldedQueries<R> folded[2];
  float scores[2][R][kTile];
  Simd::Vec top[2][kFour];
  // A quarter of the values' codes of a later tile. Asked for together, they would keep the CPU waiting.
  auto fetch = [&](int64_t tile, int quarter) {
    const int64_t bytes = int64_t{2} * values.bits * keys.d;
    prefetch(values.at(2 * tile + kAhead).codes + quarter * bytes, bytes);
  };
  auto fold = [&](int64_t tile) {
    const int64_t block = 2 * tile;
    if (block % kStretch == 0) {
      const int64_t left = 2 * tiles - block;
      count_in_steps(keys.at(block), static_cast<int>(least<int64_t>(kStretch, left)), q, q_stride, queries);
    }
    for (int b = 0; b < 2; ++b) fold_queries(keys.at(block + b), queries, offset, folded[b], kAhead);
#pragma GCC unroll 4
    for (int r = 0; r < kFour; ++r) top[tile % 2][r] = Simd::set(-kInf);
  };
  auto score = [&](int64_t tile, int b) {
    float *to = scores[tile % 2][0] + b * kBlock;
    score_block<R>(keys.at(2 * tile + b), folded[b], queries.step, to, kTile, top[tile % 2], kAhead);
  };
  fold(0), score(0, 0), score(0, 1);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const PackedValues now = values.at(2 * tile);
    float(*x)[kTile] = scores[tile % 2];
    const bool more = tile + 1 < tiles;
    FoldedWeights<R, Digits> weights;
    fetch(tile, 0);
    if (more) fold(tile + 1);
    fetch(tile, 1);
    soften_rows<R>(x, top[tile % 2], reference, sum_lanes, acc, acc_stride, keys.d);
    fetch(tile, 2);
    if (more) score(tile + 1, 0);
    fold_weights<R, Digits, 2>(now, 0, x[0], kTile, weights, kAhead);
    fetch(tile, 3);
    if (more) score(tile + 1, 1);
    add_group<R, Digits, 2>(now, weights, 0, acc, acc_stride);
    for (int g = 1; g < now.d / now.group; ++g) {
      fold_weights<R, Digits, 2>(now, g, x[0], kTile, weights, kAhead);
      add_group<R, Digits, 2>(now, weights, g, acc, acc_stride);
    }
  }
}

}  // namespace
