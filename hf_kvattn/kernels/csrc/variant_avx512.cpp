#include "simd_avx512.h"
// After the vector type it is written over.
#include "attend.h"

KVATTN_DEFINE_VARIANT(avx512)
