// Flash-decoding over a dense KV cache, written once over the small vector type `Simd` of the including file.
//
// One job is a (batch row or request, KV head, chunk of query rows). All query heads of a group are rows of the same
// job, so each key and value is read once for the whole group. Few rows are computed from the cache as it lies in
// memory, many rows from packed tiles (prompt.h). Jobs are cut into tiles of kTile tokens; the tiles of
// all jobs form one line that the threads share out evenly, so a job may be split between threads. Each part keeps an
// online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022), and split jobs are merged at the end
// (flash-decoding, 2023).
//
// Everything here has internal linkage and no standard template is used: each variant is compiled with its own CPU
// flags, and a shared (weak) function compiled for AVX-512 could replace its portable twin at link time.
#pragma once
#include <math.h>
#include <stdint.h>

#include <new>

#include "kvattn.h"
#include "parallel.h"
#include "scalar.h"

namespace {

constexpr int kTile = 64;       // most tokens of a tile; a multiple of every lane count and of 4
constexpr int kPackFrom = 24;   // from so many query rows on a job's tiles are packed first (prompt.h)
constexpr int kManyRows = 240;  // most query rows of one job
constexpr int kFewRows = 8;     // up to so many rows a tile is widened in registers, once for each row block
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInf = INFINITY;
constexpr float kRescaleThreshold = 8.f;  // weights may reach 2^8 before sums are rescaled

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
template <typename N>
N min(N a, N b) {
  return b < a ? b : a;
}
template <typename N>
N max(N a, N b) {
  return a < b ? b : a;
}
inline void fill(float *from, float *to, float x) {
  for (; from < to; ++from) *from = x;
}

template <int N>
struct Rows {
  static constexpr int value = N;
};
template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// Uninitialised memory for n numbers; throws std::bad_alloc.
template <typename N>
struct Buffer {
  explicit Buffer(int64_t n) : data(static_cast<N *>(::operator new(n * sizeof(N) + 1, kAlign))) {}
  ~Buffer() { ::operator delete(data, kAlign); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  static constexpr std::align_val_t kAlign{64};  // a cache line
  N *data;
};

// 2^x for x < 127; 0 below 2^-126, so that masked scores (-inf) have a weight of exactly 0. Relative error below 2e-7.
inline Simd::Vec exp2_vec(Simd::Vec x) {
  Simd::Vec f = Simd::fraction(x), p = Simd::set(1.8775767e-3f);  // minimax polynomial of 2^f on [0, 1]
  const float coefficients[] = {8.9893406e-3f, 5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f};
  for (float c : coefficients) p = Simd::fma(p, f, Simd::set(c));
  return Simd::scale_pow2(p, x);
}

// Makes a row's sums relative to a greater reference.
inline void rescale(float greater, float *reference, float *sum_lanes, float *acc, int d) {
  Simd::Vec shrink = Simd::set(*reference == -kInf ? 0.f : exp2f(*reference - greater));
  Simd::store(sum_lanes, Simd::mul(Simd::load(sum_lanes), shrink));
  for (int c = 0; c < d; c += Simd::kLanes) Simd::store(acc + c, Simd::mul(Simd::load(acc + c), shrink));
  *reference = greater;
}

// Turns n scores, a multiple of the lane count, into weights 2^(factor * x - reference) and adds them to the sums.
inline void exp_sum(float *x, int n, float factor, float reference, float *sum_lanes) {
  const Simd::Vec scale = Simd::set(factor), shift = Simd::set(-reference);
  Simd::Vec total = Simd::load(sum_lanes);
#pragma GCC unroll 4
  for (int i = 0; i < n; i += Simd::kLanes) {
    Simd::Vec weight = exp2_vec(Simd::fma(Simd::load(x + i), scale, shift));
    Simd::store(x + i, weight);
    total = Simd::add(total, weight);
  }
  Simd::store(sum_lanes, total);
}

}  // namespace

// Use the helpers above.
#include "packed.h"
#include "prompt.h"

namespace {

// tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|)
Simd::Vec tanh_vec(Simd::Vec x) {
  Simd::Vec e = exp2_vec(Simd::mul(Simd::abs(x), Simd::set(-2.f * kLog2e)));
  Simd::Vec t = Simd::div(Simd::fma(e, Simd::set(-1.f), Simd::set(1.f)), Simd::add(e, Simd::set(1.f)));
  float in[Simd::kLanes], out[Simd::kLanes];
  Simd::store(in, x), Simd::store(out, t);
  for (int i = 0; i < Simd::kLanes; ++i) out[i] = copysignf(out[i], in[i]);
  return Simd::load(out);
}

// Multiplies each block of `size` of the d numbers x by the orthonormal, symmetric Hadamard matrix of that size, a
// power of two. All stages have the same pattern (Pease, 1968), which compilers vectorize.
inline void hadamard(float *x, int d, int size) {
  const float norm = static_cast<float>(1 / sqrt(static_cast<double>(size)));
  for (float *block = x; block < x + d; block += size) {
    float y[kMaxDim];
    for (int stage = 1; stage < size; stage *= 2) {
      for (int i = 0; i < size / 2; ++i) y[i] = block[2 * i] + block[2 * i + 1];
      for (int i = 0; i < size / 2; ++i) y[size / 2 + i] = block[2 * i] - block[2 * i + 1];
      memcpy(block, y, size * sizeof(float));
    }
    for (int i = 0; i < size; ++i) block[i] *= norm;
  }
}

template <typename T>
void widen_row(const T *from, int d, float *to) {
  int c = 0;
  for (; c + Simd::kLanes <= d; c += Simd::kLanes) Simd::store(to + c, Simd::widen(from + c));
  if (c < d) Simd::store(to + c, Simd::widen_tail(from + c, d - c));
}

// scores[r * kTile + t] = q[r] . k[t]. Up to three scores past n are written too; the caller masks them.
template <int R, typename T>
void score_block(const float *q, int64_t q_stride, const T *k, int64_t k_stride, int n, int d, float *scores) {
  for (int t = 0; t < n; t += 4) {
    const T *row[4];
    for (int j = 0; j < 4; ++j) row[j] = k + k_stride * min(t + j, n - 1);
    Simd::Vec sum[R][4];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 4; ++j) sum[r][j] = Simd::set(0.f);
    auto accumulate = [&](int c, auto load) {
      Simd::Vec key[4];
      for (int j = 0; j < 4; ++j) key[j] = load(row[j] + c);
      for (int r = 0; r < R; ++r) {
        Simd::Vec query = Simd::load(q + r * q_stride + c);
        for (int j = 0; j < 4; ++j) sum[r][j] = Simd::fma(query, key[j], sum[r][j]);
      }
    };
    int c = 0;
    for (; c + Simd::kLanes <= d; c += Simd::kLanes) accumulate(c, [](const T *p) { return Simd::widen(p); });
    if (c < d) accumulate(c, [&](const T *p) { return Simd::widen_tail(p, d - c); });
    for (int r = 0; r < R; ++r) Simd::sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kTile + t);
  }
}

