// Packed blocks with products of bytes (AVX-512 VNNI). Queries and weights, with their scales folded in, become whole
// numbers of a row's step, and those become bytes:
//
// - queries two signed ones, `256 * high + low`, in steps that serve kStretch blocks;
// - weights, in steps of a tile, two unsigned ones, or one where the model is bf16: its error is of the size of the one
//   that other kernels make by rounding weights to bf16.
//
// The middle of a weight's codes counts with the same whole steps that multiply the codes, so that the rounding of a step
// is multiplied by what codes are away from the middle; the zeros contribute with exact numbers.
//
// Rows are unrolled by pragmas: GCC else keeps arrays of vectors in memory, where 512-bit stores take two cycles. Blocks
// are passed by value, since stores of bytes may change anything that is reached through a reference.
#pragma once
#include <immintrin.h>

namespace {

constexpr int kFour = 4;  // rows whose maxima and sums are taken together
constexpr int kMaxBlocks = 2;
constexpr int kTileTokens = kMaxBlocks * kBlock;
constexpr int kAhead = 6;     // blocks that are on their way from memory to the second-level cache
constexpr int kStretch = 16;  // blocks that share a query's step
constexpr float kMostSteps = 32512.f;  // of a query, so that high bytes fit
constexpr float kLeast = 1e-30f;       // largest numbers are taken to be at least this, so that steps are not zero

template <typename F>
inline __m128 reduce4(const __m512 *x, F f) {
  __m256 half[kFour];
#pragma GCC unroll 4
  for (int i = 0; i < kFour; ++i) half[i] = f(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));
  __m256 a = f(_mm256_unpacklo_ps(half[0], half[1]), _mm256_unpackhi_ps(half[0], half[1]));
  __m256 b = f(_mm256_unpacklo_ps(half[2], half[3]), _mm256_unpackhi_ps(half[2], half[3]));
  __m256 c = f(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  return _mm256_castps256_ps128(f(c, _mm256_permute2f128_ps(c, c, 1)));
}
inline __m128 max4(const __m512 *x) {
  return reduce4(x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
}
inline __m128 sum4(const __m512 *x) {
  return reduce4(x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
}

inline __m512i four_bytes(const void *p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// `256 * high + low` in floats; the low digit alone where there is no other.
template <int Digits>
inline __m512 joined(const __m512i *digits) {
  __m512 low = _mm512_cvtepi32_ps(digits[0]);
  return Digits == 1 ? low : _mm512_fmadd_ps(_mm512_cvtepi32_ps(digits[Digits - 1]), _mm512_set1_ps(256.f), low);
}

// Asks for bytes that are needed some tiles later: hardware prefetching stops at each page, and a page holds one to
// eight blocks only. A few at a time, between products: more at once than the CPU can have under way would block it.
inline void prefetch(const void *p, int64_t bytes) {
  // Not _mm_prefetch: GCC 12 drops it from functions that it takes for pure.
  for (int64_t i = 0; i < bytes; i += 64) asm volatile("prefetcht1 %0" : : "m"(static_cast<const char *>(p)[i]));
}

// Unit i of the 16 channels of a block whose codes start at p.
template <int Bits>
__attribute__((always_inline)) inline __m512i load_unit(const uint8_t *p, int i) {
  constexpr int kLow = Bits == 3 ? 2 : Bits, kShared = 8 / kLow;
  __m512i bytes = _mm512_loadu_si512(p + i / kShared * kUnit);
  if (Bits == 8) return bytes;
  __m512i low = _mm512_srli_epi16(bytes, i % kShared * kLow);
  low = _mm512_and_si512(low, _mm512_set1_epi8(static_cast<char>((1 << kLow) - 1)));
  if (Bits != 3) return low;
  __m512i thirds = _mm512_loadu_si512(p + 2 * kUnit);
  thirds = i < 2 ? _mm512_slli_epi16(thirds, 2 - i) : _mm512_srli_epi16(thirds, i - 2);
  return _mm512_or_si512(low, _mm512_and_si512(thirds, _mm512_set1_epi8(4)));
}

inline __m512 centred_zero(const bf16_t *zero, __m512 scale, int i, float middle) {
  return zero ? _mm512_fmadd_ps(scale, _mm512_set1_ps(middle), Simd::widen(zero + i)) : _mm512_setzero_ps();
}

// The queries of R rows in steps of their own, which serve all blocks whose scales were looked at.
template <int R>
struct Queries {
  float x[R][kMaxDim];
  float step[kFour];
};

template <int R>
void count_in_steps(PackedKeys keys, int blocks, const float *q, int64_t q_stride, Queries<R> &out) {
  __m512 top[kFour];
#pragma GCC unroll 4
  for (int r = 0; r < kFour; ++r) top[r] = _mm512_setzero_ps();
  for (int c = 0; c < keys.d; c += 16) {
    __m256i largest = _mm256_setzero_si256();  // as whole numbers, scales without their sign are in the same order
    for (int b = 0; b < blocks; ++b) {
      __m256i scale = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(keys.scale + int64_t{b} * keys.d + c));
      largest = _mm256_max_epu16(largest, _mm256_and_si256(scale, _mm256_set1_epi16(0x7fff)));
    }
    bf16_t scale[16];
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(scale), largest);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512 product = _mm512_mul_ps(_mm512_loadu_ps(q + r * q_stride + c), Simd::widen(scale));
      top[r] = _mm512_range_ps(top[r], product, 0xb);  // the greater absolute value, positive
    }
  }
  float inverse[kFour];
  __m128 most = _mm_max_ps(max4(top), _mm_set1_ps(kLeast));
  _mm_storeu_ps(inverse, _mm_div_ps(_mm_set1_ps(kMostSteps), most));
  _mm_storeu_ps(out.step, _mm_mul_ps(most, _mm_set1_ps(1.f / kMostSteps)));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < keys.d; c += 16)
      _mm512_storeu_ps(out.x[r] + c, _mm512_mul_ps(_mm512_loadu_ps(q + r * q_stride + c), _mm512_set1_ps(inverse[r])));
    if (keys.d % 32) _mm512_storeu_ps(out.x[r] + keys.d, _mm512_setzero_ps());
  }
}

