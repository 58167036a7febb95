// Attention over a block of 32 quantized tokens, read as packed (the layout is that of quant/layout.py).
//
// Scales never touch the codes: a key's channel scales are folded into the query once per block, a value's token scales
// into the weights, and the zeros become one number a row. What remains are products of small integers with floats, or,
// where the CPU multiplies bytes (AVX-512 VNNI), with 16-bit integers that are split into two bytes.
#pragma once
#include "scalar.h"

namespace {

constexpr int kBlock = 32;  // tokens
constexpr int kUnit = 64;   // codes of a unit: 16 lanes of 4
constexpr int kMaxGroups = 32;

// Where unit u starts, and by how many bits its codes are shifted.
struct Unit {
  Unit(const uint8_t *codes, int u, int bits) : bytes(codes + u / (8 / bits) * kUnit), shift(u % (8 / bits) * bits) {}
  const uint8_t *bytes;
  int shift;
};

// A query with a block's key scales folded in: score = sum of q * code, plus the offset returned. d is a multiple of 16.
inline float fold_query(const float *query, const bf16_t *scale, const bf16_t *zero, const float *mean, int d, float *q) {
  Simd::Vec offset = Simd::set(0.f);
  for (int c = 0; c < d; c += Simd::kLanes) {
    Simd::Vec x = Simd::load(query + c);
    Simd::store(q + c, Simd::mul(x, Simd::widen(scale + c)));
    offset = Simd::fma(x, Simd::add(Simd::widen(zero + c), Simd::load(mean + c)), offset);
  }
  return Simd::sum(offset);
}

// Weights with a block's value scales folded in, for each group of channels, and the sums of weight * zero.
inline void fold_weights(const float *weights, const bf16_t *scale, const bf16_t *zero, int groups, float *w,
                         float *offset) {
  for (int g = 0; g < groups; ++g, scale += kBlock, zero += kBlock, w += kBlock) {
    Simd::Vec sum = Simd::set(0.f);
    for (int t = 0; t < kBlock; t += Simd::kLanes) {
      Simd::Vec weight = Simd::load(weights + t);
      Simd::store(w + t, Simd::mul(weight, Simd::widen(scale + t)));
      sum = Simd::fma(weight, Simd::widen(zero + t), sum);
    }
    offset[g] = Simd::sum(sum);
  }
}

// scores[r * stride + t] = sum over c of q[r][c] * code[t][c], plus offset[r].
template <int R>
void packed_scores(const float *q, int64_t q_stride, const float *offset, const uint8_t *codes, int bits, int d_pad,
                   float *scores, int64_t stride) {
  constexpr int kParts = kBlock / Simd::kLanes, kHalf = kParts / 2;
  const uint32_t mask = (1u << bits) - 1;
  Simd::Vec sum[R][kParts];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < kParts; ++p) sum[r][p] = Simd::set(offset[r]);
  for (int c = 0; c < d_pad / 4; ++c)
    for (int p = 0; p < kParts; ++p) {
      Unit unit(codes, 2 * c + p / kHalf, bits);
      const uint8_t *lanes = unit.bytes + p % kHalf * 4 * Simd::kLanes;
      for (int j = 0; j < 4; ++j) {
        Simd::Vec code = Simd::codes(lanes, unit.shift + 8 * j, mask);
        for (int r = 0; r < R; ++r) sum[r][p] = Simd::fma(Simd::set(q[r * q_stride + 4 * c + j]), code, sum[r][p]);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < kParts; ++p) Simd::store(scores + r * stride + p * Simd::kLanes, sum[r][p]);
}

// acc[r][c] += sum over t of w[r][group of c][t] * code[t][c], plus offset[r][group of c].
template <int R>
void packed_values(const float *w, const float *offset, int groups, int group_size, const uint8_t *codes, int bits,
                   int d_pad, float *acc, int64_t stride) {
  const uint32_t mask = (1u << bits) - 1;
  for (int c = 0; c < d_pad; c += Simd::kLanes) {
    int g = least(c / group_size, groups - 1);
    Simd::Vec sum[R][4];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 4; ++j) sum[r][j] = Simd::set(j ? 0.f : offset[r * kMaxGroups + g]);
    for (int t = 0; t < kBlock / 4; ++t) {
      Unit unit(codes, c / 16 * (kBlock / 4) + t, bits);
      for (int j = 0; j < 4; ++j) {
        Simd::Vec code = Simd::codes(unit.bytes + c % 16 * 4, unit.shift + 8 * j, mask);
        for (int r = 0; r < R; ++r)
          sum[r][j] = Simd::fma(Simd::set(w[(r * kMaxGroups + g) * kBlock + 4 * t + j]), code, sum[r][j]);
      }
    }
    for (int r = 0; r < R; ++r) {
      float *to = acc + r * stride + c;
      Simd::Vec all = Simd::add(Simd::add(sum[r][0], sum[r][1]), Simd::add(sum[r][2], sum[r][3]));
      Simd::store(to, Simd::add(Simd::load(to), all));
    }
  }
}

