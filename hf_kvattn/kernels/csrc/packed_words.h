// Products of packed codes as 16-bit numbers, summed in pairs into 32 bits (`vpmaddwd` on x86). The codes of a lane
// need no shuffle for them: the first and third are the low bits of its two halves, the others lie eight bits higher.
//
// All codes count from their middle, by where sums start, so that the rounding of a step is multiplied by little; the
// zeros contribute with exact numbers, and nothing where there are none (8 bits), since they are the middle then.
//
// Loops are unrolled by pragmas where vectors are registers: GCC else keeps arrays of them in memory.
#pragma once

namespace {

constexpr int kFineDigits = 1;          // weights have 15 bits here
constexpr int kUnroll = Simd::kUnroll;  // a name that pragmas take

constexpr int middle_of(int bits) { return 1 << (bits - 1); }

inline Simd::Vec centred_zero(const bf16_t *zero, Simd::Vec scale, int i, int bits) {
  if (!zero) return Simd::set(0.f);
  return Simd::fma(scale, Simd::set(static_cast<float>(middle_of(bits))), Simd::widen(zero + i));
}

// What rows' sums of products are: `step * (start + products) + offset`; queries keep their steps themselves.
struct Sums {
  float step[kFour], offset[kFour];
  int start[kFour];
};

// R rows of N whole numbers, of each four the second and third swapped, so that pairs meet pairs of codes.
template <int R, int N>
struct FoldedWords : Sums {
  int16_t words[R][N];
};

// From the rows' sums of whole numbers, and of what the zeros contribute.
inline void start_sums(const Simd::Whole *words, const Simd::Vec *zero_part, int bits, Sums &out) {
  Simd::Vec total[kFour];
#pragma GCC unroll kUnroll
  for (int r = 0; r < kFour; ++r) total[r] = Simd::to_floats(words[r]);
  float sums[kFour];  // exact: below 2^24
  Simd::sum4(total[0], total[1], total[2], total[3], sums);
  for (int r = 0; r < kFour; ++r) out.start[r] = -middle_of(bits) * static_cast<int>(sums[r]);
  Simd::sum4(zero_part[0], zero_part[1], zero_part[2], zero_part[3], out.offset);
}

// Writes the whole numbers nearest to `a` and `b`, and adds them to `total`.
inline void write_words(Simd::Vec a, Simd::Vec b, int16_t *to, Simd::Whole &total) {
  const int16_t one[2] = {1, 1};
  const Simd::Words words = Simd::to_words(a, b);
  Simd::store_words(to, words);
  total = Simd::dot(words, Simd::pair(one), total);
}

struct Codes {
  Simd::Words even, odd;  // codes 0 and 2 of each lane, 1 and 3
};

// Of unit i of 16 channels of a block: the lanes whose codes of unit 0 start at p.
template <int Bits>
__attribute__((always_inline)) inline Codes load_codes(const uint8_t *p, int i) {
  constexpr int kLow = Bits == 3 ? 2 : Bits, kShared = 8 / kLow;
  const uint8_t *low = p + i / kShared * kUnit, *thirds = Bits == 3 ? p + 2 * kUnit : nullptr;
  const int shift = i % kShared * kLow;
  return {Simd::codes(low, shift, kLow, thirds, i), Simd::codes(low, 8 + shift, kLow, thirds, 8 + i)};
}

// The codes of a unit times the four numbers at `words`, of a token or channel each.
__attribute__((always_inline)) inline Simd::Whole dot4(Codes codes, const int16_t *words, Simd::Whole sum) {
  return Simd::dot(codes.odd, Simd::pair(words + 2), Simd::dot(codes.even, Simd::pair(words), sum));
}

template <int R>
using FoldedQueries = FoldedWords<R, kMaxDim>;

template <int R>
inline void fold_queries(PackedKeys keys, const Queries<R> &query, const float *offset, FoldedQueries<R> &out,
                         int ahead) {
  if (ahead && keys.zero) prefetch(keys.at(ahead).zero, 2 * keys.d);
  if (ahead) prefetch(keys.at(kStretch).scale, 2 * keys.d);  // the next stretch begins with all of its scales
  Simd::Vec zero_part[kFour];
  Simd::Whole total[kFour];
#pragma GCC unroll kUnroll
  for (int r = 0; r < kFour; ++r) zero_part[r] = Simd::set(0.f), total[r] = Simd::whole(0);
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
      zero_part[r] = Simd::fma(a, zero[0], Simd::fma(b, zero[1], zero_part[r]));
    }
  }
  start_sums(total, zero_part, keys.bits, out);
  for (int r = 0; r < R; ++r) out.offset[r] = out.offset[r] * query.step[r] + offset[r];
}

