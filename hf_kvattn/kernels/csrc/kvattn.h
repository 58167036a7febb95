// The C ABI of the native kernels. No PyTorch and no Python headers: loaded with ctypes, mirrored in kernels/native.py.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define KVATTN_API __declspec(dllexport)
#else
#define KVATTN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { KVATTN_ABI_VERSION = 9 };
enum kvattn_dtype { KVATTN_F32 = 0, KVATTN_F16 = 1, KVATTN_BF16 = 2, KVATTN_I8 = 3 };  // the last of weights alone
// Arguments are checked before anything is read or written: sizes, slots and strides from both sides, null and
// misaligned pointers. Whether the memory behind a pointer is as large as the sizes say, nobody can check here.
enum kvattn_status { KVATTN_OK = 0, KVATTN_BAD_ARGUMENT = 1, KVATTN_OUT_OF_MEMORY = 2 };

// Attention of Tq query tokens over Tk stored tokens. Query i has key position Tk - Tq + i. Key j is visible to it when
// leftpad[b] <= j, j <= position (causal) and j > position - window (window > 0). A query that sees nothing gets zeros.
//
// Quantized tokens: packed_len tokens from packed_start on are stored in blocks of 32 (layout: quant/layout.py). k and
// v hold the tokens before and after them, and Tk counts all. Packed arrays are contiguous, with room for packed_blocks
// blocks of each KV head. They may be a ring: block i is in slot (packed_slot + i) % packed_blocks.
//
// Rings: k and v may be one where nothing is packed. Token t of Tk is in slot (ring_slot + t) % ring_slots.
//
// Sinks: up to 64 tokens beside the keys, which Tk does not count, with queries of their own. Query i of row b sees the
// first sink_evicted + i - sink_leftpad[b] of them.
//
// Requests: where q_begin is given, `batch` requests of any lengths share q, out and lse, whose batch dimension is 1
// then. Request b has the query tokens [q_begin[b], q_begin[b + 1]) of Tq and the stored tokens [kv_begin[b],
// kv_begin[b + 1]); its last query stands at its last token. Stored token i lies in row kv_rows[i] of the Tk rows of k
// and v, or in row i where kv_rows is null. Nothing is packed then, and there are no rings, sinks and left padding.
//
// New tokens: where k_new is given, one token of each row is stored before the attention, at k_slot and v_slot. Those
// are places of k and v, with their strides of batch and head, and no others of the arrays here. k and v count it.
//
// Strides are in elements and not negative; the last dimension is contiguous. Slots at and beyond Tk are never read.
typedef struct {
  int32_t dtype;     // of q, k, v and out
  int32_t causal;    // 0 or 1
  int32_t threads;   // at most this many
  int32_t reserved;  // 0
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim;
  int64_t window;  // visible keys including the query's own; 0 = all
  float scale;
  float softcap;           // scores become softcap * tanh(score / softcap); 0 = off
  const void *q;           // (B, Hq, Tq, D)
  const void *k;           // (B, Hkv, Tk, D)
  const void *v;           // (B, Hkv, Tk, D)
  void *out;               // (B, Tq, Hq, D), contiguous
  const void *k_new;       // (B, Hkv, D), contiguous; null with the next three: nothing is stored
  const void *v_new;       // (B, Hkv, D), contiguous
  void *k_slot;            // (B, Hkv, D)
  void *v_slot;            // (B, Hkv, D)
  const int32_t *leftpad;  // (B), first visible key of each row, any number; null = 0
  float *lse;              // (B, Hq, Tq), natural log-sum-exp of the scores, -inf for an empty row; may be null
  int64_t q_stride[3];     // batch, head, token
  int64_t k_stride[3];
  int64_t v_stride[3];
  int64_t ring_slots, ring_slot;  // both 0: no ring
  int64_t sinks, sink_evicted;
  const void *sink_q;           // (B, Hq, Tq, D)
  const void *sink_k;           // (B, Hkv, sinks, D)
  const void *sink_v;           // (B, Hkv, sinks, D)
  const int32_t *sink_leftpad;  // (B), null = 0
  int64_t sink_q_stride[3];
  int64_t sink_kv_stride[3];  // of both
  const int32_t *q_begin;     // (batch + 1), from 0 to Tq, not falling; null: no requests
  const int32_t *kv_begin;    // (batch + 1), from 0 on; no request has fewer tokens than queries
  const int64_t *kv_rows;     // (kv_begin[batch]), may be null
  int64_t packed_start, packed_len, packed_blocks;
  int64_t packed_slot;              // even; 0 where packed_blocks is odd
  int64_t v_group;                  // channels that share a value scale
  int64_t v_rotation;               // packed values are rotated by a Hadamard matrix of this size; 1 = not rotated
  int32_t k_bits, v_bits;           // 8: signed, with 128 added. 4, 3 or 2: quant/few_bits.py; of keys on average
  const uint8_t *k_codes;           // (B, Hkv, blocks, 4 * k_bits * D); D is a multiple of 16
  const void *k_scale;              // (B, Hkv, blocks, D), bf16; below 8 bits (B, Hkv, blocks, 3 * D / 4) bytes
  const float *k_mean;              // (B, Hkv, D), added to every packed key
  const uint16_t *k_step, *k_unit;  // (B, Hkv, D), bf16, in the order of the codes; null for 8 bits with the next two
  const int16_t *k_order;           // (B, Hkv, D), the channel of each code: a permutation
  const uint8_t *k_widths;          // (B, Hkv, D / 16), 0 to 7, falling, k_bits on average
  const uint8_t *v_codes;           // (B, Hkv, blocks, 4 * v_bits * D)
  const void *v_scale;              // (B, Hkv, blocks, D / v_group, 32), bf16; below 8 bits bytes
} kvattn_attend_args;

