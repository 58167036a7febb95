// Entry points: checks, and the choice of a SIMD variant.
#include "kvattn.h"

#include <atomic>
#include <cstring>
#include <new>

#include "parallel.h"

// Defined in variant.cpp, which CMake compiles once for each variant.
#define KVATTN_DECLARE(variant)                             \
  void kvattn_attend_##variant(const kvattn_attend_args *); \
  void kvattn_quantize_##variant(const kvattn_quantize_args *);
KVATTN_DECLARE(portable)
#ifdef KVATTN_X86
KVATTN_DECLARE(avx2)
KVATTN_DECLARE(avx512)
KVATTN_DECLARE(avx512_bf16)
#endif

namespace {

struct Variant {
  const char *name;
  bool (*runs_here)();
  void (*attend)(const kvattn_attend_args *);
  void (*quantize)(const kvattn_quantize_args *);
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

const Variant kVariants[] = {
#ifdef KVATTN_X86
    {"avx512_bf16", has_avx512_bf16, kvattn_attend_avx512_bf16, kvattn_quantize_avx512_bf16},
    {"avx512", has_avx512, kvattn_attend_avx512, kvattn_quantize_avx512},
    {"avx2", has_avx2, kvattn_attend_avx2, kvattn_quantize_avx2},
#endif
    {"portable", [] { return true; }, kvattn_attend_portable, kvattn_quantize_portable},
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

constexpr int64_t kMaxPackedDim = 512, kMaxSinks = 64, kPackedTokens = 32;

bool valid_dtype(int dtype) { return dtype >= KVATTN_F32 && dtype <= KVATTN_BF16; }
bool readable_bits(int bits) { return bits == 8 || bits == 4 || bits == 3 || bits == 2; }
// Codes of 8 bits are written without zero points, codes of 4 bits with them.
bool writable_bits(int bits, const uint16_t *zero) { return bits == 8 ? !zero : bits == 4 && zero; }

bool valid_groups(int64_t head_dim, int64_t v_group, int64_t v_rotation) {
  return head_dim <= kMaxPackedDim && v_group >= 16 && v_group % 16 == 0 && head_dim % v_group == 0 &&
         v_rotation >= 1 && (v_rotation & (v_rotation - 1)) == 0 && head_dim % v_rotation == 0;
}

bool valid_shapes(const kvattn_attend_args &a) {
  return valid_dtype(a.dtype) && a.threads >= 1 && a.batch >= 1 && a.kv_heads >= 1 && a.q_heads >= 1 &&
         a.q_heads % a.kv_heads == 0 && a.q_len >= 1 && a.kv_len >= a.q_len && a.head_dim >= 1 && a.window >= 0;
}

bool valid_tensors(const kvattn_attend_args &a) {
  const bool all_packed = a.packed_len > 0 && a.packed_len == a.kv_len;  // then k and v are empty
  return a.q && a.out && ((a.k && a.v) || all_packed);
}

bool valid_packed(const kvattn_attend_args &a) {
  if (a.packed_len == 0) return true;
  const bool tokens = a.packed_len > 0 && a.packed_len % kPackedTokens == 0 && a.packed_start >= 0 &&
                      a.packed_start <= kPackedTokens && a.packed_start + a.packed_len <= a.kv_len &&
                      a.packed_blocks * kPackedTokens >= a.packed_len;
  const bool slot = a.packed_slot >= 0 && a.packed_slot < a.packed_blocks && a.packed_slot % 2 == 0 &&
                    (a.packed_slot == 0 || a.packed_blocks % 2 == 0);
  const bool codes =
      readable_bits(a.k_bits) && readable_bits(a.v_bits) && valid_groups(a.head_dim, a.v_group, a.v_rotation);
  return tokens && slot && codes && a.k_codes && a.k_scale && a.k_mean && a.v_codes && a.v_scale;
}

bool valid_ring(const kvattn_attend_args &a) {
  if (a.ring_slots == 0) return true;
  return a.packed_len == 0 && a.ring_slots >= a.kv_len && a.ring_slot >= 0 && a.ring_slot < a.ring_slots;
}

bool valid_sinks(const kvattn_attend_args &a) {
  if (a.sinks == 0) return true;
  return a.sinks > 0 && a.sinks <= kMaxSinks && a.causal && a.sink_q && a.sink_k && a.sink_v;
}

bool valid_quantize(const kvattn_quantize_args &a) {
  const bool shapes = valid_dtype(a.dtype) && a.threads >= 1 && a.batch >= 1 && a.kv_heads >= 1 && a.blocks >= 1 &&
                      a.head_dim >= 16 && a.head_dim % 16 == 0 && a.slot >= 0 && a.slot + a.blocks <= a.packed_blocks;
  const bool codes = writable_bits(a.k_bits, a.k_zero) && writable_bits(a.v_bits, a.v_zero) &&
                     valid_groups(a.head_dim, a.v_group, a.v_rotation);
  return shapes && codes && a.k && a.v && a.k_codes && a.k_scale && a.k_mean && a.v_codes && a.v_scale;
}

}  // namespace

extern "C" {

int kvattn_abi_version(void) { return KVATTN_ABI_VERSION; }
int64_t kvattn_sizeof_attend_args(void) { return sizeof(kvattn_attend_args); }
int64_t kvattn_sizeof_quantize_args(void) { return sizeof(kvattn_quantize_args); }

const char *kvattn_variant(void) { return variant().name; }

int kvattn_select(const char *name) {
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
  const bool valid =
      a && valid_shapes(*a) && valid_tensors(*a) && valid_packed(*a) && valid_ring(*a) && valid_sinks(*a);
  if (!valid) return KVATTN_BAD_ARGUMENT;
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

uint64_t kvattn_read_bytes(const void *data, int64_t bytes, int32_t threads) {
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
