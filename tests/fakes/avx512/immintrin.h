// AVX-512 on CPUs that have AVX2 alone, for tests. Compiled with this folder in the include path, the kernels' AVX-512
// variants find this header in place of the compiler's. Their code lies in an unnamed namespace, and so do the
// functions here: inside it they hide the compiler's functions of the same names. A function that is missing here is a
// compile error, since the compiler's own cannot be inlined.
//
// What AVX2 has for 256 bits is done twice: AVX-512 defines it lane by lane, or within 128 bits, just the same. All
// else is spelled out from Intel's definitions (Software Developer's Manual, volume 2; the Intrinsics Guide).
#pragma once
#include_next <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef __OPTIMIZE__
#error "without optimization the compiler's intrinsics are macros, which nothing hides"
#endif
#ifdef KVATTN_EMULATED_BF16  // not earlier: the compiler's header asks too
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif
// Asm statements that only hold a vector in a register. `asm volatile` stays.
#define asm(...)
// Calls, since the compiler takes minutes over the kernels if all of this is inlined.
#define EMULATED [[gnu::noinline, gnu::unused]] static

namespace {

template <typename T>
struct Lanes {  // of a vector, one by one
  explicit Lanes(__m512 v) { memcpy(lane, &v, 64); }
  explicit Lanes(__m512i v) { memcpy(lane, &v, 64); }
  operator __m512() const { return as(__m512{}); }
  operator __m512i() const { return as(__m512i{}); }
  T &operator[](int i) { return lane[i]; }
  T lane[64 / sizeof(T)];

 private:
  template <typename Vector>
  Vector as(Vector v) const {
    memcpy(&v, lane, 64);
    return v;
  }
};

inline __m256 half(__m512 a, int i) {
  __m256 h;
  memcpy(&h, reinterpret_cast<const char *>(&a) + 32 * i, 32);
  return h;
}
inline __m256i half(__m512i a, int i) {
  __m256i h;
  memcpy(&h, reinterpret_cast<const char *>(&a) + 32 * i, 32);
  return h;
}
inline __m512 join(__m256 low, __m256 high) {
  const __m256 both[2] = {low, high};
  __m512 v;
  memcpy(&v, both, 64);
  return v;
}
inline __m512i join(__m256i low, __m256i high) {
  const __m256i both[2] = {low, high};
  __m512i v;
  memcpy(&v, both, 64);
  return v;
}

// ---- What AVX2 has too

#define KVATTN_ONE(name, Out, In) \
  EMULATED Out _mm512_##name(In a) { return join(_mm256_##name(half(a, 0)), _mm256_##name(half(a, 1))); }
#define KVATTN_TWO(name, T)                                                                    \
  EMULATED T _mm512_##name(T a, T b) {                                                         \
    return join(_mm256_##name(half(a, 0), half(b, 0)), _mm256_##name(half(a, 1), half(b, 1))); \
  }
#define KVATTN_SHIFT(name)                                                                                       \
  EMULATED __m512i _mm512_##name(__m512i a, unsigned n) {                                                        \
    return join(_mm256_##name(half(a, 0), static_cast<int>(n)), _mm256_##name(half(a, 1), static_cast<int>(n))); \
  }
#define KVATTN_SET(name, T, N) \
  EMULATED T _mm512_##name(N x) { return join(_mm256_##name(x), _mm256_##name(x)); }

KVATTN_TWO(add_ps, __m512)
KVATTN_TWO(mul_ps, __m512)
KVATTN_TWO(div_ps, __m512)
KVATTN_TWO(max_ps, __m512)  // the second one when either is NaN, or both are zeros
KVATTN_TWO(add_epi16, __m512i)
KVATTN_TWO(add_epi32, __m512i)
KVATTN_TWO(madd_epi16, __m512i)
KVATTN_TWO(packs_epi32, __m512i)  // saturates; interleaves within 128 bits, as the next three do
KVATTN_TWO(packus_epi32, __m512i)
KVATTN_TWO(packus_epi16, __m512i)
KVATTN_TWO(shuffle_epi8, __m512i)
KVATTN_TWO(unpacklo_epi64, __m512i)
KVATTN_TWO(srlv_epi32, __m512i)  // 0 for 32 bits and more
KVATTN_SHIFT(srli_epi16)
KVATTN_SHIFT(slli_epi16)
KVATTN_SHIFT(slli_epi32)
KVATTN_SHIFT(slli_epi64)
KVATTN_SET(set1_ps, __m512, float)
KVATTN_SET(set1_epi8, __m512i, char)
KVATTN_SET(set1_epi16, __m512i, short)
KVATTN_SET(set1_epi32, __m512i, int)
KVATTN_ONE(cvtepi32_ps, __m512, __m512i)  // rounds to nearest, ties to even
KVATTN_ONE(cvtps_epi32, __m512i, __m512)  // likewise; 0x80000000 for what does not fit

EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return join(_mm256_fmadd_ps(half(a, 0), half(b, 0), half(c, 0)), _mm256_fmadd_ps(half(a, 1), half(b, 1), half(c, 1)));
}
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
EMULATED __m512 _mm512_abs_ps(__m512 a) {
  return reinterpret_cast<__m512>(reinterpret_cast<__m512i>(a) & _mm512_set1_epi32(0x7fffffff));
}
EMULATED __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.f); }
EMULATED __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }
EMULATED __m512i _mm512_setr_epi64(long long a, long long b, long long c, long long d, long long e, long long f,
                                   long long g, long long h) {
  return join(_mm256_setr_epi64x(a, b, c, d), _mm256_setr_epi64x(e, f, g, h));
}
EMULATED __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l,
                                   int m, int n, int o, int p) {
  return join(_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p));
}
EMULATED __m512i _mm512_broadcast_i32x4(__m128i a) {
  return join(_mm256_broadcastsi128_si256(a), _mm256_broadcastsi128_si256(a));
}
EMULATED __m512 _mm512_broadcast_f32x4(__m128 a) {
  return join(_mm256_broadcast_ps(&a), _mm256_broadcast_ps(&a));
}
EMULATED __m512 _mm512_permutevar_ps(__m512 a, __m512i order) {
  return join(_mm256_permutevar_ps(half(a, 0), half(order, 0)), _mm256_permutevar_ps(half(a, 1), half(order, 1)));
}
EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return reinterpret_cast<__m512>(a); }
EMULATED __m512i _mm512_castps_si512(__m512 a) { return reinterpret_cast<__m512i>(a); }
EMULATED __m256 _mm512_castps512_ps256(__m512 a) { return half(a, 0); }
EMULATED __m256 _mm512_extractf32x8_ps(__m512 a, int i) { return half(a, i); }
EMULATED __m512 _mm512_loadu_ps(const void *p) {
  const float *at = static_cast<const float *>(p);
  return join(_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8));
}
EMULATED __m512i _mm512_loadu_si512(const void *p) {
  const __m256i *at = static_cast<const __m256i *>(p);
  return join(_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1));
}
EMULATED void _mm512_storeu_ps(void *p, __m512 a) {
  _mm256_storeu_ps(static_cast<float *>(p), half(a, 0)), _mm256_storeu_ps(static_cast<float *>(p) + 8, half(a, 1));
}
EMULATED void _mm512_storeu_si512(void *p, __m512i a) {
  __m256i *at = static_cast<__m256i *>(p);
  _mm256_storeu_si256(at, half(a, 0)), _mm256_storeu_si256(at + 1, half(a, 1));
}
EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return join(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}
EMULATED __m512i _mm512_cvtepu8_epi32(__m128i a) {
  return join(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)));
}
EMULATED __m512i _mm512_cvtepu8_epi64(__m128i a) {
  return join(_mm256_cvtepu8_epi64(a), _mm256_cvtepu8_epi64(_mm_srli_si128(a, 4)));
}
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
// Not instructions: the compilers fold halves, in this order.
EMULATED float _mm512_reduce_add_ps(__m512 a) {
  Lanes<float> x(a);
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
}
EMULATED float _mm512_reduce_max_ps(__m512 a) {
  Lanes<float> x(a);
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
}
#undef KVATTN_ONE
#undef KVATTN_TWO
#undef KVATTN_SHIFT
#undef KVATTN_SET

