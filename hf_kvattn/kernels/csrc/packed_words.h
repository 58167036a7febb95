// Dot products of packed codes as 16-bit words, summed in pairs into 32 bits (`vpmaddwd` on x86). A lane has four
// codes. They need no shuffle: codes 0 and 2 are the low bits of the lane's two words, codes 1 and 3 lie eight bits
// higher.
//
// Codes are centred: each sum starts at minus the midpoint times the sum of the quantized weights (or of the query). A
// weight's rounding error is therefore multiplied by a code's distance from the midpoint. Zero points are multiplied by
// the exact weights. Codes of 8 bits have no zero point: their midpoint stands for 0.
//
// Where an Arm CPU has dot products of signed bytes (`sdot`), a word is stored as two of them, a low limb and a high
// one, and a lane's four codes are multiplied at once.
//
// Loops are unrolled by pragmas where vectors are registers: otherwise GCC keeps arrays of vectors in memory.
#pragma once

namespace {

constexpr int kFineLimbs = 1;           // a quantized weight is one word, of 15 bits
constexpr int kUnroll = Simd::kUnroll;  // a pragma takes no qualified name

constexpr int midpoint_of(int bits) { return 1 << (bits - 1); }

inline Simd::Vec centred_zero(const bf16_t *zero, Simd::Vec scale, int i, int bits) {
  if (!zero) return Simd::set(0.f);
  return Simd::fma(scale, Simd::set(static_cast<float>(midpoint_of(bits))), Simd::widen(zero + i));
}

#ifdef __ARM_FEATURE_DOTPROD
using Unit = Simd::Bytes;
using UnitSums = Simd::ByteSums;
constexpr float kMaxWeight = kQueryMax;  // the high limb is at most 127

// What remains of it to subtract from codes as they are multiplied: 8 bits are signed then.
constexpr int code_midpoint(int bits) { return bits == 8 ? 0 : midpoint_of(bits); }

template <int Bits>
__attribute__((always_inline)) inline Unit load_unit(const uint8_t *p, int i) {
  constexpr int kLow = Bits == 3 ? 2 : Bits, kShared = 8 / kLow;
  return Simd::byte_codes(p + i / kShared * kUnit, i % kShared * kLow, kLow, Bits == 3 ? p + 2 * kUnit : nullptr, i);
}
inline UnitSums start_at(int x) { return Simd::start_bytes(x); }
inline void store(int16_t *to, Simd::Words words) { Simd::store_limbs(to, words); }

// Adds the products of a unit's codes and the four words at `words`, one for each token or channel.
__attribute__((always_inline)) inline UnitSums dot4(Unit codes, const int16_t *words, UnitSums sum) {
  return Simd::dot(codes, words, sum);
}
#else
using Unit = Codes;
using UnitSums = Simd::Ints;
constexpr float kMaxWeight = 32767.f;

constexpr int code_midpoint(int bits) { return midpoint_of(bits); }

template <int Bits>
__attribute__((always_inline)) inline Unit load_unit(const uint8_t *p, int i) {
  return load_codes<Bits>(p, i);
}
inline UnitSums start_at(int x) { return Simd::set_int(x); }
inline void store(int16_t *to, Simd::Words words) { Simd::store_words(to, words); }

// Adds the products of a unit's codes and the four words at `words`, one for each token or channel.
__attribute__((always_inline)) inline UnitSums dot4(Unit codes, const int16_t *words, UnitSums sum) {
  return Simd::dot(codes.odd, Simd::pair(words + 2), Simd::dot(codes.even, Simd::pair(words), sum));
}
#endif

// How a row's integer sum becomes a result: `scale * (start + products) + offset`. Queries keep their scale in
// `Queries`.
struct Sums {
  float scale[kPackedRows], offset[kPackedRows];
  int start[kPackedRows];
};

// R rows of N words. Of each four the second and third are swapped, to meet the even and odd codes of a lane. Or, of
// each four, the low limbs and then the high ones.
template <int R, int N>
struct FoldedWords : Sums {
  int16_t words[R][N];
};

// Sets `start` from the sums of the rows' words, and `offset` from what the zero points contribute.
inline void start_sums(const Simd::Ints *words, const Simd::Vec *zero_sum, int bits, Sums &out) {
  Simd::Vec total[kPackedRows];
#pragma GCC unroll kUnroll
  for (int r = 0; r < kPackedRows; ++r) total[r] = Simd::to_floats(words[r]);
  float sums[kPackedRows];  // exact: below 2^24
  Simd::sum4(total[0], total[1], total[2], total[3], sums);
  for (int r = 0; r < kPackedRows; ++r) out.start[r] = -code_midpoint(bits) * static_cast<int>(sums[r]);
  Simd::sum4(zero_sum[0], zero_sum[1], zero_sum[2], zero_sum[3], out.offset);
}

// Writes `a` and `b` rounded to words, and adds the words to `total`.
inline void write_words(Simd::Vec a, Simd::Vec b, int16_t *to, Simd::Ints &total) {
  const int16_t one[2] = {1, 1};
  const Simd::Words words = Simd::to_words(a, b);
  store(to, words);
  total = Simd::dot(words, Simd::pair(one), total);
}

template <int R>
using FoldedQueries = FoldedWords<R, kMaxDim>;

template <int R>
inline void fold_queries(PackedKeys keys, const Queries<R> &query, const float *offset, FoldedQueries<R> &out,
                         int ahead) {
  if (ahead && keys.zero) prefetch(keys.at(ahead).zero, 2 * keys.d);
  if (ahead) prefetch(keys.at(kScaleBlocks).scale, 2 * keys.d);  // quantize_queries will read them all
  Simd::Vec zero_sum[kPackedRows];
  Simd::Ints total[kPackedRows];
#pragma GCC unroll kUnroll
  for (int r = 0; r < kPackedRows; ++r) zero_sum[r] = Simd::set(0.f), total[r] = Simd::set_int(0);
  for (int c = 0; c < keys.d; c += 2 * Simd::kLanes) {
    Simd::Vec scale[2], zero[2];
#pragma GCC unroll kUnroll
    for (int i = 0; i < 2; ++i) {
      const int at = c + i * Simd::kLanes;
      scale[i] = at < keys.d ? Simd::widen(keys.scale + at) : Simd::set(0.f);
      zero[i] = at < keys.d ? centred_zero(keys.zero, scale[i], at, keys.bits) : Simd::set(0.f);
    }
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; ++r) {
      const Simd::Vec a = Simd::load(query.x[r] + c), b = Simd::load(query.x[r] + c + Simd::kLanes);
      write_words(Simd::mul(a, scale[0]), Simd::mul(b, scale[1]), out.words[r] + c, total[r]);
      zero_sum[r] = Simd::fma(a, zero[0], Simd::fma(b, zero[1], zero_sum[r]));
    }
  }
  start_sums(total, zero_sum, keys.bits, out);
  for (int r = 0; r < R; ++r) out.offset[r] = out.offset[r] * query.scale[r] + offset[r];
}

