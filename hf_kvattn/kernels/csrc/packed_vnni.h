// Products of packed codes as bytes (AVX-512 VNNI). The whole numbers that they meet become bytes too:
//
// - queries two signed ones, `256 * high + low`;
// - weights two unsigned ones, or one where the model is bf16: its error is of the size of the one that other kernels
//   make by rounding weights to bf16.
//
// The middle of a weight's codes counts with the same whole steps that multiply the codes, so that the rounding of a
// step is multiplied by what codes are away from the middle; the zeros contribute with exact numbers.
//
// Rows are unrolled by pragmas: GCC else keeps arrays of vectors in memory, where 512-bit stores take two cycles.
// Blocks are passed by value, since stores of bytes may change anything that is reached through a reference.
#pragma once
#include <immintrin.h>

namespace {

constexpr int kFineDigits = 2;  // of a weight, where one digit is too coarse

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
struct FoldedQueries {
  int8_t bytes[R][2 * kMaxDim];  // of each quad of channels the low ones, then the high ones
  float offset[kFour];
};

// Where the bytes of channel c lie, a multiple of 16; its next three quads follow at kQuadStride.
constexpr int first_low_byte(int c) { return c / 32 * 64 + c % 32 / 2; }
constexpr int kQuadStride = 16;

// Scores are `step * (bytes . codes) + offset`.
template <int R, bool Zeros>
inline void fold_query_bytes(PackedKeys keys, const Queries<R> &query, const float *offset, FoldedQueries<R> &out,
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
  float sums[kFour];
  Simd::sum4(offsets[0], offsets[1], offsets[2], offsets[3], sums);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) out.offset[r] = sums[r] * query.step[r] + offset[r];
}

template <int R>
inline void fold_queries(const PackedKeys &keys, const Queries<R> &query, const float *offset, FoldedQueries<R> &out,
                         int ahead) {
  keys.zero ? fold_query_bytes<R, true>(keys, query, offset, out, ahead)
            : fold_query_bytes<R, false>(keys, query, offset, out, ahead);
}

// Keeps the largest score of each row in `top` too.
template <int R, int Bits>
void score_codes(PackedKeys keys, const FoldedQueries<R> &query, const float *step, float *scores, int64_t stride,
                 __m512 *top, int ahead) {
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

// Values add `step * (bytes . codes) + offset`.
template <int R, int Digits>
struct FoldedWeights {
  uint8_t bytes[R][Digits][kTile];  // see token_quad
  float step[kFour], offset[kFour];
};

// Where the bytes of tokens 4 * q to 4 * q + 3 of a tile lie.
constexpr int token_quad(int q) { return 4 * (4 * (q % 4) + q / 4); }

template <int R, int Digits, int Blocks>
inline void fold_weights(PackedValues values, int g, const float *weights, int64_t stride,
                         FoldedWeights<R, Digits> &out, int ahead) {
  constexpr float kMost = Digits == 1 ? 255.f : 65535.f;
  // Codes of 8 bits are multiplied as signed numbers: they have no middle.
  const float middle = values.bits == 8 ? 0.f : static_cast<float>((1 << values.bits) - 1) / 2;
  __m512 x[R][2 * Blocks], top[kFour], zero_part[kFour];
#pragma GCC unroll 4
  for (int r = 0; r < kFour; ++r) top[r] = _mm512_set1_ps(kLeast), zero_part[r] = _mm512_setzero_ps();
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
  choose_steps(top, kMost, out.step, inverse);
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
  Simd::sum4(zero_part[0], zero_part[1], zero_part[2], zero_part[3], out.offset);
}

constexpr int wide_columns(int digits) { return digits == 1 ? 4 : 2; }

// Vectors of 16 channels from c on.
template <int R, int Digits, int Bits, int Blocks, int Vectors>
void add_columns(PackedValues values, const FoldedWeights<R, Digits> &weights, int c, float *acc, int64_t acc_stride) {
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

}  // namespace