// Quantizes whole blocks of 32 tokens of finite numbers into the slots from `slot` on. Arrays as in kvattn_attend_args.
typedef struct {
  int32_t dtype;           // of k and v
  int32_t threads;         // at most this many
  int32_t k_bits, v_bits;  // 8, 4, 3 or 2
  int64_t batch, kv_heads, blocks, head_dim, v_group, v_rotation;
  int64_t packed_blocks, slot;
  const void *k;        // (B, Hkv, 32 * blocks, D)
  const void *v;        // (B, Hkv, 32 * blocks, D)
  int64_t k_stride[3];  // batch, head, token
  int64_t v_stride[3];
  uint8_t *k_codes;
  void *k_scale;
  const float *k_mean;
  const uint16_t *k_step, *k_unit;
  const int16_t *k_order;
  const uint8_t *k_widths;
  uint8_t *v_codes;
  void *v_scale;
} kvattn_quantize_args;

// The weights (out, in) of a linear layer, rows `stride` elements apart, each side by side.
typedef struct {
  const void *w;
  int64_t out, stride;
} kvattn_weight;

enum { KVATTN_MAX_ROWS = 32, KVATTN_MAX_WEIGHTS = 4 };

// Products of a few rows x with up to four weight matrices: out[r] is x[r] times each, one after the other.
typedef struct {
  int32_t dtype;    // of x and out
  int32_t w_dtype;  // the same, or KVATTN_I8
  int32_t threads;  // at most this many
  int32_t weights;
  int64_t rows, in;
  int64_t x_stride;
  const void *x;  // (rows, in)
  void *out;      // (rows, sum of `out`), contiguous
  kvattn_weight weight[KVATTN_MAX_WEIGHTS];
} kvattn_linear_args;

KVATTN_API int kvattn_abi_version(void);
// Sizes of the structs in bytes, for callers that mirror them by hand.
KVATTN_API int64_t kvattn_sizeof_attend_args(void);
KVATTN_API int64_t kvattn_sizeof_quantize_args(void);
KVATTN_API int64_t kvattn_sizeof_linear_args(void);
// Name of the SIMD variant in use: chosen from the CPU's features at the first call.
KVATTN_API const char *kvattn_variant(void);
// Forces a variant (kvattn.cpp lists them; "" = best). Returns 0, or 1 if this CPU lacks it.
KVATTN_API int kvattn_select(const char *name);
// Whether the kernels were built with OpenMP.
KVATTN_API int kvattn_has_openmp(void);
KVATTN_API int kvattn_attend(const kvattn_attend_args *args);
KVATTN_API int kvattn_quantize(const kvattn_quantize_args *args);
KVATTN_API int kvattn_linear(const kvattn_linear_args *args);
// Reads all bytes with `threads` threads and sums them, to measure the read bandwidth; 0 for bad arguments.
KVATTN_API uint64_t kvattn_read_bytes(const void *data, int64_t bytes, int32_t threads);

#ifdef __cplusplus
}
#endif
