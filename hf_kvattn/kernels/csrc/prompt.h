// Products of packed tiles, for jobs of many query rows: prompts, and chunks of them.
//
// A tile's keys are transposed once a job, so that tokens lie in lanes and no sum runs across lanes. Its values have
// channels in lanes. Both are stored in panels of kColumns columns, which a block of kBlockRows rows meets in
// registers: weights and queries are broadcast, one unit at a time.
//
// A unit has 32 bits: a float, or a pair of bf16 numbers where the CPU has dot products of them (`Pairs`). A pair holds
// two channels of a key, or two tokens of a value. All other types are widened when tiles are packed.
#pragma once

namespace {

constexpr int kBlockRows = Simd::kProductRows;
constexpr int kColumns = Simd::kProductVectors * Simd::kLanes;
constexpr int kUnrollProduct = Simd::kUnroll > 1 ? 16 : 1;  // a pragma takes no expression

template <bool Pairs, typename S = Simd>
inline typename S::Vec multiply_add(typename S::Vec a, typename S::Vec b, typename S::Vec c) {
  if constexpr (Pairs)
    return S::dot_pairs(a, b, c);
  else
    return S::fma(a, b, c);
}

// c[r][j] = sum over `depth` units k of a[r * kTile + k] * b[k * kColumns + j], for kBlockRows x kColumns numbers;
// added to c if Add.
template <bool Pairs, bool Add>
inline void product_block(const float *a, const float *b, int depth, float *c, int64_t c_stride) {
  constexpr int kVectors = Simd::kProductVectors;
  Simd::Vec sum[kBlockRows][kVectors];
#pragma GCC unroll kUnrollProduct
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll kUnrollProduct
    for (int j = 0; j < kVectors; ++j)
      sum[r][j] = Add ? Simd::load(c + r * c_stride + j * Simd::kLanes) : Simd::set(0.f);
  for (int k = 0; k < depth; ++k) {
    Simd::Vec right[kVectors];
#pragma GCC unroll kUnrollProduct
    for (int j = 0; j < kVectors; ++j) right[j] = Simd::load(b + k * kColumns + j * Simd::kLanes);
#pragma GCC unroll kUnrollProduct
    for (int r = 0; r < kBlockRows; ++r) {
      const Simd::Vec left = Simd::set(a[r * kTile + k]);
#pragma GCC unroll kUnrollProduct
      for (int j = 0; j < kVectors; ++j) sum[r][j] = multiply_add<Pairs>(left, right[j], sum[r][j]);
    }
  }
#pragma GCC unroll kUnrollProduct
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll kUnrollProduct
    for (int j = 0; j < kVectors; ++j) Simd::store(c + r * c_stride + j * Simd::kLanes, sum[r][j]);
}

// The same for all blocks of `rows` rows and all panels of `columns` columns; a panel of b has `panel` floats.
template <bool Pairs, bool Add>
void product(const float *a, const float *b, int64_t panel, int depth, int rows, int columns, float *c,
             int64_t c_stride) {
  for (int j = 0; j < columns; j += kColumns, b += panel)
    for (int r = 0; r < rows; r += kBlockRows)
      product_block<Pairs, Add>(a + r * kTile, b, depth, c + r * c_stride + j, c_stride);
}

// Each zip moves one bit of an element's row into its lane: after log2(kLanes) of them, rows are lanes.
inline void transpose(Simd::Vec *x) {
  constexpr int kHalf = Simd::kLanes / 2;
#pragma GCC unroll kUnrollProduct
  for (int stage = 1; stage < Simd::kLanes; stage *= 2) {
    Simd::Vec y[Simd::kLanes];
#pragma GCC unroll kUnrollProduct
    for (int i = 0; i < kHalf; ++i) Simd::zip(x[i], x[i + kHalf], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll kUnrollProduct
    for (int i = 0; i < Simd::kLanes; ++i) x[i] = y[i];
  }
}

// A tile of one KV head, as `product` takes it: `keys` (channels, tokens), `values` (tokens, channels). Channels of
// keys and tokens of values are counted in units. Tokens are written from column `at` on, a multiple of kBlock.
template <typename T, bool Pairs, typename S = Simd>
struct PackedTile {
  using Vec = typename S::Vec;
  static constexpr int kInUnit = Pairs ? 2 : 1;  // numbers of a unit

  float *key(int unit, int t) const { return keys + t / kColumns * key_panel() + unit * kColumns + t % kColumns; }
  float *value(int t, int c) const {
    return values + c / kColumns * value_panel() + t / kInUnit * kColumns + c % kColumns;
  }
  int64_t key_panel() const { return d_pad * kColumns; }
  static int64_t value_panel() { return kTile * kColumns; }
  int units() const { return (d + kInUnit - 1) / kInUnit; }

  static Vec row(const T *p, int left) {  // floats
    return left >= S::kLanes ? S::widen(p) : left > 0 ? S::widen_tail(p, left) : S::set(0.f);
  }
  static Vec row_units(const T *p, int left) {
    if constexpr (Pairs)
      return S::as_floats(left >= 2 * S::kLanes ? S::load_pairs(p) : S::load_pairs_tail(p, left));
    else
      return row(p, left);
  }

  void write_keys(const T *k, int64_t stride, int n, int at) const {
    for (int t = 0; t < n; t += S::kLanes)
      for (int u = 0; u < units(); u += S::kLanes) {
        const int c = u * kInUnit;
        Vec x[S::kLanes];
#pragma GCC unroll kUnrollProduct
        for (int i = 0; i < S::kLanes; ++i) x[i] = t + i < n ? row_units(k + (t + i) * stride + c, d - c) : S::set(0.f);
        transpose(x);
#pragma GCC unroll kUnrollProduct
        for (int i = 0; i < S::kLanes; ++i) S::store(key(u + i, at + t), x[i]);
      }
  }

  // x: the numbers of kInUnit tokens from t on.
  static void store_unit(float *to, const Vec *x) {
    if constexpr (Pairs)
      S::store(to, S::pairs(x[0], x[1]));
    else
      S::store(to, x[0]);
  }

  void write_values(const T *v, int64_t stride, int n, int at) const {
    for (int t = 0; t < n; t += kInUnit)
      for (int c = 0; c < round_up(d, kColumns); c += S::kLanes) {
        Vec x[kInUnit];
        for (int i = 0; i < kInUnit; ++i) x[i] = t + i < n ? row(v + (t + i) * stride + c, d - c) : S::set(0.f);
        store_unit(value(at + t, c), x);
      }
  }

  // The four codes of each lane as floats, times their scales, plus their offsets.
  static void decode(const Codes &codes, const float *scale, const float *offset, Vec *x) {
    const int16_t first[2] = {1, 0}, second[2] = {0, 1};
    const typename S::Words word[2] = {S::pair(first), S::pair(second)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec code = S::to_floats(S::dot(j % 2 ? codes.odd : codes.even, word[j / 2], S::set_int(0)));
      x[j] = S::fma(code, S::set(scale[j]), S::set(offset[j]));
    }
  }

  // Pairs of neighbouring channels are stored together, and codes may be in any order: such keys are decoded first.
  void write_keys(const PackedKeys &block, const float *mean, int at) const {
    float scale[kMaxDim], offset[kMaxDim], decoded[Pairs ? kMaxDim * kBlock : 1];
    const KeyTable &table = *block.table;
    for (int c = 0; c < d; ++c) {
      const int width = table.width(c);
      scale[c] = block.by_channel() ? block.multiplier(c) * to_float(table.step[c]) : to_float(*block.scales(c));
      offset[c] = mean[table.channel(c)] - scale[c] * (0.5f * static_cast<float>(twice_centre(width)));
      if (block.by_channel()) offset[c] += (block.offset(c) - kOffsetZero) * to_float(table.unit[c]);
    }
    auto to = [&](int c, int t) {
      const int channel = table.channel(c);
      return Pairs ? decoded + channel * kBlock + t : key(channel, at + t);
    };
    int c = 0;
    const uint8_t *codes = block.codes;
    auto decode_groups = [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      for (; c < table.end[kBits]; c += 16, codes += kUnit * kBits)
        for (int lane = 0; lane < 16; lane += S::kLanes)
#pragma GCC unroll 8
          for (int i = 0; i < kUnits; ++i) {
            const int first = c + i / 2 * 4;
            Vec x[4];
            decode(load_codes<kBits>(codes + 4 * lane, i), scale + first, offset + first, x);
            for (int j = 0; j < 4; ++j) S::store(to(first + j, i % 2 * 16 + lane), x[j]);
          }
    };
    for_widths(decode_groups);
    for (; c < d; ++c)
      for (int t = 0; t < kBlock; t += S::kLanes) S::store(to(c, t), S::set(offset[c]));
    if constexpr (Pairs)
      for (int u = 0; u < units(); ++u)
        for (int t = 0; t < kBlock; t += S::kLanes) {
          const float *from = decoded + kInUnit * u * kBlock + t;
          const Vec x[2] = {S::load(from), S::load(from + kBlock)};
          store_unit(key(u, at + t), x);
        }
  }

  void write_values(const PackedValues &block, int at) const {
    float scale[kBlock], offset[kBlock];
    const float centre = 0.5f * static_cast<float>(twice_centre(block.bits));
    with_bits(block.bits, [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      for (int c = 0; c < d; c += S::kLanes) {
        if (c % block.group == 0)
          for (int t = 0; t < kBlock; t += S::kLanes) {
            const Vec x = block.load_scales(c / block.group, t);
            S::store(scale + t, x), S::store(offset + t, S::mul(x, S::set(-centre)));
          }
        const uint8_t *codes = block.codes + c / 16 * 64 * kBits + c % 16 * 4;
#pragma GCC unroll 8
        for (int i = 0; i < kUnits; ++i) {
          Vec x[4];
          decode(load_codes<kBits>(codes, i), scale + 4 * i, offset + 4 * i, x);
          for (int j = 0; j < 4; j += kInUnit) store_unit(value(at + 4 * i + j, c), x + j);
        }
      }
    });
    for (int c = d; c < round_up(d, kColumns); c += S::kLanes)
      for (int t = at; t < at + kBlock; t += kInUnit) S::store(value(t, c), S::set(0.f));
  }

  // The queries of row r of `rows`, in panels of kTile units.
  void write_query(const T *q, int r, int rows, float *to) const {
    for (int u = 0; u < units(); u += S::kLanes)
      S::store(to + (u / kTile * rows + r) * kTile + u % kTile, row_units(q + u * kInUnit, d - u * kInUnit));
  }

  // scores[r * kTile + t] = q[r] . k[t] for blocks of rows; `all_rows` lie in a panel of q.
  void score(const float *q, int all_rows, int rows, int n, float *scores) const {
    const int columns = static_cast<int>(round_up(n, kColumns));
    for (int u = 0; u < units(); u += kTile, q += all_rows * kTile) {
      const int depth = min(kTile, units() - u);
      if (u == 0)
        product<Pairs, false>(q, keys, key_panel(), depth, rows, columns, scores, kTile);
      else
        product<Pairs, true>(q, keys + u * kColumns, key_panel(), depth, rows, columns, scores, kTile);
    }
  }

  // acc[r] += weights[r][t] * v[t] for the tokens [from, to), blocks of rows; `from` is a multiple of kBlock.
  void add_values(const float *weights, int from, int to, int rows, float *acc) const {
    const int depth = (to - from + kInUnit - 1) / kInUnit;
    product<Pairs, true>(weights + from / kInUnit, value(from, 0), value_panel(), depth, rows,
                         static_cast<int>(round_up(d, kColumns)), acc, d_pad);
  }

  // Turns a row of weights into the units that `add_values` takes, in place.
  static void to_units(float *weights, int n) {
    if constexpr (Pairs)
      for (int t = 0; t < n; t += S::kLanes)
        S::store_bf16(reinterpret_cast<bf16_t *>(weights) + t, S::load(weights + t));
  }

  float *keys, *values;
  int d;
  int64_t d_pad;
};

}  // namespace
