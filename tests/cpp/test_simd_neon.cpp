#include "cpu/simd/vec_neon.h"
#include "simd_tests.h"

FASTATTN_SIMD_TESTS(Neon, 6, 4)
