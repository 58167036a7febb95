// Quantizes whole blocks of 32 tokens. The results are those of quant/blocks.py bit for bit: the operations are the
// same, in the same order, and none are fused (CMakeLists.txt). Inner loops run over neighbouring numbers, so that
// compilers vectorize them.
#pragma once

namespace {

constexpr float kSteps[] = {1.596f, 0.9957f, 0.586f, 0.3352f};  // these four as in quant/few_bits.py
constexpr float kLargestSteps = 0x1p20f, kLargestValue = 0x1p40f;
constexpr int kChannels = 16;  // that share a width

// To the nearest integer, ties to even, for magnitudes below 2^22.
inline float round_to_int(float x) { return x + 12582912.f - 12582912.f; }

inline float round_to_bf16(float x, uint16_t *stored) {
  bf16_t narrowed;
  narrow(x, &narrowed);
  *stored = narrowed.bits;
  return to_float(narrowed);
}

inline float clamp(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

// Codes of 8 bits of n groups: x[i * n + j] is number i of group j, and codes[i * n + j] its code.
inline void encode(const float *x, int n, int group, uint8_t *codes, uint16_t *scale_out) {
  float largest[kMaxDim] = {}, scale[kMaxDim];
  for (int i = 0; i < group; ++i)
    for (int j = 0; j < n; ++j) {
      const float y = fabsf(x[i * n + j]);
      largest[j] = y > largest[j] ? y : largest[j];
    }
  for (int j = 0; j < n; ++j) scale[j] = round_to_bf16(largest[j] / 127.f, scale_out + j);
  for (int i = 0; i < group; ++i)
    for (int j = 0; j < n; ++j) {
      // Clamped before it is rounded: the bounds are integers, so the result is the same, and the rounding needs small
      // numbers.
      const float code = clamp(scale[j] > 0.f ? x[i * n + j] / scale[j] : 0.f, -127.f, 127.f);
      codes[i * n + j] = static_cast<uint8_t>(round_to_int(code) + 128.f);
    }
}

// Adds up `count` rows of N numbers into the first one, as `tree_sum` of quant/few_bits.py does.
template <int N>
void add_rows(float *x, int count) {
  for (; count % 2 == 0; count /= 2)
    for (int i = 0; i < count / 2 * N; ++i) x[i] += x[count / 2 * N + i];
  for (int row = 1; row < count; ++row)
    for (int i = 0; i < N; ++i) x[i] += x[row * N + i];
}

// Codes of a group of key channels, x (32, kChannels), to `codes`, whose rows lie `stride` apart.
inline void encode_keys(float *x, const bf16_t *step, const bf16_t *unit, int width, uint8_t *codes, int stride,
                        uint8_t *offset, uint8_t *multiplier) {
  constexpr int n = kChannels;
  const float top = static_cast<float>((1 << width) - 1), half = top * 0.5f;
  float inverse[n], shift[n], low[n], high[n], factor[n], best_error[n], best[n] = {};
  for (int c = 0; c < n; ++c) inverse[c] = 1.f / to_float(step[c]), low[c] = kInf, high[c] = -kInf;
  for (int t = 0; t < kBlock; ++t)
    for (int c = 0; c < n; ++c) {
      const float w = clamp(x[t * n + c] * inverse[c], -kLargestSteps, kLargestSteps);
      x[t * n + c] = w;
      low[c] = w < low[c] ? w : low[c];
      high[c] = w > high[c] ? w : high[c];
    }
  for (int c = 0; c < n; ++c) {
    const float steps = to_float(unit[c]) * inverse[c], middle = (high[c] + low[c]) * 0.5f;
    const float rounded = round_to_int(clamp(middle * (1.f / steps), -8.f, 7.f));
    shift[c] = rounded * steps;
    offset[c] = static_cast<uint8_t>(rounded + kOffsetZero);
  }
  for (int t = 0; t < kBlock; ++t)
    for (int c = 0; c < n; ++c) x[t * n + c] -= shift[c];
  for (int i = 0; i < 4; ++i) {
    const float m = kMultipliers[i], inverse_m = kInverseMultipliers[i];
    float error[kBlock * n];
    for (int j = 0; j < kBlock * n; ++j) {
      const float code = round_to_int(clamp(x[j] * inverse_m + half, 0.f, top));
      const float e = (code - half) * m - x[j], square = e * e;
      error[j] = square * square;
    }
    add_rows<n>(error, kBlock);
    for (int c = 0; c < n; ++c) {
      const bool better = i == 0 || error[c] < best_error[c];
      best_error[c] = better ? error[c] : best_error[c];
      factor[c] = better ? inverse_m : factor[c];
      best[c] = better ? static_cast<float>(i) : best[c];
    }
  }
  for (int c = 0; c < n; ++c) multiplier[c] = static_cast<uint8_t>(best[c]);
  for (int t = 0; t < kBlock; ++t)
    for (int c = 0; c < n; ++c)
      codes[t * stride + c] = static_cast<uint8_t>(round_to_int(clamp(x[t * n + c] * factor[c] + half, 0.f, top)));
}

// Codes of a group of channels of values, x (group, 32).
inline void encode_values(float *x, int group, int bits, uint8_t *codes, uint8_t *scale_out) {
  constexpr int n = kBlock;
  const float top = static_cast<float>((1 << bits) - 1), half = top / 2, part = static_cast<float>(1.0 / group);
  float sums[kMaxDim * n], squares[n], inverse[n];
  for (int i = 0; i < group * n; ++i) {
    x[i] = clamp(x[i], -kLargestValue, kLargestValue);
    sums[i] = x[i] * x[i];
  }
  add_rows<n>(sums, group);
  for (int t = 0; t < n; ++t) {
    squares[t] = sums[t];
    const float step = sqrtf(squares[t] * part) * kSteps[bits - 1];
    inverse[t] = step > 0.f ? 1.f / step : 0.f;
  }
  for (int i = 0; i < group; ++i)
    for (int t = 0; t < n; ++t) {
      const float code = round_to_int(clamp(x[i * n + t] * inverse[t] + half, 0.f, top));
      codes[i * n + t] = static_cast<uint8_t>(code);
      sums[i * n + t] = x[i * n + t] * (code - half);
    }
  add_rows<n>(sums, group);
  for (int t = 0; t < n; ++t) {
    const float scale = sums[t] > 0.f ? squares[t] / sums[t] : 0.f;
    const int rounded = static_cast<int>((to_bits(scale) + (1u << 19)) >> 20) - (kScaleBias << 3);
    scale_out[t] = static_cast<uint8_t>(rounded < 8 ? 0 : rounded > 255 ? 255 : rounded);
  }
}

// Packs 16 channels of a block. `words` has four codes for each lane of each unit.
inline uint8_t *pack_units(const uint32_t (*words)[16], int bits, uint8_t *to) {
  for (int low = 0; bits > 0;) {
    const int plane = first_plane(bits), shared = 8 / plane;
    const uint32_t mask = ((1u << plane) - 1) * 0x01010101u;
    for (int i = 0; i < kUnits; i += shared, to += kUnit) {
      uint32_t packed[16] = {};
      for (int j = 0; j < shared; ++j)
        for (int lane = 0; lane < 16; ++lane) packed[lane] |= (words[i + j][lane] >> low & mask) << (j * plane);
      memcpy(to, packed, kUnit);
    }
    bits -= plane, low += plane;
  }
  return to;
}

// Keys `x` (32, d) of one block, without their mean.
inline void quantize_keys(const float *x, int d, const KeyTable &table, uint8_t *packed, uint8_t *scale) {
  uint8_t codes[kBlock * kMaxDim], multiplier[kMaxDim];
  if (!table.order) encode(x, d, kBlock, codes, reinterpret_cast<uint16_t *>(scale));
  for (int c = 0; c < d; c += kChannels) {
    const int width = table.width(c);
    if (table.order) {
      float group[kBlock * kChannels];
      uint8_t offset[kChannels];
      for (int t = 0; t < kBlock; ++t)
        for (int i = 0; i < kChannels; ++i) group[t * kChannels + i] = x[t * d + table.order[c + i]];
      encode_keys(group, table.step + c, table.unit + c, width, codes + c, d, offset, multiplier + c);
      for (int i = 0; i < kChannels; i += 2) scale[(c + i) / 2] = static_cast<uint8_t>(offset[i] | offset[i + 1] << 4);
    }
    uint32_t words[kUnits][16];
    for (int unit = 0; unit < kUnits; ++unit)
      for (int t = 0; t < 16; ++t) memcpy(&words[unit][t], codes + (unit % 2 * 16 + t) * d + c + unit / 2 * 4, 4);
    packed = pack_units(words, width, packed);
  }
  for (int c = 0; table.order && c < d; c += 4)
    scale[d / 2 + c / 4] =
        static_cast<uint8_t>(multiplier[c] | multiplier[c + 1] << 2 | multiplier[c + 2] << 4 | multiplier[c + 3] << 6);
}

// Rotated values `x` (32, d) of one block.
inline void quantize_values(const float *x, int d, int group, int bits, uint8_t *packed, uint8_t *scale) {
  uint8_t codes[kBlock * kMaxDim];  // (d, 32)
  float transposed[kBlock * kMaxDim];
  for (int t = 0; t < kBlock; t += Simd::kLanes)
    for (int c = 0; c < d; c += Simd::kLanes) {
      Simd::Vec rows[Simd::kLanes];
      for (int i = 0; i < Simd::kLanes; ++i) rows[i] = Simd::load(x + (t + i) * d + c);
      transpose(rows);
      for (int i = 0; i < Simd::kLanes; ++i) Simd::store(transposed + (c + i) * kBlock + t, rows[i]);
    }
  for (int c = 0; c < d; c += group, scale += bits < 8 ? kBlock : 2 * kBlock) {
    float *from = transposed + c * kBlock;
    if (bits < 8)
      encode_values(from, group, bits, codes + c * kBlock, scale);
    else
      encode(from, kBlock, group, codes + c * kBlock, reinterpret_cast<uint16_t *>(scale));
  }
  for (int c = 0; c < d; c += kChannels) {
    uint32_t words[kUnits][16];
    for (int unit = 0; unit < kUnits; ++unit)
      for (int i = 0; i < 16; ++i) memcpy(&words[unit][i], codes + (c + i) * kBlock + 4 * unit, 4);
    packed = pack_units(words, bits, packed);
  }
}

template <typename T>
void quantize_all(const kvattn_quantize_args &a) {
  const int d = static_cast<int>(a.head_dim), groups = d / static_cast<int>(a.v_group);
  const int64_t jobs = a.batch * a.kv_heads * a.blocks;
  auto rows = [&](const void *from, const int64_t *stride, int64_t head, int64_t block, float *to) {
    const T *at = static_cast<const T *>(from) + head / a.kv_heads * stride[0] + head % a.kv_heads * stride[1];
    for (int64_t t = 0; t < kBlock; ++t) widen_row(at + (block * kBlock + t) * stride[2], d, to + t * d);
  };
  parallel(static_cast<int>(max<int64_t>(1, min<int64_t>(a.threads, jobs / 8))), [&](int thread, int count) {
    float x[kBlock * kMaxDim];
    for (int64_t job = jobs * thread / count; job < jobs * (thread + 1) / count; ++job) {
      const int64_t head = job / a.blocks, block = job % a.blocks, slot = head * a.packed_blocks + a.slot + block;
      rows(a.k, a.k_stride, head, block, x);
      for (int t = 0; t < kBlock; ++t)
        for (int c = 0; c < d; ++c) x[t * d + c] -= a.k_mean[head * d + c];
      quantize_keys(x, d, KeyTable(a, head), a.k_codes + slot * 4 * a.k_bits * d,
                    static_cast<uint8_t *>(a.k_scale) + slot * (a.k_bits < 8 ? 3 * d / 4 : 2 * d));
      rows(a.v, a.v_stride, head, block, x);
      for (int t = 0; t < kBlock; ++t) hadamard(x + t * d, d, static_cast<int>(a.v_rotation));
      quantize_values(x, d, static_cast<int>(a.v_group), a.v_bits, a.v_codes + slot * 4 * a.v_bits * d,
                      static_cast<uint8_t *>(a.v_scale) + slot * groups * kBlock * (a.v_bits < 8 ? 1 : 2));
    }
  });
}

}  // namespace
