#include "cpu/simd/vec_avx2.h"
#include "simd_tests.h"

FASTATTN_SIMD_TESTS(Avx2, 6, 2)
