// NEON, which every 64-bit Arm CPU has: four floats, thirty-two registers. In the variants that are built for them, dot
// products of bytes, and of bf16 numbers.
#pragma once
#include <arm_neon.h>

#include "scalar.h"

namespace {  // one per variant: each is compiled with its own flags and must not be merged with another's

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kRows = 4;
  static constexpr int kVectors = 4;
  static constexpr int kUnroll = 8;
  static constexpr int kProductRows = 6;  // with kProductVectors, what a product of tiles holds in registers
  static constexpr int kProductVectors = 4;
  using Vec = float32x4_t;

  static Vec set(float x) { return vdupq_n_f32(x); }
  static Vec load(const float *p) { return vld1q_f32(p); }
  static void store(float *p, Vec a) { vst1q_f32(p, a); }
  static Vec widen(const float *p) { return load(p); }
  static Vec widen(const bf16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(load_halves(p), 16)); }
  static Vec widen(const f16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_halves(p))); }
  static Vec widen(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(static_cast<uint32_t>(four))))));
  }
  template <typename T>
  static Vec widen_tail(const T *p, int n) {
    T padded[kLanes] = {};
    for (int i = 0; i < n; ++i) padded[i] = p[i];
    return widen(padded);
  }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  static Vec abs(Vec a) { return vabsq_f32(a); }
  static Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // returns b when either is NaN
  // The fractional part of x. x becomes its floor, and at least -127, for which
  // `scale_pow2` returns 0.
  static Vec fraction(Vec &x) {
    x = max(set(-127.f), x);
    Vec floor_x = vrndmq_f32(x), rest = vsubq_f32(x, floor_x);
    x = floor_x;
    return rest;
  }
  static Vec scale_pow2(Vec a, Vec n) {
    int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }
  static bool all_at_most(Vec a, float x) { return vminvq_u32(vcleq_f32(a, set(x))) != 0; }
  static float sum(Vec a) { return vaddvq_f32(a); }
  static float max_lane(Vec a) { return vmaxnmvq_f32(a); }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float *out) {
    store(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }
  static void max4(Vec a, Vec b, Vec c, Vec d, float *out) {
    store(out, vpmaxnmq_f32(vpmaxnmq_f32(a, b), vpmaxnmq_f32(c, d)));
  }
  // The lanes of a and b in turns, a's first: those of the lower halves, and of the upper ones.
  static void zip(Vec a, Vec b, Vec &low, Vec &high) { low = vzip1q_f32(a, b), high = vzip2q_f32(a, b); }

  using Words = int16x8_t;               // 16-bit integers, two a lane
  using Ints = int32x4_t;                // 32-bit integers; sums wrap
  static Words pair(const int16_t *p) {  // the two words at p in every lane
    int32_t both;
    memcpy(&both, p, 4);
    return vreinterpretq_s16_s32(vdupq_n_s32(both));
  }
  // The words at p, shifted to the right (to the left where that is negative), and of them the bits of the mask.
  static Words codes(const void *p, int shift, int mask) {
    const uint16x8_t a = shift_right(load_words(p), shift);
    if (shift >= 0 && mask == 0xffff >> shift) return vreinterpretq_s16_u16(a);
    return vreinterpretq_s16_u16(vandq_u16(a, vdupq_n_u16(static_cast<uint16_t>(mask))));
  }
  static Words low_bytes(Words a) { return vandq_s16(a, vdupq_n_s16(0xff)); }
  static Words high_bytes(Words a) { return vreinterpretq_s16_u16(vshrq_n_u16(vreinterpretq_u16_s16(a), 8)); }
  static Words join(Words a, Words b) { return vorrq_s16(a, b); }
  static Ints set_int(int x) { return vdupq_n_s32(x); }
  static Ints dot(Words a, Words b, Ints c) {
    return vaddq_s32(c, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
  }
  static Vec to_floats(Ints a) { return vcvtq_f32_s32(a); }
  // Rounded to 16 bits. The second and third of each four numbers change places.
  static Words to_words(Vec a, Vec b) {
    auto swap = [](int16x4_t x) { return vuzp1_s16(x, vext_s16(x, x, 1)); };  // 0 1 2 3, 1 2 3 0: 0 2 1 3
    return vcombine_s16(swap(vqmovn_s32(vcvtnq_s32_f32(a))), swap(vqmovn_s32(vcvtnq_s32_f32(b))));
  }
  static void store_words(int16_t *p, Words a) { vst1q_s16(p, a); }
  // Of kLanes channels the multipliers and the offsets, from 0 on (quant/few_bits.py); of as many bytes the scales.
  static Vec multipliers(const uint8_t *p) {
    const int32_t shifts[kLanes] = {0, -2, -4, -6};
    const uint32x4_t index = vandq_u32(vshlq_u32(vdupq_n_u32(*p), vld1q_s32(shifts)), vdupq_n_u32(3));
    const uint8x16_t table = vreinterpretq_u8_f32(load(kMultipliers));  // the bytes from 4 * index on are due
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(bytes)));
  }
  static Vec offsets(const uint8_t *p) {
    const int32_t shifts[kLanes] = {0, -4, -8, -12};
    const uint32x4_t both = vdupq_n_u32(p[0] | static_cast<uint32_t>(p[1]) << 8);
    return vcvtq_f32_u32(vandq_u32(vshlq_u32(both, vld1q_s32(shifts)), vdupq_n_u32(15)));
  }
  static Vec scales(const uint8_t *p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    const uint32x4_t x = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
    return mul(vreinterpretq_f32_u32(vshlq_n_u32(x, 20)), set(kScaleUnit));
  }
  static void prefetch(const char *p) { __builtin_prefetch(p, 0, 2); }