template <int R>
struct QueryBytes {
  int8_t bytes[R][2 * kMaxDim];  // of each quad of channels the low ones, then the high ones
  float offset[kFour];
};

// Where the bytes of channel c lie, a multiple of 16; its next three quads follow at kQuadStride.
constexpr int first_low_byte(int c) { return c / 32 * 64 + c % 32 / 2; }
constexpr int kQuadStride = 16;

// Scores are `step * (bytes . codes) + offset`.
template <int R, bool Zeros>
inline void fold_query_bytes(PackedKeys keys, const Queries<R> &query, const float *offset, QueryBytes<R> &out,
                         int ahead) {
  if (ahead) {
    prefetch(keys.at(kStretch).scale, 2 * keys.d);  // the next stretch begins with all of its scales
    if (keys.zero) prefetch(keys.at(ahead).zero, 2 * keys.d);
  }
  const __m512i minus_middle = _mm512_set1_epi16(-128), half = _mm512_set1_epi16(128);
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  __m512 offsets[kFour];
  __m512i whole[R];
#pragma GCC unroll 4
  for (int r = 0; r < kFour; ++r) offsets[r] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) whole[r] = _mm512_setzero_si512();
  auto widened = [&](const bf16_t *p, int c) { return c < keys.d ? Simd::widen(p + c) : _mm512_setzero_ps(); };
  for (int c = 0; c < keys.d; c += 32) {
    const __m512 scale[2] = {Simd::widen(keys.scale + c), widened(keys.scale, c + 16)};
    __m512 zero[2];
    if (Zeros) zero[0] = Simd::widen(keys.zero + c), zero[1] = widened(keys.zero, c + 16);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512 x[2] = {_mm512_loadu_ps(query.x[r] + c), _mm512_loadu_ps(query.x[r] + c + 16)};
      __m512i words = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x[0], scale[0])),
                                         _mm512_cvtps_epi32(_mm512_mul_ps(x[1], scale[1])));
      if (Zeros)
        offsets[r] = _mm512_fmadd_ps(x[0], zero[0], _mm512_fmadd_ps(x[1], zero[1], offsets[r]));
      else
        whole[r] = _mm512_dpwssd_epi32(whole[r], words, minus_middle);
      __m512i pairs = _mm512_xor_si512(_mm512_add_epi16(words, half), half);
      _mm512_storeu_si512(out.bytes[r] + 2 * c, _mm512_shuffle_epi8(pairs, order));
    }
  }
  if (!Zeros)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) offsets[r] = _mm512_cvtepi32_ps(whole[r]);
  _mm_storeu_ps(out.offset, _mm_mul_ps(sum4(offsets), _mm_loadu_ps(query.step)));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) out.offset[r] += offset[r];
}

