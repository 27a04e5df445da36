#include "cpu/simd/vec_avx512.h"
#include "simd_tests.h"

FASTATTN_SIMD_TESTS(Avx512, 6, 4)
