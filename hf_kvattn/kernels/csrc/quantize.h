// Quantizes whole blocks of 32 tokens to codes of 8 or 4 bits. The results are those of quant/blocks.py bit for bit:
// the operations are the same, in the same order. Inner loops run over neighbouring numbers, so that compilers
// vectorize them.
#pragma once

namespace {

// To the nearest integer, ties to even, for magnitudes below 2^22.
inline float round_to_int(float x) { return x + 12582912.f - 12582912.f; }

inline float round_to_bf16(float x, uint16_t *stored) {
  bf16_t narrowed;
  narrow(x, &narrowed);
  *stored = narrowed.bits;
  return to_float(narrowed);
}

// Quantizes n groups: x[i * n + j] is number i of group j, and codes[i * n + j] its code. Each group gets a scale and,
// below 8 bits, a zero point.
inline void encode(const float *x, int n, int group, int bits, uint8_t *codes, uint16_t *scale_out,
                   uint16_t *zero_out) {
  float low[kMaxDim], high[kMaxDim], scale[kMaxDim];
  for (int j = 0; j < n; ++j) low[j] = high[j] = x[j];
  for (int i = 1; i < group; ++i)
    for (int j = 0; j < n; ++j) {
      const float y = x[i * n + j];
      low[j] = y < low[j] ? y : low[j];
      high[j] = y > high[j] ? y : high[j];
    }
  const bool symmetric = bits == 8;
  for (int j = 0; j < n; ++j) {
    if (symmetric) {
      const float largest = -low[j] > high[j] ? -low[j] : high[j];
      // + 0: the largest of zeros may be -0, and PyTorch's is not.
      low[j] = 0.f, scale[j] = round_to_bf16((largest + 0.f) / 127.f, scale_out + j);
    } else {
      low[j] = round_to_bf16(low[j], zero_out + j);
      const float range = high[j] - low[j];  // the rounded zero may lie above a nearly constant group
      scale[j] = round_to_bf16((range > 0.f ? range : 0.f) / 15.f, scale_out + j);
    }
  }
  const float min_code = symmetric ? -127.f : 0.f, max_code = symmetric ? 127.f : 15.f, add = symmetric ? 128.f : 0.f;
  for (int i = 0; i < group; ++i)
    for (int j = 0; j < n; ++j) {
      float code = scale[j] > 0.f ? (x[i * n + j] - low[j]) / scale[j] : 0.f;
      // Clamped before it is rounded: the bounds are integers, so the result is the same, and the rounding needs small
      // numbers.
      code = code < min_code ? min_code : code > max_code ? max_code : code;
      codes[i * n + j] = static_cast<uint8_t>(round_to_int(code) + add);
    }
}

// Keys `x` (32, d) of one block.
inline void quantize_keys(const float *x, int d, int bits, uint8_t *packed, uint16_t *scale, uint16_t *zero) {
  uint8_t codes[kBlock * kMaxDim];
  encode(x, d, kBlock, bits, codes, scale, zero);
  for (int c = 0; c < d; c += 4)
    for (int t = 0; t < kBlock / 2; ++t)
      for (int j = 0; j < 4; ++j) {
        const uint8_t first = codes[t * d + c + j], second = codes[(t + kBlock / 2) * d + c + j];
        uint8_t *to = packed + c / 4 * (16 * bits) + 4 * t + j;
        if (bits == 8)
          to[0] = first, to[kUnit] = second;
        else
          to[0] = static_cast<uint8_t>(first | second << 4);
      }
}

// Rotated values `x` (32, d) of one block.
inline void quantize_values(const float *x, int d, int group, int bits, uint8_t *packed, uint16_t *scale,
                            uint16_t *zero) {
  uint8_t codes[kBlock * kMaxDim];  // (d, 32)
  float transposed[kBlock * kMaxDim];
  for (int g = 0; g < d / group; ++g) {
    for (int c = 0; c < group; ++c)
      for (int t = 0; t < kBlock; ++t) transposed[c * kBlock + t] = x[t * d + g * group + c];
    const int at = g * kBlock;
    encode(transposed, kBlock, group, bits, codes + at * group, scale + at, zero ? zero + at : nullptr);
  }
  for (int c = 0; c < d; ++c)
    for (int t = 0; t < kBlock; t += 4)
      for (int j = 0; j < 4; ++j) {
        const uint8_t *code = codes + c * kBlock + t + j;
        uint8_t *to = packed + c / 16 * (64 * bits) + c % 16 * 4 + j;
        if (bits == 8)
          to[t / 4 * kUnit] = *code;
        else if (t % 8 == 0)
          to[t / 8 * kUnit] = static_cast<uint8_t>(code[0] | code[4] << 4);
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
      quantize_keys(x, d, a.k_bits, a.k_codes + slot * 4 * a.k_bits * d, a.k_scale + slot * d,
                    a.k_zero ? a.k_zero + slot * d : nullptr);
      rows(a.v, a.v_stride, head, block, x);
      for (int t = 0; t < kBlock; ++t) hadamard(x + t * d, d, static_cast<int>(a.v_rotation));
      const int64_t at = slot * groups * kBlock;
      quantize_values(x, d, static_cast<int>(a.v_group), a.v_bits, a.v_codes + slot * 4 * a.v_bits * d, a.v_scale + at,
                      a.v_zero ? a.v_zero + at : nullptr);
    }
  });
}

}  // namespace