// The same with bf16 products and fp32 sums. q is bf16, padded with zeros to whole vectors.
template <int R, typename S = Simd>
void score_block_bf16(const bf16_t *q, int64_t q_stride, const bf16_t *k, int64_t k_stride, int n, int d,
                      float *scores) {
  constexpr int kPairLanes = 2 * S::kLanes;
  for (int t = 0; t < n; t += 4) {
    const bf16_t *row[4];
    for (int j = 0; j < 4; ++j) row[j] = k + k_stride * min(t + j, n - 1);
    Simd::Vec sum[R][4];
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 4; ++j) sum[r][j] = Simd::set(0.f);
    auto accumulate = [&](int c, auto load) {
      typename S::Pairs key[4];
      for (int j = 0; j < 4; ++j) key[j] = load(row[j] + c);
      for (int r = 0; r < R; ++r) {
        typename S::Pairs query = S::load_pairs(q + r * q_stride + c);
        for (int j = 0; j < 4; ++j) sum[r][j] = S::dot(query, key[j], sum[r][j]);
      }
    };
    int c = 0;
    for (; c + kPairLanes <= d; c += kPairLanes) accumulate(c, [](const bf16_t *p) { return S::load_pairs(p); });
    if (c < d) accumulate(c, [&](const bf16_t *p) { return S::load_pairs_tail(p, d - c); });
    for (int r = 0; r < R; ++r) Simd::sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kTile + t);
  }
}

