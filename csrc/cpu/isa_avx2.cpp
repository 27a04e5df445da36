// cpu-avx2: the algorithms for Avx2, register tiles of 6 rows and 2 vectors.
#include "cpu/isa_table.h"
#include "cpu/simd/vec_avx2.h"

namespace fastattn::cpu {

const IsaKernels& avx2_kernels() {
    static constexpr IsaKernels table = isa_table<Avx2, 6, 2>();
    return table;
}

}  // namespace fastattn::cpu
