// Dot products of packed codes as bytes (AVX-512 VNNI). Quantized queries and weights are split into bytes too, called
// limbs here:
//
// - a query has two signed limbs, `256 * high + low`;
// - a weight has two unsigned limbs, or one where the model is bf16: its rounding error is then as large as that of
//   kernels that round weights to bf16.
//
// Values are centred: the midpoint of the codes times the sum of the quantized weights is subtracted. A weight's
// rounding error is therefore multiplied by a code's distance from the midpoint, not by the code. Zero points are
// multiplied by the exact weights.
//
// Loops over rows are unrolled by pragmas: otherwise GCC keeps arrays of vectors in memory, where 512-bit stores take
// two cycles. Blocks are passed by value, since a store of bytes may change anything that is reached through a
// reference.
#pragma once
#include <immintrin.h>

namespace {

constexpr int kFineLimbs = 2;  // limbs of a weight where one is too coarse

inline __m512i broadcast_4_bytes(const void *p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// `256 * high + low` as floats, or `low` alone where there is one limb.
template <int Limbs>
inline __m512 join_limbs(const __m512i *limbs) {
  __m512 low = _mm512_cvtepi32_ps(limbs[0]);
  return Limbs == 1 ? low : _mm512_fmadd_ps(_mm512_cvtepi32_ps(limbs[Limbs - 1]), _mm512_set1_ps(256.f), low);
}

// Unit i of 16 channels of a block. Their codes start at p.
template <int Bits>
__attribute__((always_inline)) inline __m512i load_unit(const uint8_t *p, int i) {
  constexpr int kLow = Bits == 3 ? 2 : Bits, kShared = 8 / kLow;
  __m512i bytes = _mm512_loadu_si512(p + i / kShared * kUnit);
  if (Bits == 8) return bytes;
  __m512i low = _mm512_srli_epi16(bytes, i % kShared * kLow);
  low = _mm512_and_si512(low, _mm512_set1_epi8(static_cast<char>((1 << kLow) - 1)));
  if (Bits != 3) return low;
  __m512i high = _mm512_loadu_si512(p + 2 * kUnit);
  high = i < 2 ? _mm512_slli_epi16(high, 2 - i) : _mm512_srli_epi16(high, i - 2);
  return _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi8(4)));
}

inline __m512 centred_zero(const bf16_t *zero, __m512 scale, int i, float midpoint) {
  return zero ? _mm512_fmadd_ps(scale, _mm512_set1_ps(midpoint), Simd::widen(zero + i)) : _mm512_setzero_ps();
}

template <int R>
struct FoldedQueries {
  int8_t bytes[R][2 * kMaxDim];  // for each quad of channels 4 low limbs, then 4 high ones
  float offset[kPackedRows];
};

// Where the bytes of channel c (a multiple of 16) begin. The next three quads lie kQuadStride apart.
constexpr int query_byte(int c) { return c / 32 * 64 + c % 32 / 2; }
constexpr int kQuadStride = 16;

// Scores are `scale * (bytes . codes) + offset`.
template <int R, bool Zeros>
inline void fold_query_bytes(PackedKeys keys, const Queries<R> &query, const float *offset, FoldedQueries<R> &out,
                             int ahead) {
  if (ahead) {
    prefetch(keys.at(kScaleBlocks).scale, 2 * keys.d);  // quantize_queries will read them all
    if (keys.zero) prefetch(keys.at(ahead).zero, 2 * keys.d);
  }
  const __m512i minus_midpoint = _mm512_set1_epi16(-128), half = _mm512_set1_epi16(128);
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  __m512 offsets[kPackedRows];
  __m512i word_sums[R];
#pragma GCC unroll 4
  for (int r = 0; r < kPackedRows; ++r) offsets[r] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) word_sums[r] = _mm512_setzero_si512();
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
        word_sums[r] = _mm512_dpwssd_epi32(word_sums[r], words, minus_midpoint);
      __m512i pairs = _mm512_xor_si512(_mm512_add_epi16(words, half), half);
      _mm512_storeu_si512(out.bytes[r] + 2 * c, _mm512_shuffle_epi8(pairs, order));
    }
  }
  if (!Zeros)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) offsets[r] = _mm512_cvtepi32_ps(word_sums[r]);
  float sums[kPackedRows];
  Simd::sum4(offsets[0], offsets[1], offsets[2], offsets[3], sums);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) out.offset[r] = sums[r] * query.scale[r] + offset[r];
}