// Also raises `row_max` to the largest score of each row.
template <int R, int Bits>
void score_codes(PackedKeys keys, const FoldedQueries<R> &query, const float *scale, float *scores, int64_t stride,
                 Simd::Vec *row_max, int ahead) {
  for (int lane = 0; lane < 16; lane += Simd::kLanes) {
    UnitSums sum[R][2];  // row, half of the tokens
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = start_at(query.start[r]);
    for (int c = 0; c < keys.d; c += 16) {
      const uint8_t *codes = keys.codes + c * 4 * Bits + 4 * lane;
      if (ahead && lane == 0) prefetch(codes + ahead * int64_t{4} * Bits * keys.d, 64 * Bits);
#pragma GCC unroll kUnroll
      for (int quad = 0; quad < 4; ++quad) {
        const Unit half[2] = {load_unit<Bits>(codes, 2 * quad), load_unit<Bits>(codes, 2 * quad + 1)};
#pragma GCC unroll kUnroll
        for (int r = 0; r < R; ++r)
#pragma GCC unroll kUnroll
          for (int h = 0; h < 2; ++h) sum[r][h] = dot4(half[h], query.words[r] + c + 4 * quad, sum[r][h]);
      }
    }
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; ++r)
#pragma GCC unroll kUnroll
      for (int h = 0; h < 2; ++h) {
        Simd::Vec score = Simd::fma(Simd::to_floats(sum[r][h]), Simd::set(scale[r]), Simd::set(query.offset[r]));
        Simd::store(scores + r * stride + 16 * h + lane, score);
        row_max[r] = Simd::max(row_max[r], score);
      }
  }
}