// ---- What it has not

// Memory of lanes that are masked out is not read: it may not be there.
template <typename T>
inline Lanes<T> load_masked(uint32_t mask, const void *p) {
  Lanes<T> x(_mm512_setzero_si512());
  for (unsigned i = 0; i < 64 / sizeof(T); ++i)
    if (mask >> i & 1) memcpy(&x.lane[i], static_cast<const T *>(p) + i, sizeof(T));
  return x;
}
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void *p) { return load_masked<float>(mask, p); }
EMULATED __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void *p) { return load_masked<uint16_t>(mask, p); }
EMULATED __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void *p) {
  return half(_mm512_maskz_loadu_epi16(mask, p), 0);
}

// VCMPPS with the one predicate that is used: not less than or equal, hence true for NaN.
EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  if (predicate != _CMP_NLE_UQ) __builtin_trap();
  Lanes<float> x(a), y(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(!(x[i] <= y[i])) << i;
  return static_cast<__mmask16>(mask);
}

// VREDUCEPS with no fraction bits, towards minus infinity: x - floor(x), which is rounded towards minus infinity too.
// Hence the result is below 1, and -0 for whole numbers; +0 for infinities.
EMULATED __m512 _mm512_reduce_ps(__m512 a, int mode) {
  if (mode != (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)) __builtin_trap();
  Lanes<float> x(a);
  for (int i = 0; i < 16; ++i) {
    if (isinf(x[i])) {
      x[i] = 0.f;
      continue;
    }
    const float whole = floorf(x[i]);
    float rest = x[i] - whole;
    if (whole == -1.f && rest - 1.f > x[i]) rest = nextafterf(rest, 0.f);  // was rounded up; `rest - 1` is exact
    x[i] = rest == 0.f ? -0.f : rest;
  }
  return x;
}

