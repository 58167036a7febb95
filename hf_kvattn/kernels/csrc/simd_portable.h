// Plain C++ vectors of eight floats: correct on every CPU, and as fast as the compiler makes them.
#pragma once
#include <math.h>

#include "scalar.h"

namespace {  // one per variant: each is compiled with its own flags and must not be merged with another's

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kRows = 2;     // rows held in registers at once
  static constexpr int kVectors = 2;  // vectors of a value row held at once
  static constexpr bool kDotsBf16 = false;
  struct Vec {
    float lane[kLanes];
  };

#define KVATTN_EACH for (int i = 0; i < kLanes; ++i)
  static Vec set(float x) {
    Vec r;
    KVATTN_EACH r.lane[i] = x;
    return r;
  }
  static Vec load(const float *p) {
    Vec r;
    KVATTN_EACH r.lane[i] = p[i];
    return r;
  }
  static void store(float *p, Vec a) { KVATTN_EACH p[i] = a.lane[i]; }
  template <typename T>
  static Vec widen(const T *p) {
    Vec r;
    KVATTN_EACH r.lane[i] = to_float(p[i]);
    return r;
  }
  template <typename T>
  static Vec widen_some(const T *p, int n) {
    Vec r = set(0.f);
    for (int i = 0; i < n; ++i) r.lane[i] = to_float(p[i]);
    return r;
  }
  // kLanes 32-bit words, each shifted right and masked, as floats.
  static Vec codes(const uint8_t *p, int shift) {
    Vec r;
    KVATTN_EACH {
      uint32_t word;
      memcpy(&word, p + 4 * i, 4);
      r.lane[i] = static_cast<float>(word >> shift & 0xff);
    }
    return r;
  }
  static Vec add(Vec a, Vec b) {
    KVATTN_EACH a.lane[i] += b.lane[i];
    return a;
  }
  static Vec mul(Vec a, Vec b) {
    KVATTN_EACH a.lane[i] *= b.lane[i];
    return a;
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    KVATTN_EACH c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  // A NaN in b is kept.
  static Vec max(Vec a, Vec b) {
    KVATTN_EACH a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  // What x is above the next lower whole number, which x becomes; -127 counts as 0 in `scale_pow2`.
  static Vec fraction(Vec &x) {
    Vec rest;
    KVATTN_EACH {
      x.lane[i] = -127.f > x.lane[i] ? -127.f : x.lane[i];
      const float whole = floorf(x.lane[i]);
      rest.lane[i] = x.lane[i] - whole, x.lane[i] = whole;
    }
    return rest;
  }
  static Vec div(Vec a, Vec b) {
    KVATTN_EACH a.lane[i] /= b.lane[i];
    return a;
  }
  // a * 2^n for whole n in [-127, 127]; 2^-127 counts as 0.
  static Vec scale_pow2(Vec a, Vec n) {
    KVATTN_EACH {
      a.lane[i] *= from_bits(static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127) << 23);
    }
    return a;
  }
  static bool all_at_most(Vec a, float x) {
    bool all = true;
    KVATTN_EACH all = all && a.lane[i] <= x;
    return all;
  }
  static float sum(Vec a) {
    float s = 0;
    KVATTN_EACH s += a.lane[i];
    return s;
  }
  static float max_lane(Vec a) {
    float m = a.lane[0];
    KVATTN_EACH m = m > a.lane[i] ? m : a.lane[i];
    return m;
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float *out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
  }
#undef KVATTN_EACH
};

}  // namespace