template <int R>
inline void fold_queries(const PackedKeys &keys, const Queries<R> &query, const float *offset, QueryBytes<R> &out,
                         int ahead) {
  keys.zero ? fold_query_bytes<R, true>(keys, query, offset, out, ahead)
            : fold_query_bytes<R, false>(keys, query, offset, out, ahead);
}

// Keeps the largest score of each row in `top` too.
template <int R, int Bits>
void score_block_bytes(PackedKeys keys, const QueryBytes<R> &query, const float *step, float *scores,
                       int64_t stride, __m512 *top, int ahead) {
  __m512i sum[R][2][2];  // row, half of the tokens, digit
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) sum[r][h][0] = sum[r][h][1] = _mm512_setzero_si512();
  for (int c = 0; c < keys.d; c += 16) {
    const uint8_t *codes = keys.codes + c * 4 * Bits;
    const int8_t *bytes = query.bytes[0] + first_low_byte(c);
    if (ahead) prefetch(codes + ahead * int64_t{4} * Bits * keys.d, 64 * Bits);
#pragma GCC unroll 4
    for (int quad = 0; quad < 4; ++quad) {
      __m512i unit[2] = {load_unit<Bits>(codes, 2 * quad), load_unit<Bits>(codes, 2 * quad + 1)};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int8_t *row = bytes + r * 2 * kMaxDim + quad * kQuadStride;
        __m512i low = four_bytes(row), high = four_bytes(row + 4);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          sum[r][h][0] = _mm512_dpbusd_epi32(sum[r][h][0], unit[h], low);
          sum[r][h][1] = _mm512_dpbusd_epi32(sum[r][h][1], unit[h], high);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m512 score = _mm512_fmadd_ps(joined<2>(sum[r][h]), _mm512_set1_ps(step[r]), _mm512_set1_ps(query.offset[r]));
      _mm512_storeu_ps(scores + r * stride + 16 * h, score);
      top[r] = _mm512_max_ps(top[r], score);
    }
}

template <int R>
inline void score_block(const PackedKeys &keys, const QueryBytes<R> &query, const float *step, float *scores,
                        int64_t stride, __m512 *top, int ahead) {
  switch (keys.bits) {
    case 8: score_block_bytes<R, 8>(keys, query, step, scores, stride, top, ahead); break;
    case 4: score_block_bytes<R, 4>(keys, query, step, scores, stride, top, ahead); break;
    case 3: score_block_bytes<R, 3>(keys, query, step, scores, stride, top, ahead); break;
    case 2: score_block_bytes<R, 2>(keys, query, step, scores, stride, top, ahead); break;
  }
}

// scores[r * stride + t] = q[r] . key[t] + offset[r], for one or two blocks.
template <int R>
void packed_scores(const PackedKeys &keys, int blocks, const float *q, int64_t q_stride, const float *offset,
                   float *scores, int64_t stride) {
  Queries<R> queries;
  QueryBytes<R> bytes;
  __m512 top[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) top[r] = _mm512_setzero_ps();
  count_in_steps(keys, blocks, q, q_stride, queries);
  for (int b = 0; b < blocks; ++b) {
    fold_queries(keys.at(b), queries, offset, bytes, 0);
    score_block<R>(keys.at(b), bytes, queries.step, scores + b * kBlock, stride, top, 0);
  }
}

// Values add `step * (bytes . codes) + offset`.
template <int R, int Digits>
struct WeightBytes {
  uint8_t bytes[R][Digits][kTileTokens];  // see token_quad
  float step[kFour], offset[kFour];
};

// Where the bytes of tokens 4 * q to 4 * q + 3 of a tile lie.
constexpr int token_quad(int q) { return 4 * (4 * (q % 4) + q / 4); }