// acc[r] += sum over t of weights[r][t] * v[t], for Vectors * kLanes columns from v on, or for `tail` < kLanes.
template <int R, int Vectors, bool Tail, typename T>
void value_columns(const float *weights, const T *v, int64_t v_stride, int n, int tail, float *acc,
                   int64_t acc_stride) {
  Simd::Vec sum[R][Vectors];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < Vectors; ++j) sum[r][j] = Simd::load(acc + r * acc_stride + j * Simd::kLanes);
  for (int t = 0; t < n; ++t) {
    const T *row = v + t * v_stride;
    Simd::Vec value[Vectors];
    for (int j = 0; j < Vectors; ++j)
      value[j] = Tail ? Simd::widen_tail(row, tail) : Simd::widen(row + j * Simd::kLanes);
    for (int r = 0; r < R; ++r) {
      Simd::Vec weight = Simd::set(weights[r * kTile + t]);
      for (int j = 0; j < Vectors; ++j) sum[r][j] = Simd::fma(weight, value[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < Vectors; ++j) Simd::store(acc + r * acc_stride + j * Simd::kLanes, sum[r][j]);
}

template <int R, typename T>
void value_block(const float *weights, const T *v, int64_t v_stride, int n, int d, float *acc, int64_t acc_stride) {
  constexpr int kWide = Simd::kVectors * Simd::kLanes;
  int c = 0;
  for (; c + kWide <= d; c += kWide)
    value_columns<R, Simd::kVectors, false>(weights, v + c, v_stride, n, 0, acc + c, acc_stride);
  for (; c + Simd::kLanes <= d; c += Simd::kLanes)
    value_columns<R, 1, false>(weights, v + c, v_stride, n, 0, acc + c, acc_stride);
  if (c < d) value_columns<R, 1, true>(weights, v + c, v_stride, n, d - c, acc + c, acc_stride);
}

// Calls f(Rows<n>, first row) for all rows, in blocks of at most MaxRows, which is 2 to 4.
template <int MaxRows = Simd::kRows, typename F>
void for_row_blocks(int rows, F f) {
  int r = 0;
  for (; r + MaxRows <= rows; r += MaxRows) f(Rows<MaxRows>(), r);
  switch (rows - r) {
    case 3: f(Rows<3>(), r); break;
    case 2: f(Rows<2>(), r); break;
    case 1: f(Rows<1>(), r); break;
  }
}

template <typename T>
class Attend {
  static constexpr bool kInBf16 = kSame<T, bf16_t> && Simd::kDotsBf16;
  using Tile = PackedTile<T, kInBf16>;
  static constexpr int kWeightLimbs = kSame<T, bf16_t> ? 1 : kFineLimbs;  // of weights, for packed values

 public:
  explicit Attend(const kvattn_attend_args &args)
      : a(args),
        group(static_cast<int>(a.q_heads / a.kv_heads)),
        window(min(a.window, a.kv_len)),
        d(static_cast<int>(a.head_dim)),
        d_pad(round_up(d, 64)),
        most_rows(rows_of_jobs()),
        // Measured: wide rows stream from memory 1.6 times faster in tiles of about 8 KB.
        tile(a.packed_len == 0 && d > 64 && most_rows == kPackFrom ? kTile / 2 : kTile),
        to_wrap(a.ring_slots > 0 ? a.ring_slots - a.ring_slot : a.kv_len),
        lead(lead_tokens()),
        origin(lead > 0 ? lead - tile : 0),
        partial_floats(most_rows * (2 + d_pad)) {}

  void run() {
    int64_t jobs = 0;
    for (int64_t b = 0; b < a.batch; ++b) jobs += a.kv_heads * chunks(b);
    Buffer<Job> job(jobs);
    Buffer<int64_t> start(jobs + 1);  // the first tile of each job, counting the tiles of all jobs
    start.data[0] = 0;
    for (int64_t b = 0, j = 0; b < a.batch; ++b)
      for (int64_t h = 0; h < a.kv_heads; ++h)
        for (int64_t row = 0; row < rows(b); row += chunk(b), ++j) {
          job.data[j] = job_at(b, h, row);
          start.data[j + 1] = start.data[j] + job.data[j].end_tile - job.data[j].tile;
        }
    int64_t tiles = start.data[jobs];
    // Measured: starting a team costs as much as it gains with 8 tiles of few rows a thread.
    const int64_t least = most_rows == kPackFrom ? 8 : 1;
    int threads = static_cast<int>(max<int64_t>(1, min<int64_t>(a.threads, tiles / least)));
    // All memory is allocated here: an exception must not leave a parallel region. At most 0.3 MB a thread for heads of
    // 64 channels, 0.6 MB for 128.
    Buffer<float> partials(2 * threads * partial_floats);
    Buffer<Scratch> scratch(threads);
    const int64_t scratch_floats = most_rows * (kTile + d_pad + Simd::kLanes) + 2 * (kTile + kPackFrom) * d_pad;
    Buffer<float> floats(threads * scratch_floats);
    Buffer<bf16_t> queries_bf16(threads * kPackFrom * d_pad);
    Buffer<Span> spans(threads * most_rows);
    Buffer<T> gathered(a.kv_rows ? threads * 2 * kTile * d_pad : 0);
    int team = 1;
    parallel(threads, [&](int thread, int count) {
      Scratch &mine = scratch.data[thread];
      mine.scores = floats.data + thread * scratch_floats;
      mine.q = mine.scores + most_rows * kTile;
      mine.sum_lanes = mine.q + most_rows * d_pad;
      mine.wide = mine.sum_lanes + most_rows * Simd::kLanes;
      mine.by_step = mine.wide + 2 * kTile * d_pad;
      mine.by_unit = mine.by_step + kPackFrom * d_pad;
      mine.q_bf16 = queries_bf16.data + thread * kPackFrom * d_pad;
      mine.spans = spans.data + thread * most_rows;
      mine.gathered = gathered.data + (a.kv_rows ? thread * 2 * kTile * d_pad : 0);
      int64_t from = tiles * thread / count, to = tiles * (thread + 1) / count, j = 0;
      while (start.data[j + 1] <= from) ++j;
      for (; j < jobs && start.data[j] < to; ++j) {
        int64_t lo = max(from, start.data[j]) - start.data[j], hi = min(to, start.data[j + 1]) - start.data[j];
        float *partial = partial_of(partials.data, thread, lo == 0);
        if (packs(job.data[j].b))
          attend_packed_rows(job.data[j], lo, hi, mine, partial);
        else
          attend_tiles(job.data[j], lo, hi, mine, partial);
        if (lo == 0 && hi == start.data[j + 1] - start.data[j]) write(job.data[j], partial);
      }
      if (thread == 0) team = count;
    });
    // Only jobs at the borders between two threads' shares were split.
    for (int64_t i = 1, done = -1; i < team; ++i) {
      int64_t j = 0;
      while (start.data[j + 1] <= tiles * i / team) ++j;
      if (j == done || start.data[j] == tiles * i / team) continue;  // merged already; not split here
      merge(job.data[j], start.data[j], start.data[j + 1], tiles, team, partials.data);
      done = j;
    }
  }

 private:
  struct Job {
    int64_t b, h, row, end_row;   // query rows [row, end_row) of a batch row or request
    int64_t tile, end_tile, end;  // tokens before `end` in the tiles [tile, end_tile)
    int64_t tokens, past;         // stored, and how many of them come before the first query
    int64_t first_query;          // of the request, among those of all
    int64_t tensor_row;           // where it is in the first dimension of the tensors
  };
  struct Span {
    int64_t begin, end;  // tokens that a query row sees
  };
  struct Scratch {
    float *scores;     // (most_rows, kTile)
    float *q;          // the queries of a job, (most_rows, d_pad), zero-padded
    float *sum_lanes;  // running sums of weights, one for each lane, (most_rows, kLanes)
    float *wide;       // a tile widened to fp32, (kTile, d_pad), or its packed keys, then its packed values
    bf16_t *q_bf16;
    Span *spans;  // (most_rows)
    T *gathered;  // keys, then values, of a tile whose tokens lie apart, (2, kTile, d_pad)
    // For packed keys, see `QueryRows`. Of 8-bit keys `by_step` is q, and nothing is written.
    float *by_step, *by_unit;  // (most_rows, d_pad)
    float packed_offset[kPackFrom];
  };
  // Where the tokens of a tile are stored: those in whole packed blocks, then the exact ones.
  struct Place {
    int64_t t;  // the first token
    int n, packed;
    int64_t block;
    const T *k, *v;
    int64_t k_stride, v_stride;
  };

  int64_t lead_tokens() const {
    if (a.packed_len > 0) return a.packed_start;
    return a.ring_slots > 0 ? to_wrap % tile : 0;
  }
  int64_t rows(int64_t b) const { return group * (a.q_begin ? a.q_begin[b + 1] - a.q_begin[b] : a.q_len); }
  bool packs(int64_t b) const { return rows(b) >= kPackFrom; }
  int64_t chunk(int64_t b) const {  // query rows of one job
    if (!packs(b)) return kPackFrom;
    const int64_t jobs = (rows(b) + kManyRows - 1) / kManyRows;
    return round_up((rows(b) + jobs - 1) / jobs, kBlockRows);
  }
  int64_t chunks(int64_t b) const { return (rows(b) + chunk(b) - 1) / chunk(b); }
  int64_t rows_of_jobs() const {
    int64_t most = kPackFrom;
    for (int64_t b = 0; b < (a.q_begin ? a.batch : 1); ++b) most = max(most, chunk(b));
    return most;
  }
  int64_t position(const Job &job, int64_t row) const { return job.past + row / group; }
  int64_t leftpad(int64_t b) const { return a.leftpad ? min(a.kv_len, max<int64_t>(0, a.leftpad[b])) : 0; }
  int64_t first_visible(const Job &job, int64_t row) const {
    return max(leftpad(job.b), window > 0 ? position(job, row) + 1 - window : 0);
  }
  int64_t visible_end(const Job &job, int64_t row) const {
    return a.causal ? min(job.tokens, position(job, row) + 1) : job.tokens;
  }

  Job job_at(int64_t b, int64_t h, int64_t row) const {
    Job job;
    job.b = b, job.h = h, job.row = row, job.end_row = min<int64_t>(rows(b), row + chunk(b));
    job.tokens = a.q_begin ? a.kv_begin[b + 1] - a.kv_begin[b] : a.kv_len;
    job.past = job.tokens - rows(b) / group;
    job.first_query = a.q_begin ? a.q_begin[b] : 0;
    job.tensor_row = a.q_begin ? 0 : b;
    int64_t begin = first_visible(job, row);
    job.end = max(begin, visible_end(job, job.end_row - 1));
    job.tile = tile_of(begin);
    job.end_tile = max(job.tile + 1, tile_of(job.end - 1) + 1);
    return job;
  }

  // A tile begins where the packed blocks begin, and where a ring wraps: the `lead` tokens before are tile 0.
  int64_t tile_of(int64_t t) const { return t < lead ? 0 : (t - origin) / tile; }
  int64_t tile_begin(int64_t i) const { return max<int64_t>(0, origin + i * tile); }

  // A thread has two partials: one for a job that another thread began, and one for the jobs that it begins itself, one
  // after the other. Only the last of those can be unfinished, so it is still there when partials are merged.
  float *partial_of(float *partials, int64_t thread, bool begun_here) const {
    return partials + (2 * thread + begun_here) * partial_floats;
  }

  // A partial result: unnormalised outputs, references (base 2) and sums of most_rows rows.
  static float *outputs(float *partial) { return partial; }
  float *references(float *partial) const { return partial + most_rows * d_pad; }
  float *sums(float *partial) const { return references(partial) + most_rows; }

  void clear(float *partial, int n_rows) const {
    fill(references(partial), references(partial) + n_rows, -kInf);
    fill(outputs(partial), outputs(partial) + n_rows * d_pad, 0.f);
  }

  int64_t query(const Job &job, int64_t row, const int64_t *stride) const {
    return job.tensor_row * stride[0] + (job.h * group + row % group) * stride[1] +
           (job.first_query + row / group) * stride[2];
  }

  int visible_sinks(const Job &job, int r) const {
    int64_t left = a.sink_evicted + (job.row + r) / group - (a.sink_leftpad ? a.sink_leftpad[job.b] : 0);
    return static_cast<int>(max<int64_t>(0, min<int64_t>(left, a.sinks)));
  }

  // The sinks are a tile of their own before tile 0, with queries of their own.
  void attend_sinks(const Job &job, int n_rows, Scratch &scratch, float *partial) const {
    const int n = static_cast<int>(a.sinks);
    const int64_t *stride = a.sink_kv_stride, at = job.b * stride[0] + job.h * stride[1];
    if (visible_sinks(job, n_rows - 1) == 0) return;
    for (int r = 0; r < n_rows; ++r)
      load_query(static_cast<const T *>(a.sink_q) + query(job, job.row + r, a.sink_q_stride), r, scratch);
    score_tile(static_cast<const T *>(a.sink_k) + at, stride[2], n, n_rows, scratch, 0);
    for (int r = 0; r < n_rows; ++r)
      softmax_tile(0, visible_sinks(job, r), n, &scratch.scores[r * kTile], references(partial) + r,
                   scratch.sum_lanes + r * Simd::kLanes, outputs(partial) + r * d_pad);
    value_tile(static_cast<const T *>(a.sink_v) + at, stride[2], n, n_rows, scratch, 0, outputs(partial));
  }

  void attend_tiles(const Job &job, int64_t lo, int64_t hi, Scratch &scratch, float *partial) const {
    int n_rows = static_cast<int>(job.end_row - job.row);
    clear(partial, n_rows);
    fill(scratch.sum_lanes, scratch.sum_lanes + n_rows * Simd::kLanes, 0.f);
    const bool with_sinks = a.sinks > 0 && lo == 0;
    if (with_sinks) attend_sinks(job, n_rows, scratch, partial);
    for (int r = 0; r < n_rows; ++r)
      load_query(static_cast<const T *>(a.q) + query(job, job.row + r, a.q_stride), r, scratch);
    const KeyTable table = a.packed_len > 0 ? KeyTable(a, stored_head(job)) : KeyTable();
    const PackedKeys keys = packed_keys(job, table);
    const PackedValues values = packed_values_of(job);
    const QueryRows queries = a.packed_len > 0 ? packed_queries(job, table, n_rows, scratch) : QueryRows{};
    bool rotated = false, empty = !with_sinks;  // whether the sums are rotated as packed values are; are all zero
    auto set_rotated = [&](bool to) {
      if (rotated != to && !empty)
        for (int r = 0; r < n_rows; ++r) hadamard(outputs(partial) + r * d_pad, d, static_cast<int>(a.v_rotation));
      rotated = to, empty = false;
    };
    for (int64_t i = job.tile + lo; i < job.tile + hi; ++i) {
      int64_t t = tile_begin(i);
      if (int64_t run = min(visible_packed_tiles(job, t), job.tile + hi - i)) {
        set_rotated(true);
        const int64_t slot = packed_slot((t - lead) / kBlock);
        run = min(run, max<int64_t>(1, (a.packed_blocks - slot) / 2));
        const float factor = a.scale * kLog2e;
        for_row_blocks<kPackedRows>(n_rows, [&](auto count, int r) {
          float offset[count.value], x[count.value * kMaxDim], unit[count.value * kMaxDim];
          const QueryRows from = queries.at(r);
          for (int i = 0; i < count.value; ++i) {
            offset[i] = from.offset[i] * factor;
            for (int c = 0; c < d; ++c) x[i * kMaxDim + c] = from.x[i * d_pad + c] * factor;
            for (int c = 0; from.unit && c < d; ++c) unit[i * kMaxDim + c] = from.unit[i * d_pad + c] * factor;
          }
          attend_packed_tiles<count.value, kWeightLimbs>(
              keys.at(slot), values.at(slot), run, {x, unit, offset, kMaxDim}, references(partial) + r,
              scratch.sum_lanes + r * Simd::kLanes, outputs(partial) + r * d_pad, d_pad);
        });
        i += run - 1;
        continue;
      }
      const Place at = place(job, i, scratch);
      const int n = at.n, packed = at.packed, blocks = packed / kBlock;
      for_row_blocks<kPackedRows>(packed ? n_rows : 0, [&](auto count, int r) {
        packed_scores<count.value>(keys.at(at.block), blocks, queries.at(r), &scratch.scores[r * kTile], kTile);
      });
      if (packed < n) {
        prefetch_rows(at.v, at.v_stride, n - packed);
        score_tile(at.k, at.k_stride, n - packed, n_rows, scratch, packed);
        prefetch_rows(at.k + (n - packed) * at.k_stride, at.k_stride, n - packed);  // of the next tile, most often
      }
      for (int r = 0; r < n_rows; ++r) {
        int begin = static_cast<int>(min<int64_t>(max<int64_t>(first_visible(job, job.row + r) - t, 0), n));
        int end = static_cast<int>(min<int64_t>(max<int64_t>(visible_end(job, job.row + r) - t, begin), n));
        softmax_tile(begin, end, n, &scratch.scores[r * kTile], references(partial) + r,
                     scratch.sum_lanes + r * Simd::kLanes, outputs(partial) + r * d_pad);
      }
      if (packed) set_rotated(true);
      for_row_blocks<kPackedRows>(packed ? n_rows : 0, [&](auto count, int r) {
        packed_values<count.value, kWeightLimbs>(values.at(at.block), blocks, &scratch.scores[r * kTile], kTile,
                                                 outputs(partial) + r * d_pad, d_pad);
      });
      if (packed < n) {
        set_rotated(false);
        value_tile(at.v, at.v_stride, n - packed, n_rows, scratch, packed, outputs(partial));
      }
    }
    set_rotated(false);
    for (int r = 0; r < n_rows; ++r) sums(partial)[r] = Simd::sum(Simd::load(scratch.sum_lanes + r * Simd::kLanes));
  }

  // The same for many rows: tiles are packed, and their products computed in blocks of rows.
  void attend_packed_rows(const Job &job, int64_t lo, int64_t hi, Scratch &scratch, float *partial) const {
    const int n_rows = static_cast<int>(job.end_row - job.row), rows = static_cast<int>(round_up(n_rows, kBlockRows));
    clear(partial, rows);
    fill(scratch.sum_lanes, scratch.sum_lanes + rows * Simd::kLanes, 0.f);
    const Tile tile{scratch.wide, scratch.wide + kTile * d_pad, d, d_pad};
    bool rotated = false, empty = true;  // as in attend_tiles
    auto set_rotated = [&](bool to) {
      if (rotated != to && !empty)
        for (int r = 0; r < n_rows; ++r) hadamard(outputs(partial) + r * d_pad, d, static_cast<int>(a.v_rotation));
      rotated = to, empty = false;
    };
    // `write_keys` and `write_values` write the tile's n tokens from t on, of which `packed` come from blocks.
    auto attend_tile = [&](int64_t t, int n, int packed, auto write_keys, auto write_values) {
      int from = 0, to = n_rows;  // the rows that see any of it
      while (from < to && scratch.spans[from].end <= t) ++from;
      while (to > from && scratch.spans[to - 1].begin >= t + n) --to;
      if (from == to) return;
      from = from / kBlockRows * kBlockRows;
      const int count = static_cast<int>(round_up(to - from, kBlockRows));
      float *scores = scratch.scores + from * kTile, *acc = outputs(partial) + from * d_pad;
      write_keys();
      tile.score(scratch.q + from * kTile, rows, count, n, scores);
      for (int r = from; r < min(n_rows, from + count); ++r) {
        const Span span = scratch.spans[r];
        const int begin = static_cast<int>(min<int64_t>(max<int64_t>(span.begin - t, 0), n));
        const int end = static_cast<int>(min<int64_t>(max<int64_t>(span.end - t, begin), n));
        float *x = scratch.scores + r * kTile;
        softmax_tile(begin, end, n, x, references(partial) + r, scratch.sum_lanes + r * Simd::kLanes,
                     outputs(partial) + r * d_pad);
        Tile::to_units(x, n);
      }
      write_values();
      if (packed > 0) {
        set_rotated(true);
        tile.add_values(scores, 0, packed, count, acc);
      }
      if (packed < n) {
        set_rotated(false);
        tile.add_values(scores, packed, n, count, acc);
      }
    };
    if (a.sinks > 0 && lo == 0) {
      load_queries(static_cast<const T *>(a.sink_q), a.sink_q_stride, job, n_rows, tile, scratch);
      for (int r = 0; r < n_rows; ++r) scratch.spans[r] = {0, visible_sinks(job, r)};
      const int n = static_cast<int>(a.sinks);
      const int64_t *stride = a.sink_kv_stride, at = job.b * stride[0] + job.h * stride[1];
      attend_tile(
          0, n, 0, [&] { tile.write_keys(static_cast<const T *>(a.sink_k) + at, stride[2], n, 0); },
          [&] { tile.write_values(static_cast<const T *>(a.sink_v) + at, stride[2], n, 0); });
    }
    load_queries(static_cast<const T *>(a.q), a.q_stride, job, n_rows, tile, scratch);
    for (int r = 0; r < n_rows; ++r)
      scratch.spans[r] = {first_visible(job, job.row + r), visible_end(job, job.row + r)};
    const KeyTable table = a.packed_len > 0 ? KeyTable(a, stored_head(job)) : KeyTable();
    const PackedKeys keys = packed_keys(job, table);
    const PackedValues values = packed_values_of(job);
    const float *mean = a.packed_len > 0 ? a.k_mean + (job.b * a.kv_heads + job.h) * d : nullptr;
    for (int64_t i = job.tile + lo; i < job.tile + hi; ++i) {
      const Place at = place(job, i, scratch);
      attend_tile(
          at.t, at.n, at.packed,
          [&] {
            for (int t = 0; t < at.packed; t += kBlock) tile.write_keys(keys.at(at.block + t / kBlock), mean, t);
            tile.write_keys(at.k, at.k_stride, at.n - at.packed, at.packed);
          },
          [&] {
            for (int t = 0; t < at.packed; t += kBlock) tile.write_values(values.at(at.block + t / kBlock), t);
            tile.write_values(at.v, at.v_stride, at.n - at.packed, at.packed);
          });
    }
    set_rotated(false);
    for (int r = 0; r < n_rows; ++r) sums(partial)[r] = Simd::sum(Simd::load(scratch.sum_lanes + r * Simd::kLanes));
  }

  // Where the tokens of tile i lie; those that lie apart are gathered first.
  Place place(const Job &job, int64_t i, Scratch &scratch) const {
    Place at;
    const int64_t t = at.t = tile_begin(i);
    at.n = static_cast<int>(max<int64_t>(0, min(job.end, tile_begin(i + 1)) - t));
    // Whole blocks are read: the rows' visible_end masks the tokens beyond it.
    const int64_t left = t < lead ? 0 : max<int64_t>(0, lead + a.packed_len - t);
    at.packed = static_cast<int>(min<int64_t>(round_up(at.n, kBlock), left));
    at.block = packed_slot((t - lead) / kBlock);
    at.n = max(at.n, at.packed);
    int64_t dense = t < lead || a.packed_len == 0 ? ring_slot(t) : t + at.packed - a.packed_len;
    if (a.q_begin) dense = request_row(job.b, t, at.n);
    const T *k = head(a.k, a.k_stride, job), *v = head(a.v, a.v_stride, job);
    const bool apart = a.kv_rows && dense < 0;
    if (apart) gather(job.b, t, at.n, k, v, scratch);
    at.k = apart ? scratch.gathered : k + dense * a.k_stride[2];
    at.v = apart ? scratch.gathered + kTile * d_pad : v + dense * a.v_stride[2];
    at.k_stride = apart ? d_pad : a.k_stride[2], at.v_stride = apart ? d_pad : a.v_stride[2];
    return at;
  }

  // How many packed tiles from token t on are full and visible to all rows; 0 for many rows, where it does not pay.
  int64_t visible_packed_tiles(const Job &job, int64_t t) const {
    if (t < lead || a.softcap > 0 || job.end_row - job.row > kFewRows) return 0;
    if (t < first_visible(job, job.end_row - 1)) return 0;
    return max<int64_t>(0, min(lead + a.packed_len, visible_end(job, job.row)) - t) / kTile;
  }

  int64_t packed_slot(int64_t block) const {
    return block + a.packed_slot < a.packed_blocks ? block + a.packed_slot : block + a.packed_slot - a.packed_blocks;
  }
  int64_t ring_slot(int64_t t) const { return t < to_wrap ? a.ring_slot + t : t - to_wrap; }

  // The row of a request's token t if the n tokens from t on lie side by side, else -1.
  int64_t request_row(int64_t b, int64_t t, int n) const {
    if (!a.kv_rows) return a.kv_begin[b] + t;
    const int64_t *row = a.kv_rows + a.kv_begin[b] + t;
    int64_t apart = 0;
    for (int i = 0; i < n; ++i) apart |= row[i] - row[0] - i;
    return apart ? -1 : row[0];
  }

  void gather(int64_t b, int64_t t, int n, const T *k, const T *v, Scratch &scratch) const {
    const int64_t *row = a.kv_rows + a.kv_begin[b] + t;
    for (int i = 0; i < n; ++i) {
      memcpy(scratch.gathered + i * d_pad, k + row[i] * a.k_stride[2], d * sizeof(T));
      memcpy(scratch.gathered + (kTile + i) * d_pad, v + row[i] * a.v_stride[2], d * sizeof(T));
    }
  }

  // Keys or values of the job's head; null where all are packed.
  const T *head(const void *all, const int64_t *stride, const Job &job) const {
    return all ? static_cast<const T *>(all) + job.tensor_row * stride[0] + job.h * stride[1] : nullptr;
  }

  int64_t stored_head(const Job &job) const { return job.b * a.kv_heads + job.h; }

  PackedKeys packed_keys(const Job &job, const KeyTable &table) const {
    PackedKeys all{a.k_codes, static_cast<const uint8_t *>(a.k_scale), &table, a.k_bits, d};
    return a.packed_len > 0 ? all.at(stored_head(job) * a.packed_blocks) : all;
  }

  PackedValues packed_values_of(const Job &job) const {
    PackedValues all{a.v_codes, static_cast<const uint8_t *>(a.v_scale), a.v_bits, d, static_cast<int>(a.v_group)};
    return a.packed_len > 0 ? all.at(stored_head(job) * a.packed_blocks) : all;
  }

  // The queries of a job as its packed keys meet them.
  QueryRows packed_queries(const Job &job, const KeyTable &table, int n_rows, Scratch &scratch) const {
    const float *mean = a.k_mean + stored_head(job) * d;
    for (int r = 0; r < n_rows; ++r) {
      const float *q = scratch.q + r * d_pad;
      float sum = 0.f;
      for (int c = 0; c < d; ++c) sum += q[c] * mean[c];
      for (int c = 0; table.order && c < d; ++c) {
        const float x = q[table.order[c]], by_unit = x * to_float(table.unit[c]);
        scratch.by_step[r * d_pad + c] = c < table.end[1] ? x * to_float(table.step[c]) : 0.f;  // there are codes
        scratch.by_unit[r * d_pad + c] = by_unit;
        sum -= by_unit * kOffsetZero;
      }
      scratch.packed_offset[r] = sum;
    }
    if (!table.order) return {scratch.q, nullptr, scratch.packed_offset, d_pad};
    return {scratch.by_step, scratch.by_unit, scratch.packed_offset, d_pad};
  }

  void load_query(const T *from, int r, Scratch &scratch) const {
    fill(scratch.q + r * d_pad, scratch.q + (r + 1) * d_pad, 0.f);
    widen_row(from, d, scratch.q + r * d_pad);
    if constexpr (kInBf16)
      for (int64_t c = 0; c < d_pad; ++c) scratch.q_bf16[r * d_pad + c] = c < d ? from[c] : bf16_t{0};
  }

  // All queries of a job in panels, as products take them.
  void load_queries(const T *q, const int64_t *stride, const Job &job, int n_rows, const Tile &tile,
                    Scratch &scratch) const {
    const int rows = static_cast<int>(round_up(n_rows, kBlockRows));
    fill(scratch.q, scratch.q + rows * d_pad, 0.f);
    for (int r = 0; r < n_rows; ++r) tile.write_query(q + query(job, job.row + r, stride), r, rows, scratch.q);
  }

  // Rows that are needed soon. Measured with AVX2: one query over 8,192 tokens is answered about 1.3 times faster.
  void prefetch_rows(const T *rows, int64_t stride, int n) const {
    for (int t = 0; t < n; ++t) prefetch(rows + t * stride, d * sizeof(T));
  }

  // Scores of n tokens, written from column `at` of the tile on.
  void score_tile(const T *k, int64_t stride, int n, int n_rows, Scratch &scratch, int at) const {
    if constexpr (kInBf16) {
      for_row_blocks(n_rows, [&](auto block, int r) {
        score_block_bf16<block.value>(scratch.q_bf16 + r * d_pad, d_pad, k, stride, n, d,
                                      &scratch.scores[r * kTile + at]);
      });
    } else {
      with_wide_tile(k, stride, n, n_rows, scratch, [&](auto *tile, int64_t tile_stride) {
        for_row_blocks(n_rows, [&](auto block, int r) {
          score_block<block.value>(scratch.q + r * d_pad, d_pad, tile, tile_stride, n, d,
                                   &scratch.scores[r * kTile + at]);
        });
      });
    }
  }

  void value_tile(const T *v, int64_t stride, int n, int n_rows, Scratch &scratch, int at, float *acc) const {
    with_wide_tile(v, stride, n, n_rows, scratch, [&](auto *tile, int64_t tile_stride) {
      for_row_blocks(n_rows, [&](auto block, int r) {
        value_block<block.value>(&scratch.scores[r * kTile + at], tile, tile_stride, n, d, acc + r * d_pad, d_pad);
      });
    });
  }

  // With many rows the tile is widened to fp32 once. With few rows that costs more than it saves.
  template <typename F>
  void with_wide_tile(const T *tile, int64_t stride, int n, int n_rows, Scratch &scratch, F f) const {
    if constexpr (!kSame<T, float>) {
      if (n_rows > kFewRows) {
        for (int t = 0; t < n; ++t) widen_row(tile + t * stride, d, scratch.wide + t * d_pad);
        f(scratch.wide, d_pad);
        return;
      }
    }
    f(tile, stride);
  }

  // Turns the scores of one row and tile into weights 2^(x - reference). The reference is an earlier maximum. It is
  // raised to the new one, and the sums are rescaled, only when a weight would exceed 2^kRescaleThreshold
  // (FlashAttention-4, 2025). Of the n tokens those in [begin, end) are visible.
  void softmax_tile(int begin, int end, int n, float *x, float *reference, float *sum_lanes, float *acc) const {
    const int padded = static_cast<int>(round_up(n, Simd::kLanes));
    if (a.softcap > 0)
      for (int i = 0; i < padded; i += Simd::kLanes) {
        Simd::Vec capped = tanh_vec(Simd::mul(Simd::load(x + i), Simd::set(a.scale / a.softcap)));
        Simd::store(x + i, Simd::mul(capped, Simd::set(a.softcap)));
      }
    float factor = (a.softcap > 0 ? 1.f : a.scale) * kLog2e;
    Simd::Vec top = Simd::set(-kInf);
    if (begin > 0 || end < padded) {  // multiplied before scores are masked: -inf times a factor may be anything
      for (int i = 0; i < padded; i += Simd::kLanes)
        Simd::store(x + i, Simd::mul(Simd::load(x + i), Simd::set(factor)));
      fill(x, x + begin, -kInf);
      fill(x + end, x + padded, -kInf);
      factor = 1.f;
    }
    for (int i = 0; i < padded; i += Simd::kLanes)
      top = Simd::max(top, Simd::mul(Simd::load(x + i), Simd::set(factor)));
    if (!Simd::all_at_most(top, *reference + kRescaleThreshold))
      rescale(max(*reference, Simd::max_lane(top)), reference, sum_lanes, acc, static_cast<int>(d_pad));
    if (*reference == -kInf) {  // nothing visible yet: all weights are 0, and inf - inf is avoided
      fill(x, x + padded, 0.f);
      return;
    }
    exp_sum(x, padded, factor, *reference, sum_lanes);
  }

  void write(const Job &job, float *partial) const {
    for (int64_t row = job.row; row < job.end_row; ++row) {
      int64_t r = row - job.row, head = job.h * group + row % group, i = row / group;
      float sum = sums(partial)[r], scale = sum == 0 ? 0.f : 1.f / sum;
      const int64_t token = job.first_query + i;
      T *out = static_cast<T *>(a.out) + ((job.tensor_row * a.q_len + token) * a.q_heads + head) * d;
      for (int c = 0; c < d; ++c) narrow(outputs(partial)[r * d_pad + c] * scale, out + c);
      if (a.lse)
        a.lse[(job.tensor_row * a.q_heads + head) * a.q_len + token] =
            sum == 0 ? -kInf : references(partial)[r] * kLn2 + logf(sum);
    }
  }

  // Joins the parts of a job that has the tiles [start, stop) of all `tiles`.
  void merge(const Job &job, int64_t start, int64_t stop, int64_t tiles, int count, float *partials) const {
    auto thread_of = [&](int64_t tile) {  // whose share, from tile tiles * i / count on, has this tile
      int64_t i = tile * count / tiles;
      while (tiles * (i + 1) / count <= tile) ++i;
      while (tiles * i / count > tile) --i;
      return i;
    };
    int64_t begin = thread_of(start), end = thread_of(stop - 1);
    float *into = partial_of(partials, begin, true);
    for (int64_t i = begin + 1; i <= end; ++i) {
      float *partial = partial_of(partials, i, false);
      for (int64_t r = 0; r < job.end_row - job.row; ++r) {
        float top = max(references(into)[r], references(partial)[r]);
        if (top == -kInf) continue;
        float keep = exp2f(references(into)[r] - top), take = exp2f(references(partial)[r] - top);
        references(into)[r] = top;
        sums(into)[r] = sums(into)[r] * keep + sums(partial)[r] * take;
        float *x = outputs(into) + r * d_pad, *y = outputs(partial) + r * d_pad;
        for (int64_t c = 0; c < d_pad; ++c) x[c] = x[c] * keep + y[c] * take;
      }
    }
    write(job, into);
  }

  const kvattn_attend_args &a;
  int group;
  int64_t window;  // at most kv_len, which hides nothing either; 0 = all
  int d;
  int64_t d_pad;
  int64_t most_rows;  // of any job
  int64_t tile;
  int64_t to_wrap;       // tokens before the ring wraps
  int64_t lead, origin;  // tokens of tile 0 where it is shorter, else 0; where tile 0 would begin if it were full
  int64_t partial_floats;
};

}  // namespace

// Uses the helpers above.
#include "quantize.h"
