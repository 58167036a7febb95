// Plain C++ vectors of eight floats, for every CPU. The speed is up to the compiler's vectorizer.
#pragma once
#include <math.h>

#include "scalar.h"

namespace {  // one per variant: each is compiled with its own flags and must not be merged with another's

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kRows = 2;         // rows held in registers at once
  static constexpr int kVectors = 2;      // vectors of a value row held at once
  static constexpr int kUnroll = 1;       // each operation is a loop: GCC takes minutes to unroll them
  static constexpr int kProductRows = 2;  // with kProductVectors, what a product of tiles holds in registers
  static constexpr int kProductVectors = 2;
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
  static Vec widen_tail(const T *p, int n) {
    Vec r = set(0.f);
    for (int i = 0; i < n; ++i) r.lane[i] = to_float(p[i]);
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
  static Vec abs(Vec a) {
    KVATTN_EACH a.lane[i] = fabsf(a.lane[i]);
    return a;
  }
  // A NaN in b is kept.
  static Vec max(Vec a, Vec b) {
    KVATTN_EACH a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  // The fractional part of x. x becomes its floor, and at least -127, for which
  // `scale_pow2` returns 0.
  static Vec fraction(Vec &x) {
    Vec rest;
    KVATTN_EACH {
      x.lane[i] = -127.f > x.lane[i] ? -127.f : x.lane[i];
      const float floor_x = floorf(x.lane[i]);
      rest.lane[i] = x.lane[i] - floor_x, x.lane[i] = floor_x;
    }
    return rest;
  }
  static Vec div(Vec a, Vec b) {
    KVATTN_EACH a.lane[i] /= b.lane[i];
    return a;
  }
  // a * 2^n for integers n in [-127, 127]; for -127 the result is 0.
  static Vec scale_pow2(Vec a, Vec n) {
    KVATTN_EACH { a.lane[i] *= from_bits(static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127) << 23); }
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
  static void max4(Vec a, Vec b, Vec c, Vec d, float *out) {
    out[0] = max_lane(a), out[1] = max_lane(b), out[2] = max_lane(c), out[3] = max_lane(d);
  }
  // The lanes of a and b in turns, a's first: those of the lower halves, and of the upper ones.
  static void zip(Vec a, Vec b, Vec &low, Vec &high) {
    KVATTN_EACH low.lane[i] = i % 2 ? b.lane[i / 2] : a.lane[i / 2];
    KVATTN_EACH high.lane[i] = i % 2 ? b.lane[(i + kLanes) / 2] : a.lane[(i + kLanes) / 2];
  }

  struct Words {  // 16-bit integers, two a lane
    int16_t first[kLanes], second[kLanes];
  };
  struct Ints {  // 32-bit integers; sums wrap
    uint32_t lane[kLanes];
  };
  static Words pair(const int16_t *p) {  // the two words at p in every lane
    Words r;
    KVATTN_EACH r.first[i] = p[0], r.second[i] = p[1];
    return r;
  }
  // The words at p, shifted to the right (to the left where that is negative), and of them the bits of the mask.
  static Words codes(const void *p, int shift, int mask) {
    uint16_t word[2 * kLanes];
    memcpy(word, p, sizeof word);
    auto code = [&](int i) { return static_cast<int16_t>((shift < 0 ? word[i] << -shift : word[i] >> shift) & mask); };
    Words r;
    KVATTN_EACH r.first[i] = code(2 * i), r.second[i] = code(2 * i + 1);
    return r;
  }
  static Words low_bytes(Words a) {
    KVATTN_EACH a.first[i] &= 0xff, a.second[i] &= 0xff;
    return a;
  }
  static Words high_bytes(Words a) {
    KVATTN_EACH a.first[i] = a.first[i] >> 8 & 0xff, a.second[i] = a.second[i] >> 8 & 0xff;
    return a;
  }
  static Words join(Words a, Words b) {
    KVATTN_EACH a.first[i] |= b.first[i], a.second[i] |= b.second[i];
    return a;
  }
  static Ints set_int(int x) {
    Ints r;
    KVATTN_EACH r.lane[i] = static_cast<uint32_t>(x);
    return r;
  }
  static Ints dot(Words a, Words b, Ints c) {
    KVATTN_EACH c.lane[i] += static_cast<uint32_t>(a.first[i] * b.first[i] + a.second[i] * b.second[i]);
    return c;
  }
  static Vec to_floats(Ints a) {
    Vec r;
    KVATTN_EACH r.lane[i] = static_cast<float>(static_cast<int32_t>(a.lane[i]));
    return r;
  }
  // Rounded to 16 bits. The second and third of each four numbers change places.
  static Words to_words(Vec a, Vec b) {
    float both[2 * kLanes];
    store(both, a), store(both + kLanes, b);
    auto nearest = [&](int i) { return static_cast<int16_t>(both[i] + 12582912.f - 12582912.f); };  // ties to even
    Words r;
    KVATTN_EACH r.first[i] = nearest(i / 2 * 4 + i % 2), r.second[i] = nearest(i / 2 * 4 + i % 2 + 2);
    return r;
  }
  static void store_words(int16_t *p, Words a) { KVATTN_EACH p[2 * i] = a.first[i], p[2 * i + 1] = a.second[i]; }
  // Of kLanes channels the multipliers and the offsets, from 0 on (quant/few_bits.py); of as many bytes the scales.
  static Vec multipliers(const uint8_t *p) {
    Vec r;
    KVATTN_EACH r.lane[i] = kMultipliers[p[i / 4] >> i % 4 * 2 & 3];
    return r;
  }
  static Vec offsets(const uint8_t *p) {
    Vec r;
    KVATTN_EACH r.lane[i] = static_cast<float>(p[i / 2] >> i % 2 * 4 & 15);
    return r;
  }
  static Vec scales(const uint8_t *p) {
    Vec r;
    KVATTN_EACH r.lane[i] = from_bits(static_cast<uint32_t>(p[i]) << 20) * kScaleUnit;
    return r;
  }
  static void prefetch(const char *p) { __builtin_prefetch(p, 0, 2); }
#undef KVATTN_EACH
};

}  // namespace
