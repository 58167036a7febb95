// Products of a few rows with weight matrices, as decode steps need them: out[r][n] = x[r] . w[n].
//
// Such a product is bound by reading the weights. They lie as torch.nn.Linear keeps them, a row for each output, so it
// is attention's product of queries and keys: `score_block` with weights for keys. Each row of weights is read once.
#pragma once
#include "attend.h"

namespace {

template <typename T, typename W>
class Linear {
  static constexpr bool kInBf16 = kSame<T, bf16_t> && kSame<W, bf16_t> && Simd::kDotsBf16;
  static constexpr int kTogether = 4;  // rows of weights, as in `score_block`

 public:
  explicit Linear(const kvattn_linear_args &args)
      : a(args), rows(static_cast<int>(a.rows)), d(static_cast<int>(a.in)), d_pad(round_up(d, 64)) {
    for (int i = 0; i < a.weights; ++i) outputs += a.weight[i].out;
  }

  void run() {
    Buffer<float> wide(kInBf16 ? 0 : rows * d_pad);
    Buffer<bf16_t> pairs(kInBf16 ? rows * d_pad : 0);
    for (int64_t r = 0; r < rows; ++r) {
      const T *row = static_cast<const T *>(a.x) + r * a.x_stride;
      if constexpr (kInBf16) {
        for (int64_t c = 0; c < d_pad; ++c) pairs.data[r * d_pad + c] = c < d ? row[c] : bf16_t{0};
      } else {
        fill(wide.data + r * d_pad, wide.data + (r + 1) * d_pad, 0.f);
        widen_row(row, d, wide.data + r * d_pad);
      }
    }
    parallel(a.threads, [&](int thread, int count) {
      T *out = static_cast<T *>(a.out);
      for (int i = 0; i < a.weights; ++i) {
        const kvattn_weight &weight = a.weight[i];
        const int64_t blocks = (weight.out + kTogether - 1) / kTogether;
        for (int64_t block = blocks * thread / count; block < blocks * (thread + 1) / count; ++block) {
          const int64_t n = kTogether * block;
          const int together = static_cast<int>(min<int64_t>(kTogether, weight.out - n));
          const W *w = static_cast<const W *>(weight.w) + n * weight.stride;
          if constexpr (sizeof(W) < sizeof(float)) prefetch(w + 2 * kTogether * weight.stride, weight.stride);
          float sums[KVATTN_MAX_ROWS * kTile];
          for_row_blocks(rows, [&](auto size, int r) {
            if constexpr (kInBf16)
              score_block_bf16<size.value>(pairs.data + r * d_pad, d_pad, w, weight.stride, together, d,
                                           sums + r * kTile);
            else
              score_block<size.value>(wide.data + r * d_pad, d_pad, w, weight.stride, together, d, sums + r * kTile);
          });
          for (int64_t r = 0; r < rows; ++r)
            for (int j = 0; j < together; ++j) narrow(sums[r * kTile + j], out + r * outputs + n + j);
        }
        out += weight.out;
      }
    });
  }

 private:
  // Rows of a few hundred narrow weights end before the CPU's own prefetchers have found them. Measured with AVX2 and
  // 576 columns: int8 weights are read 1.5 times faster, those of 16 bits 1.1 times, float32 ones no faster.
  static void prefetch(const W *w, int64_t stride) {
    const char *from = reinterpret_cast<const char *>(w), *to = reinterpret_cast<const char *>(w + kTogether * stride);
    for (; from < to; from += 64) Simd::prefetch(from);
  }

  const kvattn_linear_args &a;
  int rows, d;
  int64_t d_pad, outputs = 0;
};

template <typename T>
void linear(const kvattn_linear_args &a) {
  if (a.w_dtype == KVATTN_I8)
    Linear<T, int8_t>(a).run();
  else
    Linear<T, T>(a).run();
}

}  // namespace
