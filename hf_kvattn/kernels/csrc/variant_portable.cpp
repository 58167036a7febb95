#include "simd_portable.h"
// After the vector type it is written over.
#include "attend.h"

KVATTN_DEFINE_VARIANT(portable)
