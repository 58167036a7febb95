// Packed blocks with products of bytes (AVX-512 VNNI). Queries and weights, with their scales folded in, become 16-bit
// integers in units of a step for each row, and those two signed bytes each, `256 * high + low`.
#pragma once
#include <immintrin.h>

namespace {

constexpr int kFour = 4;  // rows whose maxima and sums are taken together
constexpr int kMaxBlocks = 2;
constexpr int kAhead = 4;  // blocks that are on their way from memory to the second-level cache

template <typename F>
inline __m128 reduce4(const __m512 *x, F f) {
  __m256 half[kFour];
  for (int i = 0; i < kFour; ++i) half[i] = f(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));
  __m256 a = f(_mm256_unpacklo_ps(half[0], half[1]), _mm256_unpackhi_ps(half[0], half[1]));
  __m256 b = f(_mm256_unpacklo_ps(half[2], half[3]), _mm256_unpackhi_ps(half[2], half[3]));
  __m256 c = f(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  return _mm256_castps256_ps128(f(c, _mm256_permute2f128_ps(c, c, 1)));
}

// The rows of a block's folded queries or weights on the way to bytes. Their maxima give the steps. Codes count from
// the middle of their range, so that the rounding of a step is multiplied by less: the zeros contribute with the exact
// numbers, the middle with the same whole steps that multiply the codes.
template <int R>
struct Folding {
  Folding() {
    for (int r = 0; r < kFour; ++r) top[r] = zero_part[r] = _mm512_setzero_ps(), whole[r] = _mm512_setzero_si512();
  }
  void add(int r, __m512 x, __m512 folded, __m512 zero) {
    top[r] = _mm512_range_ps(top[r], folded, 0xb);  // the greater absolute value, positive
    zero_part[r] = _mm512_fmadd_ps(x, zero, zero_part[r]);
  }
  void find_steps() {
    __m128 largest = reduce4(top, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
    largest = _mm_max_ps(largest, _mm_set1_ps(1e-30f));
    _mm_storeu_ps(inverse, _mm_div_ps(_mm_set1_ps(32512.f), largest));
    _mm_storeu_ps(step, _mm_mul_ps(largest, _mm_set1_ps(1.f / 32512.f)));
  }
  // 32 numbers as bytes: of the quads l and 4 + l the low and the high bytes at 16 * l: low, high, low, high.
  void split(int r, const float *x, int middle, int8_t *bytes) {
    const __m512 factor = _mm512_set1_ps(inverse[r]);
    __m512i words = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), factor)),
                                       _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), factor)));
    whole[r] = _mm512_dpwssd_epi32(whole[r], words, _mm512_set1_epi16(static_cast<int16_t>(-middle)));
    const __m512i half = _mm512_set1_epi16(128);
    __m512i pairs = _mm512_xor_si512(_mm512_add_epi16(words, half), half);
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    _mm512_storeu_si512(bytes, _mm512_shuffle_epi8(pairs, order));
  }
  void sums(float *offset) {
    for (int r = 0; r < R; ++r)
      zero_part[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r]), _mm512_set1_ps(step[r]), zero_part[r]);
    _mm_storeu_ps(offset, reduce4(zero_part, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); }));
  }
  __m512 top[kFour], zero_part[kFour];
  __m512i whole[kFour];
  float inverse[kFour], step[kFour];
};

inline __m512i four_bytes(const int8_t *p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// The low and the high bytes of quad q of 32 numbers, see Folding.
inline const int8_t *low_quad(const int8_t *bytes, int q) { return bytes + q % 4 * 16 + q / 4 * 8; }
inline const int8_t *high_quad(const int8_t *bytes, int q) { return low_quad(bytes, q) + 4; }

inline __m512 joined(__m512i high, __m512i low, float step, __m512 offset) {
  __m512 whole = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.f), _mm512_cvtepi32_ps(low));
  return _mm512_fmadd_ps(whole, _mm512_set1_ps(step), offset);
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

template <int R>
struct QueryBytes {
  int8_t bytes[R][2 * kMaxDim];
  float step[kFour], offset[kFour];
};

