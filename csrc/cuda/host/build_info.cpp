#include "cuda/host/build_info.h"

namespace fastattn::cuda {

const char* build_info() noexcept { return FASTATTN_CUDA_BUILD; }

}  // namespace fastattn::cuda
