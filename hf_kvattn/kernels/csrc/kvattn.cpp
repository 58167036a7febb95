// Entry points: checks, and the choice of a SIMD variant.
#include "kvattn.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <new>

#ifdef KVATTN_ARM64
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#include "parallel.h"

// Defined in variant.cpp, which CMake compiles once for each variant.
#define KVATTN_DECLARE(variant)                                 \
  void kvattn_attend_##variant(const kvattn_attend_args *);     \
  void kvattn_quantize_##variant(const kvattn_quantize_args *); \
  void kvattn_linear_##variant(const kvattn_linear_args *);
KVATTN_DECLARE(portable)
#ifdef KVATTN_X86
KVATTN_DECLARE(avx2)
KVATTN_DECLARE(avx512)
KVATTN_DECLARE(avx512_bf16)
#endif
#ifdef KVATTN_ARM64
KVATTN_DECLARE(neon)
KVATTN_DECLARE(neon_dot)
KVATTN_DECLARE(neon_bf16)
#endif

namespace {

struct Variant {
  const char *name;
  bool (*runs_here)();
  void (*attend)(const kvattn_attend_args *);
  void (*quantize)(const kvattn_quantize_args *);
  void (*linear)(const kvattn_linear_args *);
};

#ifdef KVATTN_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef KVATTN_ARM64
#if defined(__APPLE__)
bool has(const char *feature) {
  int32_t found = 0;
  size_t size = sizeof found;
  return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found;
}
bool has_neon_dot() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_neon_bf16() { return has_neon_dot() && has("hw.optional.arm.FEAT_BF16"); }
#elif defined(__linux__)
// HWCAP_ASIMDDP and HWCAP2_BF16, which older headers lack.
bool has_neon_dot() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_neon_bf16() { return has_neon_dot() && (getauxval(AT_HWCAP2) >> 14 & 1); }
#else
bool has_neon_dot() { return false; }
bool has_neon_bf16() { return false; }
#endif
#endif

bool everywhere() { return true; }

const Variant kVariants[] = {
#ifdef KVATTN_X86
    {"avx512_bf16", has_avx512_bf16, kvattn_attend_avx512_bf16, kvattn_quantize_avx512_bf16, kvattn_linear_avx512_bf16},
    {"avx512", has_avx512, kvattn_attend_avx512, kvattn_quantize_avx512, kvattn_linear_avx512},
    {"avx2", has_avx2, kvattn_attend_avx2, kvattn_quantize_avx2, kvattn_linear_avx2},
#endif
#ifdef KVATTN_ARM64
    {"neon_bf16", has_neon_bf16, kvattn_attend_neon_bf16, kvattn_quantize_neon_bf16, kvattn_linear_neon_bf16},
    {"neon_dot", has_neon_dot, kvattn_attend_neon_dot, kvattn_quantize_neon_dot, kvattn_linear_neon_dot},
    {"neon", everywhere, kvattn_attend_neon, kvattn_quantize_neon, kvattn_linear_neon},
#endif
    {"portable", everywhere, kvattn_attend_portable, kvattn_quantize_portable, kvattn_linear_portable},
};

std::atomic<const Variant *> chosen{nullptr};

const Variant &variant() {
  const Variant *current = chosen.load(std::memory_order_relaxed);
  if (!current) {
    kvattn_select("");
    current = chosen.load(std::memory_order_relaxed);
  }
  return *current;
}

// No array is larger than what a process can address, and no loop longer than what a machine can count. Within these
// bounds no sum or product of sizes, strides, slots and threads overflows.
constexpr int64_t kMaxBytes = int64_t{1} << 47, kMaxSteps = int64_t{1} << 60;
constexpr int64_t kMaxThreads = 1 << 16, kMaxHeads = 1 << 24, kMaxDim = 1 << 24;
constexpr int64_t kMaxPackedDim = 512, kMaxSinks = 64, kPackedTokens = 32;

bool in(int64_t x, int64_t least, int64_t most) { return least <= x && x <= most; }

// Whether all sizes are at least 1, and their product at most `most`.
bool fits(std::initializer_list<int64_t> sizes, int64_t most) {
  for (int64_t size : sizes) {
    if (!in(size, 1, most)) return false;
    most /= size;
  }
  return true;
}

bool valid_dtype(int dtype) { return in(dtype, KVATTN_F32, KVATTN_BF16); }
int64_t bytes_of(int dtype) { return dtype == KVATTN_F32 ? 4 : 2; }

bool aligned(const void *p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
bool readable(const void *p, int64_t bytes) { return p && aligned(p, bytes); }

// Whether rows of `head_dim` numbers, as many as the sizes say, lie at strides that stay within the memory.
bool valid_strides(const int64_t *stride, std::initializer_list<int64_t> sizes, int64_t head_dim, int dtype) {
  int64_t left = kMaxBytes / bytes_of(dtype) - head_dim;
  for (int64_t size : sizes) {
    if (*stride < 0 || (size > 1 && *stride > left / (size - 1))) return false;
    if (size > 1) left -= *stride * (size - 1);
    ++stride;
  }
  return left >= 0;
}

bool valid_codes(int bits, const uint8_t *codes, const void *scale) {
  return codes && (bits == 8 ? readable(scale, 2) : in(bits, 2, 4) && scale);
}

// The tables of all heads, which lead to memory. After `valid_groups`.
template <typename Args>
bool valid_table(const Args &a) {
  if (a.k_bits == 8) return !a.k_step && !a.k_unit && !a.k_order && !a.k_widths;
  if (!readable(a.k_step, 2) || !readable(a.k_unit, 2) || !readable(a.k_order, 2) || !a.k_widths) return false;
  bool valid = true;
  for (int64_t head = 0; head < a.batch * a.kv_heads; ++head) {
    uint64_t seen[kMaxPackedDim / 64] = {};
    int64_t sum = 0, last = 7;
    for (int64_t c = 0; c < a.head_dim; ++c) {
      const int64_t channel = a.k_order[head * a.head_dim + c];
      if (!in(channel, 0, a.head_dim - 1)) return false;
      valid &= !(seen[channel / 64] >> channel % 64 & 1);
      seen[channel / 64] |= uint64_t{1} << channel % 64;
    }
    for (int64_t g = 0; g < a.head_dim / 16; ++g) {
      const int64_t width = a.k_widths[head * (a.head_dim / 16) + g];
      valid &= width <= last;
      last = width, sum += width;
    }
    valid &= sum == a.k_bits * (a.head_dim / 16);
  }
  return valid;
}

bool valid_groups(int64_t head_dim, int64_t v_group, int64_t v_rotation) {
  return in(head_dim, 16, kMaxPackedDim) && in(v_group, 16, head_dim) && v_group % 16 == 0 && head_dim % v_group == 0 &&
         in(v_rotation, 1, head_dim) && (v_rotation & (v_rotation - 1)) == 0 && head_dim % v_rotation == 0;
}

// The fields that both structs have for blocks.
template <typename Args>
bool valid_blocks(const Args &a) {
  return fits({a.batch, a.kv_heads, a.packed_blocks, 4 * 8 * kMaxPackedDim}, kMaxBytes) &&
         valid_codes(a.k_bits, a.k_codes, a.k_scale) && valid_codes(a.v_bits, a.v_codes, a.v_scale) &&
         valid_groups(a.head_dim, a.v_group, a.v_rotation) && readable(a.k_mean, 4) && valid_table(a);
}

bool valid_shapes(const kvattn_attend_args &a) {
  return valid_dtype(a.dtype) && in(a.causal, 0, 1) && in(a.threads, 1, kMaxThreads) && a.reserved == 0 &&
         in(a.head_dim, 1, kMaxDim) && fits({a.batch, a.q_heads, a.q_len, a.head_dim, 4}, kMaxBytes) &&
         fits({a.batch, a.q_heads, a.q_len, a.kv_len, a.threads}, kMaxSteps) && in(a.kv_heads, 1, a.q_heads) &&
         a.q_heads <= kMaxHeads && a.q_heads % a.kv_heads == 0 && a.window >= 0 && std::isfinite(a.scale) &&
         std::isfinite(a.softcap) && a.softcap >= 0;
}

bool valid_packed(const kvattn_attend_args &a) {
  if (a.packed_len == 0) return in(a.packed_blocks, 0, kMaxSteps) && in(a.packed_slot, 0, kMaxSteps);
  return in(a.packed_len, 1, a.kv_len) && a.packed_len % kPackedTokens == 0 &&
         in(a.packed_start, 0, std::min(kPackedTokens, a.kv_len - a.packed_len)) && valid_blocks(a) &&
         a.packed_len / kPackedTokens <= a.packed_blocks && in(a.packed_slot, 0, a.packed_blocks - 1) &&
         a.packed_slot % 2 == 0 && (a.packed_slot == 0 || a.packed_blocks % 2 == 0);
}

bool valid_ring(const kvattn_attend_args &a) {
  if (a.ring_slots == 0) return a.ring_slot == 0;
  return a.packed_len == 0 && a.ring_slots >= a.kv_len && in(a.ring_slot, 0, a.ring_slots - 1);
}

// Reads the numbers of the requests, which lead to memory.
bool valid_requests(const kvattn_attend_args &a) {
  if (!a.q_begin) return !a.kv_begin && !a.kv_rows;
  const bool alone = a.packed_len == 0 && a.ring_slots == 0 && a.sinks == 0 && !a.leftpad && a.batch < INT32_MAX;
  if (!alone || !readable(a.q_begin, 4) || !readable(a.kv_begin, 4) || !aligned(a.kv_rows, 8)) return false;
  if (a.q_begin[0] != 0 || a.kv_begin[0] != 0 || a.q_begin[a.batch] != a.q_len) return false;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t queries = int64_t{a.q_begin[b + 1]} - a.q_begin[b];
    const int64_t tokens = int64_t{a.kv_begin[b + 1]} - a.kv_begin[b];
    if (queries < 0 || tokens < queries) return false;
  }
  const int64_t tokens = a.kv_begin[a.batch];
  if (!a.kv_rows) return tokens <= a.kv_len;
  bool within = true;
  for (int64_t i = 0; i < tokens; ++i) within &= 0 <= a.kv_rows[i] && a.kv_rows[i] < a.kv_len;
  return within;
}

// After the others.
bool valid_tensors(const kvattn_attend_args &a) {
  const int64_t bytes = bytes_of(a.dtype), exact = a.ring_slots > 0 ? a.ring_slots : a.kv_len - a.packed_len;
  const bool all_packed = exact == 0;  // then k and v are empty
  return readable(a.q, bytes) && readable(a.out, bytes) && aligned(a.lse, 4) && aligned(a.leftpad, 4) &&
         valid_strides(a.q_stride, {a.batch, a.q_heads, a.q_len}, a.head_dim, a.dtype) &&
         (all_packed || (readable(a.k, bytes) && readable(a.v, bytes) &&
                         valid_strides(a.k_stride, {a.batch, a.kv_heads, exact}, a.head_dim, a.dtype) &&
                         valid_strides(a.v_stride, {a.batch, a.kv_heads, exact}, a.head_dim, a.dtype)));
}

// After `valid_tensors`: the slots have the strides that it has looked at.
bool valid_new(const kvattn_attend_args &a) {
  if (!a.k_new) return !a.v_new && !a.k_slot && !a.v_slot;
  const int64_t bytes = bytes_of(a.dtype);
  return readable(a.k_new, bytes) && readable(a.v_new, bytes) && readable(a.k_slot, bytes) &&
         readable(a.v_slot, bytes) && a.packed_len < a.kv_len && !a.q_begin;
}

bool valid_sinks(const kvattn_attend_args &a) {
  if (a.sinks == 0) return true;
  const int64_t bytes = bytes_of(a.dtype);
  return in(a.sinks, 1, kMaxSinks) && a.causal && in(a.sink_evicted, -kMaxSteps, kMaxSteps) &&
         readable(a.sink_q, bytes) && readable(a.sink_k, bytes) && readable(a.sink_v, bytes) &&
         aligned(a.sink_leftpad, 4) &&
         valid_strides(a.sink_q_stride, {a.batch, a.q_heads, a.q_len}, a.head_dim, a.dtype) &&
         valid_strides(a.sink_kv_stride, {a.batch, a.kv_heads, a.sinks}, a.head_dim, a.dtype);
}

bool valid_quantize(const kvattn_quantize_args &a) {
  return valid_dtype(a.dtype) && in(a.threads, 1, kMaxThreads) && valid_blocks(a) && in(a.blocks, 1, a.packed_blocks) &&
         in(a.slot, 0, a.packed_blocks - a.blocks) && readable(a.k, bytes_of(a.dtype)) &&
         readable(a.v, bytes_of(a.dtype)) &&
         valid_strides(a.k_stride, {a.batch, a.kv_heads, a.blocks * kPackedTokens}, a.head_dim, a.dtype) &&
         valid_strides(a.v_stride, {a.batch, a.kv_heads, a.blocks * kPackedTokens}, a.head_dim, a.dtype);
}

bool valid_linear(const kvattn_linear_args &a) {
  const bool known = valid_dtype(a.dtype) && (a.w_dtype == a.dtype || a.w_dtype == KVATTN_I8);
  if (!known || !in(a.threads, 1, kMaxThreads) || !in(a.weights, 1, KVATTN_MAX_WEIGHTS)) return false;
  if (!in(a.rows, 1, KVATTN_MAX_ROWS) || !in(a.in, 1, kMaxDim) || !readable(a.x, bytes_of(a.dtype))) return false;
  int64_t out = 0;
  for (int i = 0; i < a.weights; ++i) {
    const kvattn_weight &each = a.weight[i];
    if (!in(each.out, 1, kMaxDim) || !readable(each.w, a.w_dtype == KVATTN_I8 ? 1 : bytes_of(a.dtype))) return false;
    if (!valid_strides(&each.stride, {each.out}, a.in, a.dtype)) return false;
    out += each.out;
  }
  return readable(a.out, bytes_of(a.dtype)) && fits({a.rows, out, 4}, kMaxBytes) &&
         valid_strides(&a.x_stride, {a.rows}, a.in, a.dtype);
}

// Copies a token of each row and head, contiguous, to `slot`.
void store(const void *tokens, void *slot, const int64_t *stride, const kvattn_attend_args &a) {
  const int64_t bytes = bytes_of(a.dtype), row = a.head_dim * bytes;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t h = 0; h < a.kv_heads; ++h)
      std::memcpy(static_cast<char *>(slot) + (b * stride[0] + h * stride[1]) * bytes,
                  static_cast<const char *>(tokens) + (b * a.kv_heads + h) * row, row);
}

}  // namespace

