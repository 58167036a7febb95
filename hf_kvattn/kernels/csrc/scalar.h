// Storage types and their conversions, one number at a time.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

inline float from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16_t x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16_t x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest << 13));  // inf, NaN
  // The product with 2^112 normalises subnormals.
  return from_bits(sign | to_bits(from_bits(rest << 13) * from_bits(0x77800000)));
}

// All narrowing rounds to nearest, ties to even.
inline void narrow(float x, float *out) { *out = x; }
inline void narrow(float x, bf16_t *out) {
  uint32_t u = to_bits(x);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void narrow(float x, f16_t *out) {
  uint32_t u = to_bits(x), sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  uint32_t half;
  if (u > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (u >= 0x477ff000) {
    half = 0x7c00;  // overflows to inf
  } else if (u < 0x38800000) {
    half = to_bits(from_bits(u) + from_bits(0x3f000000)) - 0x3f000000;  // the sum rounds to the subnormal grid
  } else {
    half = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// Of quant/few_bits.py: what a key's two bits stand for, their inverses, and the unit of a value's scale.
constexpr float kMultipliers[] = {0.55f, 0.8f, 1.1f, 1.5f};
constexpr float kInverseMultipliers[] = {1 / 0.55, 1 / 0.8, 1 / 1.1, 1 / 1.5};
constexpr int kScaleBias = 110;
constexpr float kScaleUnit = 0x1p110f;

}  // namespace
