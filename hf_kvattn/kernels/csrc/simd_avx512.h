// AVX-512 (F, BW, VL, DQ), with bf16 dot products where the variant is built for them.
#pragma once
#include <immintrin.h>

#include "scalar.h"

namespace {  // one per variant: each is compiled with its own flags and must not be merged with another's

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kRows = 4;
  static constexpr int kVectors = 4;
  using Vec = __m512;

  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, Vec a) { _mm512_storeu_ps(p, a); }
  static Vec widen(const float *p) { return load(p); }
  static Vec widen(const bf16_t *p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
  static Vec widen(const f16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  }
  static Vec widen_some(const float *p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
  static Vec widen_some(const bf16_t *p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
  static Vec widen_some(const f16_t *p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
  static Vec codes(const uint8_t *p, int shift) {
    __m512i words = _mm512_srl_epi32(_mm512_loadu_si512(p), _mm_cvtsi32_si128(shift));
    return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xff)));
  }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // returns b when either is NaN
  // What x is above the next lower whole number; 0 for -inf.
  static Vec fraction(const Vec &x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static Vec scale_pow2(Vec a, Vec x) { return _mm512_scalef_ps(a, x); }  // by the floor of x
  static bool all_at_most(Vec a, float x) { return _mm512_cmp_ps_mask(a, set(x), _CMP_NLE_UQ) == 0; }
  static float sum(Vec a) { return _mm512_reduce_add_ps(a); }
  static float max_lane(Vec a) { return _mm512_reduce_max_ps(a); }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float *out) {
    __m256 ab = _mm256_hadd_ps(fold(a), fold(b)), cd = _mm256_hadd_ps(fold(c), fold(d));
    __m256 s = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }

#ifdef __AVX512BF16__
  static constexpr bool kDotsBf16 = true;
  using Pairs = __m512i;  // 32 bf16 numbers
  static Pairs load_pairs(const bf16_t *p) { return _mm512_loadu_si512(p); }
  static Pairs load_pairs_some(const bf16_t *p, int n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
  }
  static Vec dot(Pairs a, Pairs b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
#else
  static constexpr bool kDotsBf16 = false;
#endif

 private:
  static __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec widen_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static __m256 fold(Vec a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
};

}  // namespace