template <int R, int>
using FoldedWeights = FoldedWords<R, kTile>;

template <int R, int Limbs, int Blocks>
inline void fold_weights(PackedValues values, int g, const float *weights, int64_t stride, FoldedWeights<R, Limbs> &out,
                         int ahead) {
  float x[R][Blocks * kBlock];
  Simd::Vec abs_max[kPackedRows], zero_sum[kPackedRows];
  Simd::Ints total[kPackedRows];
#pragma GCC unroll kUnroll
  for (int r = 0; r < kPackedRows; ++r) {
    abs_max[r] = Simd::set(kMinAbsMax), zero_sum[r] = Simd::set(0.f), total[r] = Simd::set_int(0);
  }
#pragma GCC unroll kUnroll
  for (int b = 0; b < Blocks; ++b) {
    const PackedValues block = values.at(b), later = values.at(b + ahead);
    const int group_begin = g * kBlock;
    if (ahead) prefetch(later.scale + group_begin, 2 * kBlock);
    if (ahead && later.zero) prefetch(later.zero + group_begin, 2 * kBlock);
    for (int t = 0; t < kBlock; t += Simd::kLanes) {
      const Simd::Vec scale = Simd::widen(block.scale + group_begin + t);
      const Simd::Vec zero = centred_zero(block.zero, scale, group_begin + t, block.bits);
#pragma GCC unroll kUnroll
      for (int r = 0; r < R; ++r) {
        const Simd::Vec w = Simd::load(weights + r * stride + b * kBlock + t), scaled = Simd::mul(w, scale);
        Simd::store(x[r] + b * kBlock + t, scaled);
        abs_max[r] = Simd::max(abs_max[r], scaled);
        zero_sum[r] = Simd::fma(w, zero, zero_sum[r]);
      }
    }
  }
  float inverse[kPackedRows];
  choose_scales(abs_max, kMaxWeight, out.scale, inverse);
#pragma GCC unroll kUnroll
  for (int r = 0; r < R; ++r) {
    const Simd::Vec factor = Simd::set(inverse[r]);
    for (int t = 0; t < Blocks * kBlock; t += 2 * Simd::kLanes)
      write_words(Simd::mul(Simd::load(x[r] + t), factor), Simd::mul(Simd::load(x[r] + t + Simd::kLanes), factor),
                  out.words[r] + t, total[r]);
  }
  start_sums(total, zero_sum, values.bits, out);
}

constexpr int wide_columns(int) { return 2; }

// Vectors of channels from c on.
template <int R, int Limbs, int Bits, int Blocks, int Vectors>
void add_columns(PackedValues values, const FoldedWeights<R, Limbs> &weights, int c, float *acc, int64_t acc_stride) {
  UnitSums sum[R][Vectors];
#pragma GCC unroll kUnroll
  for (int r = 0; r < R; ++r)
#pragma GCC unroll kUnroll
    for (int v = 0; v < Vectors; ++v) sum[r][v] = start_at(weights.start[r]);
#pragma GCC unroll kUnroll
  for (int b = 0; b < Blocks; ++b) {
    const uint8_t *codes = values.at(b).codes;
#pragma GCC unroll kUnroll
    for (int t = 0; t < kUnits; ++t) {
      Unit unit[Vectors];
#pragma GCC unroll kUnroll
      for (int v = 0; v < Vectors; ++v) {
        const int channel = c + v * Simd::kLanes;
        unit[v] = load_unit<Bits>(codes + channel / 16 * 64 * Bits + channel % 16 * 4, t);
      }
#pragma GCC unroll kUnroll
      for (int r = 0; r < R; ++r)
#pragma GCC unroll kUnroll
        for (int v = 0; v < Vectors; ++v) sum[r][v] = dot4(unit[v], weights.words[r] + b * kBlock + 4 * t, sum[r][v]);
    }
  }
#pragma GCC unroll kUnroll
  for (int r = 0; r < R; ++r)
#pragma GCC unroll kUnroll
    for (int v = 0; v < Vectors; ++v) {
      float *to = acc + r * acc_stride + c + v * Simd::kLanes;
      Simd::Vec before = Simd::add(Simd::load(to), Simd::set(weights.offset[r]));
      Simd::store(to, Simd::fma(Simd::to_floats(sum[r][v]), Simd::set(weights.scale[r]), before));
    }
}

}  // namespace