template <int R>
inline void fold_queries(const PackedKeys &keys, const float *q, int64_t q_stride, const float *offset,
                         QueryBytes<R> &out, int ahead) {
  if (ahead) {
    const PackedKeys later = keys.at(ahead);
    prefetch(later.scale, 2 * keys.d);
    if (keys.zero) prefetch(later.zero, 2 * keys.d);
  }
  float folded[R][kMaxDim];
  Folding<R> folding;
  const int middle = 1 << (keys.bits - 1);
  for (int c = 0; c < keys.d; c += 16) {
    __m512 scale = Simd::widen(keys.scale + c), zero = centred_zero(keys.zero, scale, c, static_cast<float>(middle));
    for (int r = 0; r < R; ++r) {
      __m512 x = _mm512_loadu_ps(q + r * q_stride + c), product = _mm512_mul_ps(x, scale);
      _mm512_storeu_ps(folded[r] + c, product);
      folding.add(r, x, product, zero);
    }
  }
  if (keys.d % 32)
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(folded[r] + keys.d, _mm512_setzero_ps());
  folding.find_steps();
  for (int c = 0; c < keys.d; c += 32)
    for (int r = 0; r < R; ++r) folding.split(r, folded[r] + c, middle, out.bytes[r] + 2 * c);
  folding.sums(out.offset);
  for (int r = 0; r < R; ++r) out.step[r] = folding.step[r], out.offset[r] += offset[r];
}

template <int R, int Bits>
void score_block_bytes(const PackedKeys &keys, const QueryBytes<R> &query, float *scores, int64_t stride, int ahead) {
  __m512i high[R][2], low[R][2];
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h) high[r][h] = low[r][h] = _mm512_setzero_si512();
  // Quads of 16 channels, q0 / 4 of 32.
  const int64_t later = ahead * int64_t{4} * Bits * keys.d;
  auto sixteen = [&](const uint8_t *codes, const int8_t *bytes, int q0) __attribute__((always_inline)) {
    if (ahead) prefetch(codes + later, 64 * Bits);
#pragma GCC unroll 4
    for (int quad = 0; quad < 4; ++quad) {
      __m512i unit[2] = {load_unit<Bits>(codes, 2 * quad), load_unit<Bits>(codes, 2 * quad + 1)};
      for (int r = 0; r < R; ++r) {
        const int8_t *row = bytes + r * 2 * kMaxDim;
        __m512i x = four_bytes(low_quad(row, q0 + quad)), y = four_bytes(high_quad(row, q0 + quad));
        for (int h = 0; h < 2; ++h) {
          low[r][h] = _mm512_dpbusd_epi32(low[r][h], unit[h], x);
          high[r][h] = _mm512_dpbusd_epi32(high[r][h], unit[h], y);
        }
      }
    }
  };
  for (int c = 0; c < keys.d; c += 32) {
    sixteen(keys.codes + c * 4 * Bits, query.bytes[0] + 2 * c, 0);
    if (c + 16 < keys.d) sixteen(keys.codes + (c + 16) * 4 * Bits, query.bytes[0] + 2 * c, 4);
  }
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h)
      _mm512_storeu_ps(scores + r * stride + 16 * h,
                       joined(high[r][h], low[r][h], query.step[r], _mm512_set1_ps(query.offset[r])));
}

template <int R>
inline void score_block(const PackedKeys &keys, const QueryBytes<R> &query, float *scores, int64_t stride, int ahead) {
  switch (keys.bits) {
    case 8: score_block_bytes<R, 8>(keys, query, scores, stride, ahead); break;
    case 4: score_block_bytes<R, 4>(keys, query, scores, stride, ahead); break;
    case 3: score_block_bytes<R, 3>(keys, query, scores, stride, ahead); break;
    case 2: score_block_bytes<R, 2>(keys, query, scores, stride, ahead); break;
  }
}

// scores[r * stride + t] = q[r] . key[t] + offset[r], for one or two blocks.
template <int R>
void packed_scores(const PackedKeys &keys, int blocks, const float *q, int64_t q_stride, const float *offset,
                   float *scores, int64_t stride) {
  for (int b = 0; b < blocks; ++b) {
    QueryBytes<R> query;
    fold_queries(keys.at(b), q, q_stride, offset, query, 0);
    score_block<R>(keys.at(b), query, scores + b * kBlock, stride, 0);
  }
}