template <int R>
inline void fold_queries(const PackedKeys &keys, const Queries<R> &query, const float *offset, FoldedQueries<R> &out,
                         int ahead) {
  keys.zero ? fold_query_bytes<R, true>(keys, query, offset, out, ahead)
            : fold_query_bytes<R, false>(keys, query, offset, out, ahead);
}

// Also raises `row_max` to the largest score of each row.
template <int R, int Bits>
void score_codes(PackedKeys keys, const FoldedQueries<R> &query, const float *scale, float *scores, int64_t stride,
                 __m512 *row_max, int ahead) {
  __m512i sum[R][2][2];  // row, half of the tokens, limb
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) sum[r][h][0] = sum[r][h][1] = _mm512_setzero_si512();
  for (int c = 0; c < keys.d; c += 16) {
    const uint8_t *codes = keys.codes + c * 4 * Bits;
    const int8_t *bytes = query.bytes[0] + query_byte(c);
    if (ahead) prefetch(codes + ahead * int64_t{4} * Bits * keys.d, 64 * Bits);
#pragma GCC unroll 4
    for (int quad = 0; quad < 4; ++quad) {
      __m512i unit[2] = {load_unit<Bits>(codes, 2 * quad), load_unit<Bits>(codes, 2 * quad + 1)};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int8_t *row = bytes + r * 2 * kMaxDim + quad * kQuadStride;
        __m512i low = broadcast_4_bytes(row), high = broadcast_4_bytes(row + 4);
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
      __m512 score =
          _mm512_fmadd_ps(join_limbs<2>(sum[r][h]), _mm512_set1_ps(scale[r]), _mm512_set1_ps(query.offset[r]));
      _mm512_storeu_ps(scores + r * stride + 16 * h, score);
      row_max[r] = _mm512_max_ps(row_max[r], score);
    }
}

// Weighted sums of values are `scale * (bytes . codes) + offset`.
template <int R, int Limbs>
struct FoldedWeights {
  uint8_t bytes[R][Limbs][kTile];  // see token_quad
  float scale[kPackedRows], offset[kPackedRows];
};

// Where the bytes of tokens 4 * q to 4 * q + 3 of a tile lie.
constexpr int token_quad(int q) { return 4 * (4 * (q % 4) + q / 4); }

