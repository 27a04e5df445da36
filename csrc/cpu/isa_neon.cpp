// cpu-neon: the algorithms for Neon, register tiles of 6 rows and 4 vectors.
#include "cpu/isa_table.h"
#include "cpu/simd/vec_neon.h"

namespace fastattn::cpu {

const IsaKernels& neon_kernels() {
    static constexpr IsaKernels table = isa_table<Neon, 6, 4>();
    return table;
}

}  // namespace fastattn::cpu
