// cuBLASLt of this process: why there is none, and the products of each device.
#pragma once

#include "cuda/blas/gemm.h"
#include "cuda/host/context.h"

namespace fastattn::cuda::cublas {

// Why the library cannot be opened, or nullptr. Thread-safe. A library that was opened stays; one that is
// missing is looked for again at the next question, as another may have been offered.
const char* missing() noexcept;
// Without looking for it.
bool is_open() noexcept;
// The plans of a device, made at the first call; throws UnsupportedError or CudaError.
GemmPlans& plans_of(const DeviceContext& device);

}  // namespace fastattn::cuda::cublas
