// AVX-512 (F, BW, VL, DQ), and bf16 dot products in the variant that is built for them.
#pragma once
#include <immintrin.h>

#include "scalar.h"

namespace {  // one per variant: each is compiled with its own flags and must not be merged with another's

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kRows = 4;
  static constexpr int kVectors = 4;
  static constexpr int kUnroll = 8;
  static constexpr int kProductRows = 12;  // with kProductVectors, what a product of tiles holds in registers
  static constexpr int kProductVectors = 2;
  using Vec = __m512;

  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float *p) { return _mm512_loadu_ps(p); }
  static void store(float *p, Vec a) { _mm512_storeu_ps(p, a); }
  static Vec widen(const float *p) { return load(p); }
  static Vec widen(const bf16_t *p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
  static Vec widen(const f16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
  static Vec widen(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
  }
  static Vec widen_tail(const float *p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
  static Vec widen_tail(const bf16_t *p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
  static Vec widen_tail(const f16_t *p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
  static Vec widen_tail(const int8_t *p, int n) {
    int8_t padded[kLanes] = {};
    memcpy(padded, p, n);
    return widen(padded);
  }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec abs(Vec a) { return _mm512_abs_ps(a); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // returns b when either is NaN
  // The fractional part of x; 0 for -inf.
  static Vec fraction(const Vec &x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static Vec scale_pow2(Vec a, Vec x) { return _mm512_scalef_ps(a, x); }  // by the floor of x
  static bool all_at_most(Vec a, float x) { return _mm512_cmp_ps_mask(a, set(x), _CMP_NLE_UQ) == 0; }
  static float sum(Vec a) { return _mm512_reduce_add_ps(a); }
  static float max_lane(Vec a) { return _mm512_reduce_max_ps(a); }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float *out) {
    reduce4(a, b, c, d, out, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); });
  }
  static void max4(Vec a, Vec b, Vec c, Vec d, float *out) {
    reduce4(a, b, c, d, out, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); });
  }
  // The lanes of a and b in turns, a's first: those of the lower halves, and of the upper ones.
  static void zip(Vec a, Vec b, Vec &low, Vec &high) {
    const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low = _mm512_permutex2var_ps(a, lower, b);
    high = _mm512_permutex2var_ps(a, _mm512_add_epi32(lower, _mm512_set1_epi32(8)), b);
  }

  using Words = __m512i;                 // 16-bit integers, two a lane
  using Ints = __m512i;                  // 32-bit integers; sums wrap
  static Words pair(const int16_t *p) {  // the two words at p in every lane
    int32_t both;
    memcpy(&both, p, 4);
    return _mm512_set1_epi32(both);
  }
  // The words at p, shifted to the right (to the left where that is negative), and of them the bits of the mask.
  static Words codes(const void *p, int shift, int mask) {
    Words a = _mm512_loadu_si512(p);
    a = shift < 0 ? _mm512_slli_epi16(a, -shift) : _mm512_srli_epi16(a, shift);
    if (shift >= 0 && mask == 0xffff >> shift) return a;
    return _mm512_and_si512(a, _mm512_set1_epi16(static_cast<int16_t>(mask)));
  }
  static Words low_bytes(Words a) { return _mm512_and_si512(a, _mm512_set1_epi16(0xff)); }
  static Words high_bytes(Words a) { return _mm512_srli_epi16(a, 8); }
  static Words join(Words a, Words b) { return _mm512_or_si512(a, b); }
  static Ints set_int(int x) { return _mm512_set1_epi32(x); }
  static Ints dot(Words a, Words b, Ints c) {
    c = _mm512_add_epi32(_mm512_madd_epi16(a, b), c);
    asm("" : "+v"(c));  // otherwise GCC computes all products of a sum first, and registers run out
    return c;
  }
  static Vec to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
  // Rounded to 16 bits. The second and third of each four numbers change places.
  static Words to_words(Vec a, Vec b) {
    __m512i words = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), words), order);
  }
  static void store_words(int16_t *p, Words a) { _mm512_storeu_si512(p, a); }
  // Of kLanes channels the multipliers and the offsets, from 0 on (quant/few_bits.py); of as many bytes the scales.
  static Vec multipliers(const uint8_t *p) {
    int32_t bits;
    memcpy(&bits, p, 4);
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 table = _mm512_broadcast_f32x4(_mm_loadu_ps(kMultipliers));
    return _mm512_permutevar_ps(table, _mm512_srlv_epi32(_mm512_set1_epi32(bits), shifts));
  }
  static Vec offsets(const uint8_t *p) {
    int64_t bits;
    memcpy(&bits, p, 8);
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(bits));  // two lanes each
    const __m512i both = _mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28));
    return _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
  }
  static Vec scales(const uint8_t *p) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return mul(_mm512_castsi512_ps(_mm512_slli_epi32(x, 20)), set(kScaleUnit));
  }
  // Not _mm_prefetch: GCC 12 removes it from functions that it considers pure.
  static void prefetch(const char *p) { asm volatile("prefetcht1 %0" : : "m"(*p)); }

#ifdef __AVX512BF16__
  static constexpr bool kDotsBf16 = true;
  using Pairs = __m512i;  // 32 bf16 numbers
  static Pairs load_pairs(const bf16_t *p) { return _mm512_loadu_si512(p); }
  static Pairs load_pairs_tail(const bf16_t *p, int n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
  }
  static Vec dot(Pairs a, Pairs b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static Vec as_floats(Pairs a) { return _mm512_castsi512_ps(a); }  // the same bits
  static Vec dot_pairs(Vec a, Vec b, Vec c) { return dot(_mm512_castps_si512(a), _mm512_castps_si512(b), c); }
  // Lanes of both, rounded to bf16: lane i is the pair (a[i], b[i]).
  static Vec pairs(Vec a, Vec b) {
    const __m512i in_turns =
        _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                          0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    return as_floats(_mm512_permutexvar_epi16(in_turns, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a))));
  }
  static void store_bf16(bf16_t *p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  }
#else
  static constexpr bool kDotsBf16 = false;
#endif

 private:
  static __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec widen_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  template <typename F>
  static void reduce4(Vec a, Vec b, Vec c, Vec d, float *out, F f) {
    auto fold = [&](Vec x) { return f(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
    __m256 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
    __m256 ab = f(_mm256_unpacklo_ps(fa, fb), _mm256_unpackhi_ps(fa, fb));
    __m256 cd = f(_mm256_unpacklo_ps(fc, fd), _mm256_unpackhi_ps(fc, fd));
    __m256 all = f(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(out, _mm256_castps256_ps128(f(all, _mm256_permute2f128_ps(all, all, 1))));
  }
};

}  // namespace
