#include "cpu/simd/vec.h"
#include "simd_tests.h"

FASTATTN_SIMD_TESTS(Scalar, 4, 2)