template <int R, int Digits, int Blocks>
inline void fold_weights(PackedValues values, int g, const float *weights, int64_t stride,
                         WeightBytes<R, Digits> &out, int ahead) {
  constexpr float kMost = Digits == 1 ? 255.f : 65535.f;
  // Codes of 8 bits are multiplied as signed numbers: they have no middle.
  const float middle = values.bits == 8 ? 0.f : static_cast<float>((1 << values.bits) - 1) / 2;
  __m512 x[R][2 * Blocks], top[kFour], zero_part[kFour];
#pragma GCC unroll 4
  for (int r = 0; r < kFour; ++r) top[r] = zero_part[r] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int j = 0; j < 2 * Blocks; ++j) {
    const PackedValues block = values.at(j / 2);
    const int i = g * kBlock + j % 2 * 16;
    if (ahead && j % 2 == 0) {
      const PackedValues later = values.at(j / 2 + ahead);
      prefetch(later.scale + i, 2 * kBlock);
      if (values.zero) prefetch(later.zero + i, 2 * kBlock);
    }
    __m512 scale = Simd::widen(block.scale + i), zero = centred_zero(block.zero, scale, i, middle);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512 w = _mm512_loadu_ps(weights + r * stride + 16 * j);
      x[r][j] = _mm512_mul_ps(w, scale);
      top[r] = _mm512_max_ps(top[r], x[r][j]);
      zero_part[r] = _mm512_fmadd_ps(w, zero, zero_part[r]);
    }
  }
  float inverse[kFour];
  __m128 most = _mm_max_ps(max4(top), _mm_set1_ps(kLeast));
  _mm_storeu_ps(inverse, _mm_div_ps(_mm_set1_ps(kMost), most));
  _mm_storeu_ps(out.step, _mm_mul_ps(most, _mm_set1_ps(1.f / kMost)));
  const __m512i low_bytes = _mm512_set1_epi16(0xff);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m512 factor = _mm512_set1_ps(inverse[r]);
    auto steps = [&](int j) {
      return j < 2 * Blocks ? _mm512_cvtps_epi32(_mm512_mul_ps(x[r][j], factor)) : _mm512_setzero_si512();
    };
    __m512i words[2] = {_mm512_packus_epi32(steps(0), steps(1)), _mm512_packus_epi32(steps(2), steps(3))};
    __m512i whole[Digits];
#pragma GCC unroll 4
    for (int digit = 0; digit < Digits; ++digit) {
      __m512i a = words[0], b = words[1];
      if (Digits == 2) {
        a = digit ? _mm512_srli_epi16(a, 8) : _mm512_and_si512(a, low_bytes);
        b = digit ? _mm512_srli_epi16(b, 8) : _mm512_and_si512(b, low_bytes);
      }
      __m512i bytes = _mm512_packus_epi16(a, b);
      _mm512_storeu_si512(out.bytes[r][digit], bytes);
      whole[digit] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes, _mm512_set1_epi8(1));
    }
    zero_part[r] = _mm512_fmadd_ps(joined<Digits>(whole), _mm512_set1_ps(-middle * out.step[r]), zero_part[r]);
  }
  _mm_storeu_ps(out.offset, sum4(zero_part));
}

// Vectors of 16 channels from c on.
template <int R, int Digits, int Bits, int Blocks, int Vectors>
void value_columns_bytes(PackedValues values, const WeightBytes<R, Digits> &weights, int c, float *acc,
                         int64_t acc_stride) {
  __m512i sum[R][Vectors][Digits];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 4
      for (int digit = 0; digit < Digits; ++digit) sum[r][v][digit] = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (int b = 0; b < Blocks; ++b) {
    const uint8_t *codes = values.at(b).codes + c * 4 * Bits;
#pragma GCC unroll 8
    for (int t = 0; t < kUnits; ++t) {  // unrolled, so that shifts are constants and sums stay in registers
      __m512i unit[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        unit[v] = load_unit<Bits>(codes + v * 64 * Bits, t);
        if (Bits == 8) unit[v] = _mm512_xor_si512(unit[v], _mm512_set1_epi8(static_cast<char>(0x80)));  // signed
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int digit = 0; digit < Digits; ++digit) {
          __m512i w = four_bytes(weights.bytes[r][digit] + token_quad(b * kUnits + t));
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) sum[r][v][digit] = _mm512_dpbusd_epi32(sum[r][v][digit], w, unit[v]);
        }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float *to = acc + r * acc_stride + c + 16 * v;
      __m512 before = _mm512_add_ps(_mm512_loadu_ps(to), _mm512_set1_ps(weights.offset[r]));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(joined<Digits>(sum[r][v]), _mm512_set1_ps(weights.step[r]), before));
    }
}

