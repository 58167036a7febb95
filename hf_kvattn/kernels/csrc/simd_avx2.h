// AVX2 + FMA + F16C: eight floats, sixteen registers.
#pragma once
#include <immintrin.h>

#include "scalar.h"

namespace {  // one per variant: each is compiled with its own flags and must not be merged with another's

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kRows = 2;
  static constexpr int kVectors = 4;
  static constexpr int kUnroll = 8;
  static constexpr int kProductRows = 6;  // with kProductVectors, what a product of tiles holds in registers
  static constexpr int kProductVectors = 2;
  static constexpr bool kDotsBf16 = false;
  using Vec = __m256;

  static Vec set(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float *p) { return _mm256_loadu_ps(p); }
  static void store(float *p, Vec a) { _mm256_storeu_ps(p, a); }
  static Vec widen(const float *p) { return load(p); }
  static Vec widen(const bf16_t *p) {
    __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static Vec widen(const f16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
  static Vec widen(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
  }
  template <typename T>
  static Vec widen_tail(const T *p, int n) {
    T padded[kLanes] = {};
    for (int i = 0; i < n; ++i) padded[i] = p[i];
    return widen(padded);
  }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec abs(Vec a) { return _mm256_andnot_ps(set(-0.f), a); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // returns b when either is NaN
  // The fractional part of x. x becomes its floor, and at least -127, for which
  // `scale_pow2` returns 0.
  static Vec fraction(Vec &x) {
    x = max(set(-127.f), x);
    Vec floor_x = _mm256_floor_ps(x), rest = _mm256_sub_ps(x, floor_x);
    x = floor_x;
    return rest;
  }
  static Vec scale_pow2(Vec a, Vec n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static bool all_at_most(Vec a, float x) { return _mm256_movemask_ps(_mm256_cmp_ps(a, set(x), _CMP_NLE_UQ)) == 0; }
  static float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static float max_lane(Vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float *out) {
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
  static void max4(Vec a, Vec b, Vec c, Vec d, float *out) {
    Vec ab = max(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    Vec cd = max(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    Vec all = max(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  // The lanes of a and b in turns, a's first: those of the lower halves, and of the upper ones.
  static void zip(Vec a, Vec b, Vec &low, Vec &high) {
    const Vec even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(even, odd, 0x20), high = _mm256_permute2f128_ps(even, odd, 0x31);
  }

  using Words = __m256i;                 // 16-bit integers, two a lane
  using Ints = __m256i;                  // 32-bit integers; sums wrap
  static Words pair(const int16_t *p) {  // the two words at p in every lane
    int32_t both;
    memcpy(&both, p, 4);
    return _mm256_set1_epi32(both);
  }
  // The words at p, shifted to the right (to the left where that is negative), and of them the bits of the mask.
  static Words codes(const void *p, int shift, int mask) {
    Words a = _mm256_loadu_si256(static_cast<const __m256i *>(p));
    a = shift < 0 ? _mm256_slli_epi16(a, -shift) : _mm256_srli_epi16(a, shift);
    if (shift >= 0 && mask == 0xffff >> shift) return a;
    return _mm256_and_si256(a, _mm256_set1_epi16(static_cast<int16_t>(mask)));
  }
  static Words low_bytes(Words a) { return _mm256_and_si256(a, _mm256_set1_epi16(0xff)); }
  static Words high_bytes(Words a) { return _mm256_srli_epi16(a, 8); }
  static Words join(Words a, Words b) { return _mm256_or_si256(a, b); }
  static Ints set_int(int x) { return _mm256_set1_epi32(x); }
  static Ints dot(Words a, Words b, Ints c) {
    c = _mm256_add_epi32(_mm256_madd_epi16(a, b), c);
    asm("" : "+x"(c));  // otherwise GCC computes all products of a sum first, and registers run out
    return c;
  }
  static Vec to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
  // Rounded to 16 bits. The second and third of each four numbers change places.
  static Words to_words(Vec a, Vec b) {
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    return _mm256_shuffle_epi8(_mm256_permute4x64_epi64(words, 0xd8), order);
  }
  static void store_words(int16_t *p, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a); }
  // Of kLanes channels the multipliers and the offsets, from 0 on (quant/few_bits.py); of as many bytes the scales.
  static Vec multipliers(const uint8_t *p) {
    const __m256i index = _mm256_srlv_epi32(from_memory<int16_t>(p), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128 *>(kMultipliers)), index);
  }
  static Vec offsets(const uint8_t *p) {
    const __m256i x = _mm256_srlv_epi32(from_memory<int32_t>(p), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(15)));
  }
  static Vec scales(const uint8_t *p) {
    const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
    return mul(_mm256_castsi256_ps(_mm256_slli_epi32(x, 20)), set(kScaleUnit));
  }
  // Not _mm_prefetch: GCC 12 removes it from functions that it considers pure.
  static void prefetch(const char *p) { asm volatile("prefetcht1 %0" : : "m"(*p)); }

 private:
  template <typename Int>
  static __m256i from_memory(const uint8_t *p) {  // in every lane
    Int x;
    memcpy(&x, p, sizeof x);
    return _mm256_set1_epi32(x);
  }
};

}  // namespace
