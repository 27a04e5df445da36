// The CUDA room of a build without CUDA: the same symbols, an empty table.
#include "core/kernel.h"

namespace fastattn {

std::span<const Kernel> cuda_kernels() { return {}; }

const char* cuda_unavailable() { return "this build of fastattn has no CUDA kernels"; }

}  // namespace fastattn
