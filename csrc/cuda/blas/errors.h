// Error codes of CUDA and cuBLAS as exceptions. Every call's status goes through here.
#pragma once

#include <cstddef>

#include "cuda/blas/abi.h"

namespace fastattn::cuda {

// 0 passes; else OutOfMemory (with `bytes`, where memory was asked for) or CudaError, naming what was attempted.
void throw_on_error(int code, const char* attempted, std::size_t bytes = 0);
void throw_on_status(const cublas::Table& table, cublas::Status status, const char* attempted);

}  // namespace fastattn::cuda
