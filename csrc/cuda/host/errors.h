// Error codes of CUDA as exceptions. Every call's status goes through here.
#pragma once

#include <cstddef>

namespace fastattn::cuda {

// 0 passes; else OutOfMemory (with `bytes`, where memory was asked for) or CudaError, naming what was
// attempted.
void throw_on_error(int code, const char* attempted, std::size_t bytes = 0);

}  // namespace fastattn::cuda