// Keeps the largest score of each row in `top` too.
template <int R, int Bits>
void score_codes(PackedKeys keys, const FoldedQueries<R> &query, const float *step, float *scores, int64_t stride,
                 Simd::Vec *top, int ahead) {
  for (int lane = 0; lane < 16; lane += Simd::kLanes) {
    Simd::Whole sum[R][2];  // row, half of the tokens
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Simd::whole(query.start[r]);
    for (int c = 0; c < keys.d; c += 16) {
      const uint8_t *codes = keys.codes + c * 4 * Bits + 4 * lane;
      if (ahead && lane == 0) prefetch(codes + ahead * int64_t{4} * Bits * keys.d, 64 * Bits);
#pragma GCC unroll kUnroll
      for (int quad = 0; quad < 4; ++quad) {
        const Codes half[2] = {load_codes<Bits>(codes, 2 * quad), load_codes<Bits>(codes, 2 * quad + 1)};
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
        Simd::Vec score = Simd::fma(Simd::to_floats(sum[r][h]), Simd::set(step[r]), Simd::set(query.offset[r]));
        Simd::store(scores + r * stride + 16 * h + lane, score);
        top[r] = Simd::max(top[r], score);
      }
  }
}

template <int R, int>
using FoldedWeights = FoldedWords<R, kTile>;

template <int R, int Digits, int Blocks>
inline void fold_weights(PackedValues values, int g, const float *weights, int64_t stride,
                         FoldedWeights<R, Digits> &out, int ahead) {
  float x[R][Blocks * kBlock];
  Simd::Vec top[kFour], zero_part[kFour];
  Simd::Whole total[kFour];
#pragma GCC unroll kUnroll
  for (int r = 0; r < kFour; ++r) {
    top[r] = Simd::set(kLeast), zero_part[r] = Simd::set(0.f), total[r] = Simd::whole(0);
  }
#pragma GCC unroll kUnroll
  for (int b = 0; b < Blocks; ++b) {
    const PackedValues block = values.at(b), later = values.at(b + ahead);
    const int first = g * kBlock;
    if (ahead) prefetch(later.scale + first, 2 * kBlock);
    if (ahead && later.zero) prefetch(later.zero + first, 2 * kBlock);
    for (int t = 0; t < kBlock; t += Simd::kLanes) {
      const Simd::Vec scale = Simd::widen(block.scale + first + t);
      const Simd::Vec zero = centred_zero(block.zero, scale, first + t, block.bits);
#pragma GCC unroll kUnroll
      for (int r = 0; r < R; ++r) {
        const Simd::Vec w = Simd::load(weights + r * stride + b * kBlock + t), scaled = Simd::mul(w, scale);
        Simd::store(x[r] + b * kBlock + t, scaled);
        top[r] = Simd::max(top[r], scaled);
        zero_part[r] = Simd::fma(w, zero, zero_part[r]);
      }
    }
  }
  float inverse[kFour];
  choose_steps(top, 32767.f, out.step, inverse);
#pragma GCC unroll kUnroll
  for (int r = 0; r < R; ++r) {
    const Simd::Vec factor = Simd::set(inverse[r]);
    for (int t = 0; t < Blocks * kBlock; t += 2 * Simd::kLanes)
      write_words(Simd::mul(Simd::load(x[r] + t), factor), Simd::mul(Simd::load(x[r] + t + Simd::kLanes), factor),
                  out.words[r] + t, total[r]);
  }
  start_sums(total, zero_part, values.bits, out);
}

constexpr int wide_columns(int) { return 2; }

// Vectors of channels from c on.
template <int R, int Digits, int Bits, int Blocks, int Vectors>
void add_columns(PackedValues values, const FoldedWeights<R, Digits> &weights, int c, float *acc, int64_t acc_stride) {
  Simd::Whole sum[R][Vectors];
#pragma GCC unroll kUnroll
  for (int r = 0; r < R; ++r)
#pragma GCC unroll kUnroll
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Simd::whole(weights.start[r]);
#pragma GCC unroll kUnroll
  for (int b = 0; b < Blocks; ++b) {
    const uint8_t *codes = values.at(b).codes;
#pragma GCC unroll kUnroll
    for (int t = 0; t < kUnits; ++t) {
      Codes unit[Vectors];
#pragma GCC unroll kUnroll
      for (int v = 0; v < Vectors; ++v) {
        const int channel = c + v * Simd::kLanes;
        unit[v] = load_codes<Bits>(codes + channel / 16 * 64 * Bits + channel % 16 * 4, t);
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
      Simd::store(to, Simd::fma(Simd::to_floats(sum[r][v]), Simd::set(weights.step[r]), before));
    }
}

}  // namespace
