// Attention over blocks of 32 quantized tokens, read as packed (the layout is that of quant/layout.py).
//
// Scales never touch the codes: a key's channel scales are folded into the query once per block, a value's token scales
// into the weights, and the zeros become one number a row. What remains are products of small integers with floats
// here, and of bytes with bytes where the CPU has them (packed_vnni.h).
#pragma once
#include "scalar.h"

namespace {

constexpr int kBlock = 32;     // tokens
constexpr int kUnit = 64;      // codes of a unit: 16 lanes of 4
constexpr int kUnits = 8;      // units of 16 channels of a block, in 64 * bits bytes
constexpr int kMaxDim = 512;   // channels

// Blocks of one KV head. Without zeros the codes are signed numbers to which 128 was added.
struct PackedKeys {
  PackedKeys at(int64_t block) const {
    return {codes + block * 4 * bits * d, scale + block * d, zero ? zero + block * d : nullptr, bits, d};
  }
  const uint8_t *codes;
  const bf16_t *scale, *zero;  // (blocks, d)
  int bits, d;                 // d is a multiple of 16
};

struct PackedValues {
  PackedValues at(int64_t block) const {
    int64_t scales = block * (d / group) * kBlock;
    return {codes + block * 4 * bits * d, scale + scales, zero ? zero + scales : nullptr, bits, d, group};
  }
  const uint8_t *codes;
  const bf16_t *scale, *zero;  // (blocks, d / group, 32)
  int bits, d, group;          // group is a multiple of 16 that divides d
};

constexpr float kSignedZero = -128.f;

}  // namespace

#ifdef __AVX512VNNI__
#include "packed_vnni.h"
#else

namespace {

// The codes of 16 channels of a block, one a byte.
inline void unpack_units(const uint8_t *p, int bits, uint8_t *to) {
  const int low = bits == 3 ? 2 : bits, shared = 8 / low;
  for (int u = 0; u < kUnits; ++u)
    for (int i = 0; i < kUnit; ++i)
      to[u * kUnit + i] = static_cast<uint8_t>(p[u / shared * kUnit + i] >> (u % shared * low) & ((1 << low) - 1));
  if (bits == 3)
    for (int u = 0; u < kUnits; ++u)
      for (int i = 0; i < kUnit; ++i) to[u * kUnit + i] |= static_cast<uint8_t>((p[2 * kUnit + i] >> u & 1) << 2);
}

inline Simd::Vec zeros_at(const bf16_t *zero, const bf16_t *scale, int i) {
  return zero ? Simd::widen(zero + i) : Simd::mul(Simd::widen(scale + i), Simd::set(kSignedZero));
}

// scores[r * stride + t] = q[r] . key[t] + offset[r], for `blocks` blocks.
template <int R>
void packed_scores(const PackedKeys &first, int blocks, const float *q, int64_t q_stride, const float *offset,
                   float *scores, int64_t stride) {
  constexpr int kParts = kBlock / Simd::kLanes, kHalf = kParts / 2;
  for (int b = 0; b < blocks; ++b, scores += kBlock) {
    PackedKeys keys = first.at(b);
    float folded[R][kMaxDim];
    Simd::Vec sum[R][kParts];
    for (int r = 0; r < R; ++r) {
      Simd::Vec zero_part = Simd::set(0.f);
      for (int c = 0; c < keys.d; c += Simd::kLanes) {
        Simd::Vec x = Simd::load(q + r * q_stride + c);
        Simd::store(folded[r] + c, Simd::mul(x, Simd::widen(keys.scale + c)));
        zero_part = Simd::fma(x, zeros_at(keys.zero, keys.scale, c), zero_part);
      }
      for (int p = 0; p < kParts; ++p) sum[r][p] = Simd::set(Simd::sum(zero_part) + offset[r]);
    }
    for (int c = 0; c < keys.d; c += 16) {
      uint8_t units[kUnits * kUnit];
      unpack_units(keys.codes + c * 4 * keys.bits, keys.bits, units);
      for (int quad = 0; quad < 4; ++quad)
        for (int p = 0; p < kParts; ++p) {
          const uint8_t *lanes = units + (2 * quad + p / kHalf) * kUnit + p % kHalf * 4 * Simd::kLanes;
          for (int j = 0; j < 4; ++j) {
            Simd::Vec code = Simd::codes(lanes, 8 * j);
            for (int r = 0; r < R; ++r)
              sum[r][p] = Simd::fma(Simd::set(folded[r][c + 4 * quad + j]), code, sum[r][p]);
          }
        }
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < kParts; ++p) Simd::store(scores + r * stride + p * Simd::kLanes, sum[r][p]);
  }
}

// acc[r * acc_stride + c] += sum over the blocks' tokens t of weights[r * stride + t] * value[t][c]. Weights have no
// digits here, whatever their number.
template <int R, int>
void packed_values(const PackedValues &first, int blocks, const float *weights, int64_t stride, float *acc,
                   int64_t acc_stride) {
  for (int b = 0; b < blocks; ++b, weights += kBlock) {
    PackedValues values = first.at(b);
    for (int c = 0; c < values.d; c += 16) {
      float folded[R][kBlock], offset[R];
      const int scales = c / values.group * kBlock;
      for (int r = 0; r < R; ++r) {
        Simd::Vec zero_part = Simd::set(0.f);
        for (int t = 0; t < kBlock; t += Simd::kLanes) {
          Simd::Vec w = Simd::load(weights + r * stride + t);
          Simd::store(folded[r] + t, Simd::mul(w, Simd::widen(values.scale + scales + t)));
          zero_part = Simd::fma(w, zeros_at(values.zero, values.scale, scales + t), zero_part);
        }
        offset[r] = Simd::sum(zero_part);
      }
      uint8_t units[kUnits * kUnit];
      unpack_units(values.codes + c * 4 * values.bits, values.bits, units);
      for (int lane = 0; lane < 16; lane += Simd::kLanes) {
        Simd::Vec sum[R][4];
        for (int r = 0; r < R; ++r)
          for (int j = 0; j < 4; ++j) sum[r][j] = Simd::set(j ? 0.f : offset[r]);
        for (int t = 0; t < kUnits; ++t)
          for (int j = 0; j < 4; ++j) {
            Simd::Vec code = Simd::codes(units + t * kUnit + lane * 4, 8 * j);
            for (int r = 0; r < R; ++r) sum[r][j] = Simd::fma(Simd::set(folded[r][4 * t + j]), code, sum[r][j]);
          }
        for (int r = 0; r < R; ++r) {
          float *to = acc + r * acc_stride + c + lane;
          Simd::Vec all = Simd::add(Simd::add(sum[r][0], sum[r][1]), Simd::add(sum[r][2], sum[r][3]));
          Simd::store(to, Simd::add(Simd::load(to), all));
        }
      }
    }
  }
}

}  // namespace
#endif