extern "C" {

int kvattn_abi_version(void) { return KVATTN_ABI_VERSION; }
int64_t kvattn_sizeof_attend_args(void) { return sizeof(kvattn_attend_args); }
int64_t kvattn_sizeof_quantize_args(void) { return sizeof(kvattn_quantize_args); }
int64_t kvattn_sizeof_linear_args(void) { return sizeof(kvattn_linear_args); }

const char *kvattn_variant(void) { return variant().name; }

int kvattn_select(const char *name) {
  if (!name) return 1;
  for (const Variant &candidate : kVariants) {
    if (*name && std::strcmp(name, candidate.name) != 0) continue;
    if (!candidate.runs_here()) continue;
    chosen.store(&candidate, std::memory_order_relaxed);
    return 0;
  }
  return 1;
}

int kvattn_has_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

int kvattn_attend(const kvattn_attend_args *a) {
  const bool valid = a && valid_shapes(*a) && valid_packed(*a) && valid_ring(*a) && valid_requests(*a) &&
                     valid_tensors(*a) && valid_new(*a) && valid_sinks(*a);
  if (!valid) return KVATTN_BAD_ARGUMENT;
  if (a->k_new) {
    store(a->k_new, a->k_slot, a->k_stride, *a);
    store(a->v_new, a->v_slot, a->v_stride, *a);
  }
  try {
    variant().attend(a);
  } catch (const std::bad_alloc &) {
    return KVATTN_OUT_OF_MEMORY;
  }
  return KVATTN_OK;
}

int kvattn_quantize(const kvattn_quantize_args *a) {
  if (!a || !valid_quantize(*a)) return KVATTN_BAD_ARGUMENT;
  variant().quantize(a);
  return KVATTN_OK;
}

int kvattn_linear(const kvattn_linear_args *a) {
  if (!a || !valid_linear(*a)) return KVATTN_BAD_ARGUMENT;
  try {
    variant().linear(a);
  } catch (const std::bad_alloc &) {
    return KVATTN_OUT_OF_MEMORY;
  }
  return KVATTN_OK;
}

uint64_t kvattn_read_bytes(const void *data, int64_t bytes, int32_t threads) {
  if (!readable(data, 8) || !in(bytes, 0, kMaxBytes) || !in(threads, 1, kMaxThreads)) return 0;
  const uint64_t *words = static_cast<const uint64_t *>(data);
  int64_t count = bytes / 8;
  std::atomic<uint64_t> total{0};
  parallel(threads, [&](int thread, int team) {
    uint64_t sum[8] = {};
    int64_t from = count * thread / team, to = count * (thread + 1) / team;
    for (int64_t i = from; i + 8 <= to; i += 8)
      for (int j = 0; j < 8; ++j) sum[j] += words[i + j];
    for (uint64_t s : sum) total += s;
  });
  return total;
}

}  // extern "C"
