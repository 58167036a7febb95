// Dot products of packed codes as bytes (AVX-512 VNNI). Quantized queries and weights are split into bytes too, called
// limbs here:
//
// - a query has two signed limbs, `256 * high + low`;
// - a weight has two unsigned limbs, or one where the model is bf16: its rounding error is then as large as that of
//   kernels that round weights to bf16.
//
// Codes are centred: their centre times the sum of the quantized weights (or of the query) is subtracted. A weight's
// rounding error is therefore multiplied by a code's distance from the centre, not by the code. Offsets of keys are
// multiplied by the exact query.
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

template <int R>
struct FoldedQueries {
  int8_t bytes[R][2 * kMaxDim];  // for each quad of channels 4 low limbs, then 4 high ones
  float offset[kPackedRows];
};

// Where the bytes of channel c (a multiple of 16) begin. The next three quads lie kQuadStride apart.
constexpr int query_byte(int c) { return c / 32 * 64 + c % 32 / 2; }
constexpr int kQuadStride = 16;

// Scores are `scale * (bytes . codes) + offset`.
template <int R, bool ByChannel>
inline void fold_query_bytes(PackedKeys keys, const Queries<R> &query, FoldedQueries<R> &out, int ahead) {
  if (ahead && ByChannel) prefetch(keys.at(ahead).scale, 3 * keys.d / 4);
  if (ahead && !ByChannel) prefetch(keys.at(kScaleBlocks).scale, 2 * keys.d);  // quantize_queries will read them all
  const __m512i half = _mm512_set1_epi16(128), zero = _mm512_setzero_si512();
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  __m512 offsets[kPackedRows], centres[kPackedRows];
  __m512i word_sums[kPackedRows];  // of words times twice the centres of their codes
#pragma GCC unroll 4
  for (int r = 0; r < kPackedRows; ++r) offsets[r] = _mm512_setzero_ps(), word_sums[r] = zero;
  for (int c = 0; c < keys.d; c += 32) {
    __m512 scale[2], offset[2];
    __m512i twice[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int at = c + 16 * i;
      scale[i] = offset[i] = _mm512_setzero_ps();
      twice[i] = _mm512_set1_epi16(query.centre[at]);
      if (at >= keys.d) continue;
      scale[i] = ByChannel ? Simd::multipliers(keys.scale + keys.d / 2 + at / 4) : Simd::widen(keys.scales(at));
      if (ByChannel) offset[i] = Simd::offsets(keys.scale + at / 2);
    }
    const __m512i centre = _mm512_unpacklo_epi64(twice[0], twice[1]);  // in the order of the words
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512 x[2] = {_mm512_loadu_ps(query.x[r] + c), _mm512_loadu_ps(query.x[r] + c + 16)};
      __m512i words = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x[0], scale[0])),
                                         _mm512_cvtps_epi32(_mm512_mul_ps(x[1], scale[1])));
      word_sums[r] = _mm512_dpwssd_epi32(word_sums[r], words, centre);
      if (ByChannel)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i)
          offsets[r] = _mm512_fmadd_ps(_mm512_loadu_ps(query.unit[r] + c + 16 * i), offset[i], offsets[r]);
      __m512i pairs = _mm512_xor_si512(_mm512_add_epi16(words, half), half);
      _mm512_storeu_si512(out.bytes[r] + 2 * c, _mm512_shuffle_epi8(pairs, order));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kPackedRows; ++r) centres[r] = _mm512_cvtepi32_ps(word_sums[r]);
  float sums[kPackedRows], units[kPackedRows] = {};
  Simd::sum4(centres[0], centres[1], centres[2], centres[3], sums);
  if (ByChannel) Simd::sum4(offsets[0], offsets[1], offsets[2], offsets[3], units);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) out.offset[r] = units[r] + query.offset[r] - sums[r] * (0.5f * query.scale[r]);
}

template <int R>
inline void fold_queries(const PackedKeys &keys, const Queries<R> &query, FoldedQueries<R> &out, int ahead) {
  keys.by_channel() ? fold_query_bytes<R, true>(keys, query, out, ahead)
                    : fold_query_bytes<R, false>(keys, query, out, ahead);
}

// Adds the products of the channels [c, end), whose codes have as many bits; c and the codes move on.
template <int R, int Bits>
__attribute__((always_inline)) inline void add_products(const uint8_t *&codes, int &c, int end,
                                                        const FoldedQueries<R> &query, __m512i (&sum)[R][2][2],
                                                        int64_t ahead_bytes) {
  for (; c < end; c += 16, codes += kUnit * Bits) {
    const int8_t *bytes = query.bytes[0] + query_byte(c);
    if (ahead_bytes) prefetch(codes + ahead_bytes, kUnit * Bits);
#pragma GCC unroll 4
    for (int quad = 0; quad < 4; ++quad) {
      __m512i unit[2] = {load_bytes<Bits>(codes, 2 * quad), load_bytes<Bits>(codes, 2 * quad + 1)};
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
}

// Also raises `row_max` to the largest score of each row.
template <int R>
void score_block(PackedKeys keys, const FoldedQueries<R> &query, const float *scale, float *scores, int64_t stride,
                 __m512 *row_max, int ahead) {
  __m512i sum[R][2][2];  // row, half of the tokens, limb
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) sum[r][h][0] = sum[r][h][1] = _mm512_setzero_si512();
  const int *end = keys.table->end;
  const uint8_t *codes = keys.codes;
  const int64_t ahead_bytes = ahead * int64_t{4} * keys.bits * keys.d;
  int c = 0;
  for_widths([&](auto bits) __attribute__((always_inline)) {
    add_products<R, decltype(bits)::value>(codes, c, end[decltype(bits)::value], query, sum, ahead_bytes);
  });
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
  const float centre = values.bits == 8 ? 0.f : static_cast<float>(twice_centre(values.bits)) / 2;
  __m512 x[R][2 * Blocks], abs_max[kPackedRows], sums[kPackedRows];
#pragma GCC unroll 4
  for (int r = 0; r < kPackedRows; ++r) abs_max[r] = _mm512_set1_ps(kMinAbsMax), sums[r] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int j = 0; j < 2 * Blocks; ++j) {
    if (ahead && j % 2 == 0) prefetch(values.at(j / 2 + ahead).scales(g), values.scale_bytes() * kBlock);
    const __m512 scale = values.at(j / 2).load_scales(g, j % 2 * 16);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512 w = _mm512_loadu_ps(weights + r * stride + 16 * j);
      x[r][j] = _mm512_mul_ps(w, scale);
      abs_max[r] = _mm512_max_ps(abs_max[r], x[r][j]);
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
    sums[r] = _mm512_mul_ps(join_limbs<Limbs>(byte_sums), _mm512_set1_ps(-centre * out.scale[r]));
  }
  Simd::sum4(sums[0], sums[1], sums[2], sums[3], out.offset);
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
        unit[v] = load_bytes<Bits>(codes + v * 64 * Bits, t);
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