template <int R>
struct WeightBytes {
  int8_t bytes[R][kMaxBlocks][kUnit];
  float step[kFour], offset[kFour];
};

template <int R, int Blocks>
inline void fold_weights(const PackedValues &values, int g, const float *weights, int64_t stride,
                         WeightBytes<R> &out, int ahead) {
  float folded[R][Blocks * kBlock];
  Folding<R> folding;
  const int middle = 1 << (values.bits - 1);
  for (int b = 0; b < Blocks; ++b) {
    PackedValues block = values.at(b);
    if (ahead) {
      const PackedValues later = values.at(b + ahead);
      prefetch(later.scale + g * kBlock, 2 * kBlock);
      if (values.zero) prefetch(later.zero + g * kBlock, 2 * kBlock);
    }
    for (int t = 0; t < kBlock; t += 16) {
      const int i = g * kBlock + t;
      __m512 scale = Simd::widen(block.scale + i), zero = centred_zero(block.zero, scale, i, static_cast<float>(middle));
      for (int r = 0; r < R; ++r) {
        __m512 w = _mm512_loadu_ps(weights + r * stride + b * kBlock + t), product = _mm512_mul_ps(w, scale);
        _mm512_storeu_ps(folded[r] + b * kBlock + t, product);
        folding.add(r, w, product, zero);
      }
    }
  }
  folding.find_steps();
  for (int b = 0; b < Blocks; ++b)
    for (int r = 0; r < R; ++r) folding.split(r, folded[r] + b * kBlock, middle, out.bytes[r][b]);
  folding.sums(out.offset);
  for (int r = 0; r < R; ++r) out.step[r] = folding.step[r];
}

