// cpu-scalar: the algorithms for Scalar, register tiles of 4 rows and 2 vectors.
#include "cpu/isa_table.h"
#include "cpu/simd/vec.h"

namespace fastattn::cpu {

const IsaKernels& scalar_kernels() {
    static constexpr IsaKernels table = isa_table<Scalar, 4, 2>();
    return table;
}

}  // namespace fastattn::cpu