// VSCALEFPS: a * 2^floor(b), rounded once, to denormals too. Infinities of `b` are powers: 0 and infinity.
inline float scale_one(float a, float b) {
  if (isnan(a) || isnan(b)) return a + b;
  if (isinf(b)) {
    if ((b > 0 && a == 0) || (b < 0 && isinf(a))) return NAN;
    return copysignf(b > 0 ? INFINITY : 0.f, a);
  }
  const double power = fmin(fmax(floor(static_cast<double>(b)), -400), 400);          // beyond, the result is the same
  return static_cast<float>(ldexp(static_cast<double>(a), static_cast<int>(power)));  // exact in double
}
EMULATED __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  Lanes<float> x(a), y(b);
  for (int i = 0; i < 16; ++i) x[i] = scale_one(x[i], y[i]);
  return x;
}

EMULATED __m512i _mm512_permutexvar_epi64(__m512i order, __m512i a) {
  Lanes<uint64_t> from(a), to(order);
  for (int i = 0; i < 8; ++i) to[i] = from[static_cast<int>(to[i] & 7)];
  return to;
}

EMULATED __m512i _mm512_permutexvar_epi16(__m512i order, __m512i a) {
  Lanes<uint16_t> from(a), to(order);
  for (int i = 0; i < 32; ++i) to[i] = from[to[i] & 31];
  return to;
}
// Bit 4 of a lane of `order` chooses between `a` and `b`.
EMULATED __m512 _mm512_permutex2var_ps(__m512 a, __m512i order, __m512 b) {
  Lanes<float> first(a), second(b), to(a);
  Lanes<uint32_t> at(order);
  for (int i = 0; i < 16; ++i) {
    const int lane = static_cast<int>(at[i] & 15);
    to[i] = at[i] & 16 ? second[lane] : first[lane];
  }
  return to;
}

#ifdef KVATTN_EMULATED_BF16
// VPDPBUSD: adds four products of an unsigned byte of `a` and a signed one of `b`. Nothing saturates; the sum wraps.
EMULATED __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const __m512i low = _mm512_set1_epi16(0xff);
  auto signed_even = [](__m512i x) {
    return join(_mm256_srai_epi16(_mm256_slli_epi16(half(x, 0), 8), 8),
                _mm256_srai_epi16(_mm256_slli_epi16(half(x, 1), 8), 8));
  };
  auto signed_odd = [](__m512i x) { return join(_mm256_srai_epi16(half(x, 0), 8), _mm256_srai_epi16(half(x, 1), 8)); };
  // As pairs of 16-bit words, whose products and sums of two fit into 32 bits.
  const __m512i even = _mm512_madd_epi16(a & low, signed_even(b));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), signed_odd(b));
  return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
}

// VPDPWSSD: adds two products of signed words. The sum wraps.
EMULATED __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}

// VDPBF16PS: of each pair the second product is added first, then the first one, each by a fused multiply-add that
// rounds to nearest, ties to even. Denormal numbers count as zeros and become zeros, whatever MXCSR says.
inline __m512 flushed(__m512 a) {  // of denormals, signs stay
  auto normal = [](__m256 x) {
    const __m256 sign = _mm256_set1_ps(-0.f), least = _mm256_set1_ps(1.17549435e-38f);
    const __m256 keep = _mm256_cmp_ps(_mm256_andnot_ps(sign, x), least, _CMP_NLT_UQ);
    return _mm256_and_ps(x, _mm256_or_ps(keep, sign));
  };
  return join(normal(half(a, 0)), normal(half(a, 1)));
}
EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const __m512i x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  auto first = [](__m512i v) { return flushed(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))); };
  auto second = [&](__m512i v) { return flushed(_mm512_castsi512_ps(v & high)); };
  sum = flushed(_mm512_fmadd_ps(second(x), second(y), flushed(sum)));
  return flushed(_mm512_fmadd_ps(first(x), first(y), sum));
}

// VCVTNEPS2BF16 and VCVTNE2PS2BF16: to nearest, ties to even, whatever MXCSR says. Denormal numbers count as zeros, NaN
// becomes quiet. Of two registers the second one is the lower half of the result.
EMULATED __m256bh _mm512_cvtneps_pbh(__m512 a) {
  Lanes<uint32_t> x(reinterpret_cast<__m512i>(flushed(a)));
  uint16_t lane[16];
  for (int i = 0; i < 16; ++i) {
    const bool nan = (x[i] & 0x7fffffff) > 0x7f800000;
    lane[i] = static_cast<uint16_t>(nan ? x[i] >> 16 | 0x40 : (x[i] + 0x7fff + (x[i] >> 16 & 1)) >> 16);
  }
  __m256bh rounded;
  memcpy(&rounded, lane, 32);
  return rounded;
}
EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  const __m256i low = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b));
  return reinterpret_cast<__m512bh>(join(low, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a))));
}
#endif

}  // namespace
