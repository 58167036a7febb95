// One SIMD variant of the kernels. CMake compiles this file once for each row of its table, with these definitions:
// KVATTN_VARIANT, the variant's name, and KVATTN_SIMD, the header of its vector type.
#include KVATTN_SIMD
// After the vector type that it is written over.
#include "attend.h"
#include "linear.h"

#define KVATTN_JOIN(prefix, variant) prefix##_##variant
#define KVATTN_NAME(prefix, variant) KVATTN_JOIN(prefix, variant)  // expands `variant` first

void KVATTN_NAME(kvattn_attend, KVATTN_VARIANT)(const kvattn_attend_args *a) {
  switch (a->dtype) {
    case KVATTN_F32: Attend<float>(*a).run(); break;
    case KVATTN_F16: Attend<f16_t>(*a).run(); break;
    case KVATTN_BF16: Attend<bf16_t>(*a).run(); break;
  }
}

void KVATTN_NAME(kvattn_quantize, KVATTN_VARIANT)(const kvattn_quantize_args *a) {
  switch (a->dtype) {
    case KVATTN_F32: quantize_all<float>(*a); break;
    case KVATTN_F16: quantize_all<f16_t>(*a); break;
    case KVATTN_BF16: quantize_all<bf16_t>(*a); break;
  }
}

void KVATTN_NAME(kvattn_linear, KVATTN_VARIANT)(const kvattn_linear_args *a) {
  switch (a->dtype) {
    case KVATTN_F32: linear<float>(*a); break;
    case KVATTN_F16: linear<f16_t>(*a); break;
    case KVATTN_BF16: linear<bf16_t>(*a); break;
  }
}
