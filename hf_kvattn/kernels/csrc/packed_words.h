// Dot products of packed codes as 16-bit words, summed in pairs into 32 bits (`vpmaddwd` on x86). A lane has four
// codes. They need no shuffle: codes 0 and 2 are the low bits of the lane's two words, codes 1 and 3 lie eight bits
// higher.
//
// Codes are centred: each sum starts at minus the centre of the codes times the sum of the quantized weights (or of the
// query). A weight's rounding error is therefore multiplied by a code's distance from the centre. Offsets of keys are
// multiplied by the exact query.
//
// Where an Arm CPU has dot products of signed bytes (`sdot`), a word is stored as two of them, a low limb and a high
// one, and a lane's four codes are multiplied at once.
//
// Loops are unrolled by pragmas where vectors are registers: otherwise GCC keeps arrays of vectors in memory.
#pragma once

namespace {

constexpr int kFineLimbs = 1;           // a quantized weight is one word, of 15 bits
constexpr int kUnroll = Simd::kUnroll;  // a pragma takes no qualified name

#ifdef __ARM_FEATURE_DOTPROD
using Unit = Simd::Bytes;
using UnitSums = Simd::ByteSums;
constexpr float kMaxWeight = kQueryMax;  // the high limb is at most 127

// Bytes of 8 bits are centred as they are multiplied.
constexpr bool centred(int bits) { return bits == 8; }

template <int Bits>
__attribute__((always_inline)) inline Unit load_unit(const uint8_t *p, int i) {
  const Unit bytes = Simd::to_bytes(load_bytes<Bits>(p, i));
  return centred(Bits) ? Simd::minus_128(bytes) : bytes;
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

constexpr bool centred(int) { return false; }

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
// `Queries`, and weights have no offset.
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

// Sets `start` from the rows' sums of words times twice the centres of their codes.
inline void start_sums(const Simd::Ints *words, int bits, Sums &out) {
  Simd::Vec total[kPackedRows];
#pragma GCC unroll kUnroll
  for (int r = 0; r < kPackedRows; ++r) total[r] = Simd::to_floats(words[r]);
  float sums[kPackedRows];
  Simd::sum4(total[0], total[1], total[2], total[3], sums);
  for (int r = 0; r < kPackedRows; ++r) out.start[r] = centred(bits) ? 0 : -static_cast<int>(sums[r] * 0.5f);
}

// Writes `a` and `b` rounded to words, and adds their products with `centre` to `total`.
inline void write_words(Simd::Vec a, Simd::Vec b, Simd::Words centre, int16_t *to, Simd::Ints &total) {
  const Simd::Words words = Simd::to_words(a, b);
  store(to, words);
  total = Simd::dot(words, centre, total);
}

template <int R>
using FoldedQueries = FoldedWords<R, kMaxDim>;

template <int R, bool ByChannel>
inline void fold_words(PackedKeys keys, const Queries<R> &query, FoldedQueries<R> &out, int ahead) {
  if (ahead && ByChannel) prefetch(keys.at(ahead).scale, 3 * keys.d / 4);
  if (ahead && !ByChannel) prefetch(keys.at(kScaleBlocks).scale, 2 * keys.d);  // quantize_queries will read them all
  Simd::Vec offsets[kPackedRows];
  Simd::Ints total[kPackedRows];
#pragma GCC unroll kUnroll
  for (int r = 0; r < kPackedRows; ++r) offsets[r] = Simd::set(0.f), total[r] = Simd::set_int(0);
  for (int c = 0; c < keys.d; c += 2 * Simd::kLanes) {
    Simd::Vec scale[2], offset[2];
#pragma GCC unroll kUnroll
    for (int i = 0; i < 2; ++i) {
      const int at = c + i * Simd::kLanes;
      scale[i] = offset[i] = Simd::set(0.f);
      if (at >= keys.d) continue;
      scale[i] = ByChannel ? Simd::multipliers(keys.scale + keys.d / 2 + at / 4) : Simd::widen(keys.scales(at));
      if (ByChannel) offset[i] = Simd::offsets(keys.scale + at / 2);
    }
    const Simd::Words centre = Simd::codes(query.centre + c, 0, 0xffff);
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; ++r) {
      const Simd::Vec a = Simd::load(query.x[r] + c), b = Simd::load(query.x[r] + c + Simd::kLanes);
      write_words(Simd::mul(a, scale[0]), Simd::mul(b, scale[1]), centre, out.words[r] + c, total[r]);
      if (ByChannel)
#pragma GCC unroll kUnroll
        for (int i = 0; i < 2; ++i)
          offsets[r] = Simd::fma(Simd::load(query.unit[r] + c + i * Simd::kLanes), offset[i], offsets[r]);
    }
  }
  start_sums(total, keys.bits, out);
  if (ByChannel) Simd::sum4(offsets[0], offsets[1], offsets[2], offsets[3], out.offset);
  for (int r = 0; r < R; ++r) out.offset[r] = ByChannel ? out.offset[r] + query.offset[r] : query.offset[r];
}

template <int R>
inline void fold_queries(const PackedKeys &keys, const Queries<R> &query, FoldedQueries<R> &out, int ahead) {
  keys.by_channel() ? fold_words<R, true>(keys, query, out, ahead) : fold_words<R, false>(keys, query, out, ahead);
}

// Adds the products of the channels [c, end), whose codes have as many bits; c and the codes move on.
template <int R, int Bits>
__attribute__((always_inline)) inline void add_products(const uint8_t *&codes, int &c, int end,
                                                        const FoldedQueries<R> &query, UnitSums (&sum)[R][2],
                                                        int64_t ahead_bytes) {
  for (; c < end; c += 16, codes += kUnit * Bits) {
    if (ahead_bytes) prefetch(codes + ahead_bytes, kUnit * Bits);
#pragma GCC unroll kUnroll
    for (int quad = 0; quad < 4; ++quad) {
      const Unit half[2] = {load_unit<Bits>(codes, 2 * quad), load_unit<Bits>(codes, 2 * quad + 1)};
#pragma GCC unroll kUnroll
      for (int r = 0; r < R; ++r)
#pragma GCC unroll kUnroll
        for (int h = 0; h < 2; ++h) sum[r][h] = dot4(half[h], query.words[r] + c + 4 * quad, sum[r][h]);
    }
  }
}

// Also raises `row_max` to the largest score of each row.
template <int R>
void score_block(PackedKeys keys, const FoldedQueries<R> &query, const float *scale, float *scores, int64_t stride,
                 Simd::Vec *row_max, int ahead) {
  const int *end = keys.table->end;
  for (int lane = 0; lane < 16; lane += Simd::kLanes) {
    UnitSums sum[R][2];  // row, half of the tokens
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = start_at(query.start[r]);
    const uint8_t *codes = keys.codes + 4 * lane;
    const int64_t ahead_bytes = lane == 0 ? ahead * int64_t{4} * keys.bits * keys.d : 0;
    int c = 0;
    for_widths([&](auto bits) __attribute__((always_inline)) {
      add_products<R, decltype(bits)::value>(codes, c, end[decltype(bits)::value], query, sum, ahead_bytes);
    });
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
  Simd::Vec abs_max[kPackedRows];
  Simd::Ints total[kPackedRows];
#pragma GCC unroll kUnroll
  for (int r = 0; r < kPackedRows; ++r) abs_max[r] = Simd::set(kMinAbsMax), total[r] = Simd::set_int(0);
#pragma GCC unroll kUnroll
  for (int b = 0; b < Blocks; ++b) {
    const PackedValues block = values.at(b);
    if (ahead) prefetch(values.at(b + ahead).scales(g), block.scale_bytes() * kBlock);
    for (int t = 0; t < kBlock; t += Simd::kLanes) {
      const Simd::Vec scale = block.load_scales(g, t);
#pragma GCC unroll kUnroll
      for (int r = 0; r < R; ++r) {
        const Simd::Vec w = Simd::load(weights + r * stride + b * kBlock + t), scaled = Simd::mul(w, scale);
        Simd::store(x[r] + b * kBlock + t, scaled);
        abs_max[r] = Simd::max(abs_max[r], scaled);
      }
    }
  }
  float inverse[kPackedRows];
  choose_scales(abs_max, kMaxWeight, out.scale, inverse);
  const int16_t twice[2] = {static_cast<int16_t>(twice_centre(values.bits)), twice[0]};
  const Simd::Words centre = Simd::pair(twice);
#pragma GCC unroll kUnroll
  for (int r = 0; r < R; ++r) {
    const Simd::Vec factor = Simd::set(inverse[r]);
    for (int t = 0; t < Blocks * kBlock; t += 2 * Simd::kLanes)
      write_words(Simd::mul(Simd::load(x[r] + t), factor), Simd::mul(Simd::load(x[r] + t + Simd::kLanes), factor),
                  centre, out.words[r] + t, total[r]);
  }
  start_sums(total, values.bits, out);
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
      Simd::store(to, Simd::fma(Simd::to_floats(sum[r][v]), Simd::set(weights.scale[r]), Simd::load(to)));
    }
}

}  // namespace
