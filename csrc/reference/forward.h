// `cpu-reference`: attention written down as the formulas say, in double. It supports everything, it
// is the last row of the CPU table, and the fast kernels are tested against it.
#pragma once

#include "core/kernel.h"

namespace fastattn {

extern const Kernel cpu_reference_kernel;

}  // namespace fastattn
