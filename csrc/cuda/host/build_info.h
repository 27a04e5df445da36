// What the build decided about CUDA.
#pragma once

namespace fastattn::cuda {

// "CUDA 13.0, sm_75 ... compute_120", or why this build has no CUDA kernels (cmake/cuda.cmake).
const char* build_info() noexcept;

}  // namespace fastattn::cuda