// Vectors of 16 channels from c on.
template <int R, int Bits, int Blocks, int Vectors>
void value_columns_bytes(const PackedValues &values, const WeightBytes<R> &weights, int c, float *acc,
                         int64_t acc_stride, int ahead) {
  __m512i high[R][Vectors], low[R][Vectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < Vectors; ++v) high[r][v] = low[r][v] = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (int b = 0; b < Blocks; ++b) {
    const uint8_t *codes = values.at(b).codes + c * 4 * Bits;
    if (ahead) prefetch(codes + ahead * int64_t{4} * Bits * values.d, Vectors * 64 * Bits);
#pragma GCC unroll 8
    for (int t = 0; t < kUnits; ++t) {  // unrolled, so that shifts are constants and sums stay in registers
      __m512i unit[Vectors];
      for (int v = 0; v < Vectors; ++v) unit[v] = load_unit<Bits>(codes + v * 64 * Bits, t);
      for (int r = 0; r < R; ++r) {
        __m512i x = four_bytes(low_quad(weights.bytes[r][b], t)), y = four_bytes(high_quad(weights.bytes[r][b], t));
        for (int v = 0; v < Vectors; ++v) {
          low[r][v] = _mm512_dpbusd_epi32(low[r][v], unit[v], x);
          high[r][v] = _mm512_dpbusd_epi32(high[r][v], unit[v], y);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < Vectors; ++v) {
      float *to = acc + r * acc_stride + c + 16 * v;
      __m512 before = _mm512_add_ps(_mm512_loadu_ps(to), _mm512_set1_ps(weights.offset[r]));
      _mm512_storeu_ps(to, joined(high[r][v], low[r][v], weights.step[r], before));
    }
}

// The channels of group g.
template <int R, int Blocks>
inline void add_group(const PackedValues &values, const WeightBytes<R> &weights, int g, float *acc, int64_t acc_stride,
                      int ahead) {
  auto run = [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    int c = g * values.group;
    const int end = c + values.group;
    for (; c + 32 <= end; c += 32) value_columns_bytes<R, kBits, Blocks, 2>(values, weights, c, acc, acc_stride, ahead);
    if (c < end) value_columns_bytes<R, kBits, Blocks, 1>(values, weights, c, acc, acc_stride, ahead);
  };
  switch (values.bits) {
    case 8: run(Rows<8>()); break;
    case 4: run(Rows<4>()); break;
    case 3: run(Rows<3>()); break;
    case 2: run(Rows<2>()); break;
  }
}

// acc[r * acc_stride + c] += sum over the tokens t of one or two blocks of weights[r * stride + t] * value[t][c].
template <int R>
void packed_values(const PackedValues &values, int blocks, const float *weights, int64_t stride, float *acc,
                   int64_t acc_stride) {
  for (int g = 0; g < values.d / values.group; ++g) {
    WeightBytes<R> bytes;
    if (blocks == 1) {
      fold_weights<R, 1>(values, g, weights, stride, bytes, 0);
      add_group<R, 1>(values, bytes, g, acc, acc_stride, 0);
    } else {
      fold_weights<R, 2>(values, g, weights, stride, bytes, 0);
      add_group<R, 2>(values, bytes, g, acc, acc_stride, 0);
    }
  }
}

// `soften` of attend.h for R rows of a tile that all of them see whole.
template <int R>
inline void soften_rows(float (*x)[kTile], float factor, float *reference, float *sum_lanes, float *acc,
                        int64_t acc_stride, int d) {
  constexpr int kParts = kTile / 16;
  bool within = true;
  for (int r = 0; r < R; ++r) {
    __m512 top = _mm512_set1_ps(-kInf);
    for (int i = 0; i < kParts; ++i) {
      __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x[r] + 16 * i), _mm512_set1_ps(factor));
      _mm512_storeu_ps(x[r] + 16 * i, scaled);
      top = _mm512_max_ps(top, scaled);
    }
    within &= Simd::all_at_most(top, reference[r] + kSlack);
  }
  if (!within)
    for (int r = 0; r < R; ++r) {
      __m512 top = _mm512_set1_ps(reference[r]);
      for (int i = 0; i < kParts; ++i) top = _mm512_max_ps(top, _mm512_loadu_ps(x[r] + 16 * i));
      follow(Simd::max_lane(top), reference + r, sum_lanes + r * 16, acc + r * acc_stride, d);
    }
  for (int r = 0; r < R; ++r) {
    __m512 total = _mm512_loadu_ps(sum_lanes + r * 16), shift = _mm512_set1_ps(reference[r]);
    for (int i = 0; i < kParts; ++i) {
      __m512 weight = exp2_vec(_mm512_sub_ps(_mm512_loadu_ps(x[r] + 16 * i), shift));
      _mm512_storeu_ps(x[r] + 16 * i, weight);
      total = _mm512_add_ps(total, weight);
    }
    _mm512_storeu_ps(sum_lanes + r * 16, total);
  }
}

// `tiles` whole tiles of two blocks, seen whole by R rows. The next tile's scores are made between the steps of this
// one: each step then finds what it needs finished, where one after the other each would wait for the one before.
template <int R>
void attend_run(const PackedKeys &keys, const PackedValues &values, int64_t tiles, const float *q, int64_t q_stride,
                const float *offset, float factor, float *reference, float *sum_lanes, float *acc, int64_t acc_stride) {
  QueryBytes<R> queries[2];
  float scores[2][R][kTile];
  auto fold = [&](int64_t tile, int b) {
    fold_queries(keys.at(2 * tile + b), q, q_stride, offset, queries[b], kAhead);
  };
  auto score = [&](int64_t tile, int b) {
    score_block<R>(keys.at(2 * tile + b), queries[b], scores[tile % 2][0] + b * kBlock, kTile, kAhead);
  };
  for (int b = 0; b < 2; ++b) fold(0, b), score(0, b);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const PackedValues now = values.at(2 * tile);
    float(*x)[kTile] = scores[tile % 2];
    const bool more = tile + 1 < tiles;
    WeightBytes<R> weights;
    if (more) fold(tile + 1, 0), fold(tile + 1, 1);
    soften_rows<R>(x, factor, reference, sum_lanes, acc, acc_stride, keys.d);
    if (more) score(tile + 1, 0);
    fold_weights<R, 2>(now, 0, x[0], kTile, weights, kAhead);
    if (more) score(tile + 1, 1);
    add_group<R, 2>(now, weights, 0, acc, acc_stride, kAhead);
    for (int g = 1; g < now.d / now.group; ++g) {
      fold_weights<R, 2>(now, g, x[0], kTile, weights, kAhead);
      add_group<R, 2>(now, weights, g, acc, acc_stride, kAhead);
    }
  }
}

}  // namespace