#ifdef __ARM_FEATURE_DOTPROD
  using Bytes = int8x16_t;  // signed, four a lane
  struct ByteSums {         // 256 * high + low
    int32x4_t low, high;
  };
  static Bytes to_bytes(Words a) { return vreinterpretq_s8_s16(a); }
  static Bytes minus_128(Bytes a) { return veorq_s8(a, vdupq_n_s8(-128)); }  // of unsigned ones
  static ByteSums start_bytes(int x) { return {vdupq_n_s32(x), vdupq_n_s32(0)}; }
  static ByteSums dot(Bytes codes, const int16_t *limbs, ByteSums c) {
    const int8x8_t both = vld1_s8(reinterpret_cast<const int8_t *>(limbs));
    return {vdotq_lane_s32(c.low, codes, both, 0), vdotq_lane_s32(c.high, codes, both, 1)};
  }
  static Vec to_floats(ByteSums a) { return vcvtq_f32_s32(vmlaq_n_s32(a.low, a.high, 256)); }
  // Each four words as four signed low bytes, then four high ones. `a` has the order of `to_words`.
  static void store_limbs(int16_t *p, Words a) {
    const int8_t order[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
    const int8x16_t limbs = vcombine_s8(vmovn_s16(a), vrshrn_n_s16(a, 8));
    vst1q_s8(reinterpret_cast<int8_t *>(p), vqtbl1q_s8(limbs, vreinterpretq_u8_s8(vld1q_s8(order))));
  }
#endif

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  static constexpr bool kDotsBf16 = true;
  using Pairs = bfloat16x8_t;
  static Pairs load_pairs(const bf16_t *p) { return vreinterpretq_bf16_u16(load_words(p)); }
  static Pairs load_pairs_tail(const bf16_t *p, int n) {
    bf16_t padded[2 * kLanes] = {};
    for (int i = 0; i < n; ++i) padded[i] = p[i];
    return load_pairs(padded);
  }
  static Vec dot(Pairs a, Pairs b, Vec c) { return vbfdotq_f32(c, a, b); }
  static Vec as_floats(Pairs a) { return vreinterpretq_f32_bf16(a); }  // the same bits
  static Vec dot_pairs(Vec a, Vec b, Vec c) { return dot(vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b), c); }
  // Lanes of both, rounded to bf16: lane i is the pair (a[i], b[i]).
  static Vec pairs(Vec a, Vec b) {
    const uint16x4_t first = rounded(a), second = rounded(b);
    return vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(first, second), vzip2_u16(first, second)));
  }
  static void store_bf16(bf16_t *p, Vec a) { vst1_u8(reinterpret_cast<uint8_t *>(p), vreinterpret_u8_u16(rounded(a))); }
#else
  static constexpr bool kDotsBf16 = false;
#endif

 private:
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  static uint16x4_t rounded(Vec a) { return vreinterpret_u16_bf16(vcvt_bf16_f32(a)); }
#endif
  // Storage need not be aligned, as no pointer to codes is.
  static uint8x16_t load_bytes(const void *p) { return vld1q_u8(static_cast<const uint8_t *>(p)); }
  static uint16x8_t load_words(const void *p) { return vreinterpretq_u16_u8(load_bytes(p)); }
  static uint16x4_t load_halves(const void *p) { return vreinterpret_u16_u8(vld1_u8(static_cast<const uint8_t *>(p))); }
  static uint16x8_t shift_right(uint16x8_t a, int n) { return vshlq_u16(a, vdupq_n_s16(static_cast<int16_t>(-n))); }
};

}  // namespace