// The channels of group g.
template <int R, int Digits, int Blocks>
inline void add_group(const PackedValues &values, const WeightBytes<R, Digits> &weights, int g, float *acc,
                      int64_t acc_stride) {
  auto run = [&](auto bits) {
    constexpr int kBits = decltype(bits)::value, kWide = Digits == 1 ? 4 : 2;
    int c = g * values.group;
    const int end = c + values.group;
    for (; c + 16 * kWide <= end; c += 16 * kWide)
      value_columns_bytes<R, Digits, kBits, Blocks, kWide>(values, weights, c, acc, acc_stride);
    for (; c < end; c += 16)
      value_columns_bytes<R, Digits, kBits, Blocks, 1>(values, weights, c, acc, acc_stride);
  };
  switch (values.bits) {
    case 8: run(Rows<8>()); break;
    case 4: run(Rows<4>()); break;
    case 3: run(Rows<3>()); break;
    case 2: run(Rows<2>()); break;
  }
}

// acc[r * acc_stride + c] += sum over the tokens t of one or two blocks of weights[r * stride + t] * value[t][c].
template <int R, int Digits>
void packed_values(const PackedValues &values, int blocks, const float *weights, int64_t stride, float *acc,
                   int64_t acc_stride) {
  for (int g = 0; g < values.d / values.group; ++g) {
    WeightBytes<R, Digits> bytes;
    if (blocks == 1) {
      fold_weights<R, Digits, 1>(values, g, weights, stride, bytes, 0);
      add_group<R, Digits, 1>(values, bytes, g, acc, acc_stride);
    } else {
      fold_weights<R, Digits, 2>(values, g, weights, stride, bytes, 0);
      add_group<R, Digits, 2>(values, bytes, g, acc, acc_stride);
    }
  }
}

// `soften` of attend.h for R rows of a tile that all of them see whole; `top` holds the rows' largest scores.
template <int R>
inline void soften_rows(float (*x)[kTile], const __m512 *top, float *reference, float *sum_lanes, float *acc,
                        int64_t acc_stride, int d) {
  float largest[kFour];
  _mm_storeu_ps(largest, max4(top));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    if (!(largest[r] <= reference[r] + kSlack))
      follow(most(reference[r], largest[r]), reference + r, sum_lanes + r * 16, acc + r * acc_stride, d);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    __m512 total = _mm512_loadu_ps(sum_lanes + r * 16), shift = _mm512_set1_ps(reference[r]);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; i += 16) {
      __m512 weight = exp2_vec(_mm512_sub_ps(_mm512_loadu_ps(x[r] + i), shift));
      _mm512_storeu_ps(x[r] + i, weight);
      total = _mm512_add_ps(total, weight);
    }
    _mm512_storeu_ps(sum_lanes + r * 16, total);
  }
}

// `tiles` whole tiles of two blocks, seen whole by R rows whose queries and offsets are scaled for powers of two. The
// next tile's scores are made between the steps of this one: each step then finds what it needs finished, where one
// after the other each would wait for the one before.
template <int R, int Digits>
void attend_run(const PackedKeys &keys, const PackedValues &values, int64_t tiles, const float *q, int64_t q_stride,
                const float *offset, float *reference, float *sum_lanes, float *acc, int64_t acc_stride) {
  Queries<R> queries;
  QueryBytes<R> bytes[2];
  float scores[2][R][kTile];
  __m512 top[2][kFour];
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
    for (int b = 0; b < 2; ++b) fold_queries(keys.at(block + b), queries, offset, bytes[b], kAhead);
#pragma GCC unroll 4
    for (int r = 0; r < kFour; ++r) top[tile % 2][r] = _mm512_set1_ps(-kInf);
  };
  auto score = [&](int64_t tile, int b) {
    float *to = scores[tile % 2][0] + b * kBlock;
    score_block<R>(keys.at(2 * tile + b), bytes[b], queries.step, to, kTile, top[tile % 2], kAhead);
  };
  fold(0), score(0, 0), score(0, 1);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const PackedValues now = values.at(2 * tile);
    float(*x)[kTile] = scores[tile % 2];
    const bool more = tile + 1 < tiles;
    WeightBytes<R, Digits> weights;
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
