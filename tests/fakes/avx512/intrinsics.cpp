// The AVX-512 intrinsics that the kernels use, to be called from Python on arrays of registers: the emulated ones or,
// compiled without this folder in the include path, the CPU's.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {  // in which the emulated functions hide the compiler's

struct Arguments {
  const char *from;
  __m512 f(int i) const { return read<__m512>(64 * i); }
  __m512i i(int i) const { return read<__m512i>(64 * i); }
  __m512bh h(int i) const { return reinterpret_cast<__m512bh>(this->i(i)); }
  __m256i half(int i) const { return read<__m256i>(64 * i); }
  template <typename T>
  T read(int at) const {
    T x;
    memcpy(&x, from + at, sizeof x);
    return x;
  }
};

struct Case {
  const char *name;
  void (*run)(Arguments a, char *out);
};

#define RETURNS(name, ...)             \
  {#name, [](Arguments a, char *out) { \
     auto r = __VA_ARGS__;             \
     memcpy(out, &r, sizeof r);        \
   }}
#define ONE(name, x) RETURNS(name, _mm512_##name(a.x(0)))
#define TWO(name, x) RETURNS(name, _mm512_##name(a.x(0), a.x(1)))
const Case kCases[] = {
    TWO(add_ps, f),
    TWO(mul_ps, f),
    TWO(div_ps, f),
    TWO(max_ps, f),
    TWO(scalef_ps, f),
    ONE(abs_ps, f),
    RETURNS(fmadd_ps, _mm512_fmadd_ps(a.f(0), a.f(1), a.f(2))),
    RETURNS(reduce_ps, _mm512_reduce_ps(a.f(0), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)),
    RETURNS(cmp_ps_mask, _mm512_cmp_ps_mask(a.f(0), a.f(1), _CMP_NLE_UQ)),
    ONE(reduce_add_ps, f),
    ONE(reduce_max_ps, f),
    ONE(cvtps_epi32, f),
    ONE(cvtepi32_ps, i),
    RETURNS(cvtph_ps, _mm512_cvtph_ps(a.half(0))),
    RETURNS(cvtepu8_epi32, _mm512_cvtepu8_epi32(_mm256_castsi256_si128(a.half(0)))),
    RETURNS(cvtepu8_epi64, _mm512_cvtepu8_epi64(_mm256_castsi256_si128(a.half(0)))),
    RETURNS(cvtepi8_epi32, _mm512_cvtepi8_epi32(_mm256_castsi256_si128(a.half(0)))),
    RETURNS(cvtepu16_epi32, _mm512_cvtepu16_epi32(a.half(0))),
    TWO(add_epi16, i),
    TWO(add_epi32, i),
    TWO(madd_epi16, i),
    TWO(packs_epi32, i),
    TWO(packus_epi32, i),
    TWO(packus_epi16, i),
    TWO(shuffle_epi8, i),
    TWO(unpacklo_epi64, i),
    TWO(srlv_epi32, i),
    RETURNS(permutevar_ps, _mm512_permutevar_ps(a.f(0), a.i(1))),
    TWO(permutexvar_epi64, i),
    TWO(permutexvar_epi16, i),
    RETURNS(permutex2var_ps, _mm512_permutex2var_ps(a.f(0), a.i(1), a.f(2))),
    TWO(and_si512, i),
    TWO(or_si512, i),
    TWO(xor_si512, i),
    RETURNS(srli_epi16, _mm512_srli_epi16(a.i(0), 5)),
    RETURNS(slli_epi16, _mm512_slli_epi16(a.i(0), 5)),
    RETURNS(slli_epi32, _mm512_slli_epi32(a.i(0), 16)),
    RETURNS(slli_epi64, _mm512_slli_epi64(a.i(0), 28)),
    RETURNS(dpbusd_epi32, _mm512_dpbusd_epi32(a.i(2), a.i(0), a.i(1))),
    RETURNS(dpwssd_epi32, _mm512_dpwssd_epi32(a.i(2), a.i(0), a.i(1))),
    RETURNS(dpbf16_ps, _mm512_dpbf16_ps(a.f(2), a.h(0), a.h(1))),
    RETURNS(cvtneps_pbh, _mm512_cvtneps_pbh(a.f(0))),
    TWO(cvtne2ps_pbh, f),
    RETURNS(set1_ps, _mm512_set1_ps(a.read<float>(0))),
    RETURNS(set1_epi8, _mm512_set1_epi8(a.read<char>(0))),
    RETURNS(set1_epi16, _mm512_set1_epi16(a.read<short>(0))),
    RETURNS(set1_epi32, _mm512_set1_epi32(a.read<int>(0))),
    RETURNS(setzero_ps, _mm512_setzero_ps()),
    RETURNS(setzero_si512, _mm512_setzero_si512()),
    RETURNS(setr_epi64,
            _mm512_setr_epi64(a.read<int64_t>(0), a.read<int64_t>(8), a.read<int64_t>(16), a.read<int64_t>(24),
                              a.read<int64_t>(32), a.read<int64_t>(40), a.read<int64_t>(48), a.read<int64_t>(56))),
    RETURNS(setr_epi32, _mm512_setr_epi32(a.read<int>(0), a.read<int>(4), a.read<int>(8), a.read<int>(12),
                                          a.read<int>(16), a.read<int>(20), a.read<int>(24), a.read<int>(28),
                                          a.read<int>(32), a.read<int>(36), a.read<int>(40), a.read<int>(44),
                                          a.read<int>(48), a.read<int>(52), a.read<int>(56), a.read<int>(60))),
    RETURNS(broadcast_f32x4, _mm512_broadcast_f32x4(a.read<__m128>(0))),
    RETURNS(broadcast_i32x4, _mm512_broadcast_i32x4(a.read<__m128i>(0))),
    ONE(castsi512_ps, i),
    ONE(castps_si512, f),
    ONE(castps512_ps256, f),
    RETURNS(extractf32x8_ps, _mm512_extractf32x8_ps(a.f(0), 1)),
    RETURNS(loadu_ps, _mm512_loadu_ps(a.from)),
    RETURNS(loadu_si512, _mm512_loadu_si512(a.from)),
    {"storeu_ps", [](Arguments a, char *out) { _mm512_storeu_ps(out, a.f(0)); }},
    {"storeu_si512", [](Arguments a, char *out) { _mm512_storeu_si512(out, a.i(0)); }},
};

void load_first(int lane_bytes, int lanes, const void *p, char *out) {
  const uint32_t mask = static_cast<uint32_t>((1ull << lanes) - 1);
  const Arguments a{out};
  __m512 floats = a.f(0);
  __m512i words = a.i(0);
  if (lane_bytes == 4)
    floats = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p), memcpy(out, &floats, 64);
  else
    words = _mm512_maskz_loadu_epi16(mask, p), memcpy(out, &words, 64);
}
void load_first_half(int lanes, const void *p, char *out) {
  const __m256i words = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << lanes) - 1), p);
  memcpy(out, &words, 32);
}

}  // namespace

extern "C" {

// Runs `name` on n times three registers, and writes n results of 64 bytes; 1 if there is none of that name.
int run(const char *name, int n, const char *in, char *out) {
  for (const Case &each : kCases) {
    if (strcmp(each.name, name) != 0) continue;
    for (int i = 0; i < n; ++i) each.run(Arguments{in + 192 * i}, out + 64 * i);
    return 0;
  }
  return 1;
}

void run_load_first(int lane_bytes, int lanes, const void *p, char *out) { load_first(lane_bytes, lanes, p, out); }
void run_load_first_half(int lanes, const void *p, char *out) { load_first_half(lanes, p, out); }
}