#ifdef __AVX512VNNI__
// Numbers as 256 * high + low, in units of the returned step: 16 bits in all, each part a signed byte.
inline float split_bytes(const float *x, int n, int8_t *high, int8_t *low) {
  __m512 top = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  float largest = _mm512_reduce_max_ps(top), step = largest / 32512.f;
  __m512 inverse = _mm512_set1_ps(largest > 0 ? 32512.f / largest : 0.f);
  for (int i = 0; i < n; i += 16) {
    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
    __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    __m512i lower = _mm512_sub_epi32(whole, _mm512_slli_epi32(upper, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(high + i), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(low + i), _mm512_cvtepi32_epi8(lower));
  }
  return step;
}

inline __m512i four_bytes(const int8_t *p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// The next units from p on, one after the other: those that share 64 bytes, or with 8 bits two of 64 bytes each. Their
// number is known when this is compiled, so that sums can stay in registers.
template <int Bits>
constexpr int kUnitsAtOnce = Bits == 2 ? 4 : 2;

template <int Bits, typename F>
__attribute__((always_inline)) inline void each_unit(const uint8_t *p, F f) {
  __m512i bytes = _mm512_loadu_si512(p);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << Bits) - 1));
  if constexpr (Bits == 8) {
    f(0, bytes);
    f(1, _mm512_loadu_si512(p + kUnit));
  }
  if constexpr (Bits == 4) {
    f(0, _mm512_and_si512(bytes, mask));
    f(1, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask));
  }
  if constexpr (Bits == 2) {
    f(0, _mm512_and_si512(bytes, mask));
    f(1, _mm512_and_si512(_mm512_srli_epi16(bytes, 2), mask));
    f(2, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask));
    f(3, _mm512_and_si512(_mm512_srli_epi16(bytes, 6), mask));
  }
}

inline __m512 joined(__m512i high, __m512i low, float step) {
  __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(step));
}

template <int R, int Bits>
void packed_scores_bytes(const float *q, int64_t q_stride, const float *offset, const uint8_t *codes, int d_pad,
                         float *scores, int64_t stride) {
  int8_t high[R][512], low[R][512];
  float step[R];
  __m512i upper[R][2], lower[R][2];
  for (int r = 0; r < R; ++r) {
    step[r] = split_bytes(q + r * q_stride, d_pad, high[r], low[r]);
    for (int h = 0; h < 2; ++h) upper[r][h] = lower[r][h] = _mm512_setzero_si512();
  }
  for (int u = 0; u < d_pad / 2; u += kUnitsAtOnce<Bits>)
    each_unit<Bits>(codes + u * kUnit * Bits / 8, [&](int i, __m512i unit) __attribute__((always_inline)) {
      int c = u / 2 + i / 2, h = i % 2;
      for (int r = 0; r < R; ++r) {
        upper[r][h] = _mm512_dpbusd_epi32(upper[r][h], unit, four_bytes(high[r] + 4 * c));
        lower[r][h] = _mm512_dpbusd_epi32(lower[r][h], unit, four_bytes(low[r] + 4 * c));
      }
    });
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h)
      _mm512_storeu_ps(scores + r * stride + 16 * h,
                       _mm512_add_ps(joined(upper[r][h], lower[r][h], step[r]), _mm512_set1_ps(offset[r])));
}

template <int R, int Bits>
void packed_values_bytes(const float *w, const float *offset, int groups, int group_size, const uint8_t *codes,
                         int d_pad, float *acc, int64_t stride) {
  int8_t high[R][kMaxGroups * kBlock], low[R][kMaxGroups * kBlock];
  float step[R][kMaxGroups];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < groups; ++g)
      step[r][g] = split_bytes(w + (r * kMaxGroups + g) * kBlock, kBlock, high[r] + g * kBlock, low[r] + g * kBlock);
  for (int c = 0; c < d_pad / 16; ++c) {
    int g = least(c * 16 / group_size, groups - 1);
    __m512i upper[R], lower[R];
    for (int r = 0; r < R; ++r) upper[r] = lower[r] = _mm512_setzero_si512();
    for (int t = 0; t < kBlock / 4; t += kUnitsAtOnce<Bits>)
      each_unit<Bits>(codes + (c * (kBlock / 4) + t) * kUnit * Bits / 8, [&](int i, __m512i unit)
                          __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r) {
          upper[r] = _mm512_dpbusd_epi32(upper[r], unit, four_bytes(high[r] + g * kBlock + 4 * (t + i)));
          lower[r] = _mm512_dpbusd_epi32(lower[r], unit, four_bytes(low[r] + g * kBlock + 4 * (t + i)));
        }
      });
    for (int r = 0; r < R; ++r) {
      float *to = acc + r * stride + 16 * c;
      __m512 sum = _mm512_add_ps(joined(upper[r], lower[r], step[r][g]), _mm512_set1_ps(offset[r * kMaxGroups + g]));
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum));
    }
  }
}
#endif

}  // namespace
