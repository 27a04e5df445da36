// cpu-avx512: the algorithms for Avx512, register tiles of 6 rows and 4 vectors.
#include "cpu/isa_table.h"
#include "cpu/simd/vec_avx512.h"

namespace fastattn::cpu {

const IsaKernels& avx512_kernels() {
    static constexpr IsaKernels table = isa_table<Avx512, 6, 4>();
    return table;
}

}  // namespace fastattn::cpu