template <int R, int Limbs, int Blocks>
inline void fold_weights(PackedValues values, int g, const float *weights, int64_t stride, FoldedWeights<R, Limbs> &out,
                         int ahead) {
  constexpr float kMaxWeight = Limbs == 1 ? 255.f : 65535.f;
  // Codes of 8 bits are multiplied as signed numbers, whose midpoint is 0.
  const float midpoint = values.bits == 8 ? 0.f : static_cast<float>((1 << values.bits) - 1) / 2;
  __m512 x[R][2 * Blocks], abs_max[kPackedRows], zero_sum[kPackedRows];
#pragma GCC unroll 4
  for (int r = 0; r < kPackedRows; ++r) abs_max[r] = _mm512_set1_ps(kMinAbsMax), zero_sum[r] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int j = 0; j < 2 * Blocks; ++j) {
    const PackedValues block = values.at(j / 2);
    const int i = g * kBlock + j % 2 * 16;
    if (ahead && j % 2 == 0) {
      const PackedValues later = values.at(j / 2 + ahead);
      prefetch(later.scale + i, 2 * kBlock);
      if (values.zero) prefetch(later.zero + i, 2 * kBlock);
    }
    __m512 scale = Simd::widen(block.scale + i), zero = centred_zero(block.zero, scale, i, midpoint);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512 w = _mm512_loadu_ps(weights + r * stride + 16 * j);
      x[r][j] = _mm512_mul_ps(w, scale);
      abs_max[r] = _mm512_max_ps(abs_max[r], x[r][j]);
      zero_sum[r] = _mm512_fmadd_ps(w, zero, zero_sum[r]);
    }
  }
  float inverse[kPackedRows];
  choose_scales(abs_max, kMaxWeight, out.scale, inverse);
  const __m512i low_bytes = _mm512_set1_epi16(0xff);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m512 factor = _mm512_set1_ps(inverse[r]);
    auto quantized = [&](int j) {
      return j < 2 * Blocks ? _mm512_cvtps_epi32(_mm512_mul_ps(x[r][j], factor)) : _mm512_setzero_si512();
    };
    __m512i words[2] = {_mm512_packus_epi32(quantized(0), quantized(1)),
                        _mm512_packus_epi32(quantized(2), quantized(3))};
    __m512i byte_sums[Limbs];
#pragma GCC unroll 4
    for (int limb = 0; limb < Limbs; ++limb) {
      __m512i a = words[0], b = words[1];
      if (Limbs == 2) {
        a = limb ? _mm512_srli_epi16(a, 8) : _mm512_and_si512(a, low_bytes);
        b = limb ? _mm512_srli_epi16(b, 8) : _mm512_and_si512(b, low_bytes);
      }
      __m512i bytes = _mm512_packus_epi16(a, b);
      _mm512_storeu_si512(out.bytes[r][limb], bytes);
      byte_sums[limb] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes, _mm512_set1_epi8(1));
    }
    zero_sum[r] = _mm512_fmadd_ps(join_limbs<Limbs>(byte_sums), _mm512_set1_ps(-midpoint * out.scale[r]), zero_sum[r]);
  }
  Simd::sum4(zero_sum[0], zero_sum[1], zero_sum[2], zero_sum[3], out.offset);
}

constexpr int wide_columns(int limbs) { return limbs == 1 ? 4 : 2; }

// Vectors of 16 channels from c on.
template <int R, int Limbs, int Bits, int Blocks, int Vectors>
void add_columns(PackedValues values, const FoldedWeights<R, Limbs> &weights, int c, float *acc, int64_t acc_stride) {
  __m512i sum[R][Vectors][Limbs];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 4
      for (int limb = 0; limb < Limbs; ++limb) sum[r][v][limb] = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (int b = 0; b < Blocks; ++b) {
    const uint8_t *codes = values.at(b).codes + c * 4 * Bits;
#pragma GCC unroll 8
    for (int t = 0; t < kUnits; ++t) {  // unrolled: shifts are then constants, and sums stay in registers
      __m512i unit[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        unit[v] = load_unit<Bits>(codes + v * 64 * Bits, t);
        if (Bits == 8) unit[v] = _mm512_xor_si512(unit[v], _mm512_set1_epi8(static_cast<char>(0x80)));  // signed
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int limb = 0; limb < Limbs; ++limb) {
          __m512i w = broadcast_4_bytes(weights.bytes[r][limb] + token_quad(b * kUnits + t));
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) sum[r][v][limb] = _mm512_dpbusd_epi32(sum[r][v][limb], w, unit[v]);
        }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float *to = acc + r * acc_stride + c + 16 * v;
      __m512 before = _mm512_add_ps(_mm512_loadu_ps(to), _mm512_set1_ps(weights.offset[r]));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(join_limbs<Limbs>(sum[r][v]), _mm512_set1_ps(weights.scale[r]), before));
    }
}

}  // namespace
