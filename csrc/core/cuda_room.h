// What the bindings ask of the CUDA room beside its kernels; no_cuda.cpp answers where there is none.
#pragma once

#include <cstddef>
#include <memory>

#include <fastattn/tensor_view.h>

namespace fastattn {

// What the build decided about CUDA: toolkit and architectures, or why it has no kernels.
const char* cuda_build();

// Whether devices are there but cuBLAS is not open yet, so that cuda_offer_library() would help.
bool cuda_needs_library();
void cuda_offer_library(const char* path);

// A stream of ours on the device, for arrays of libraries that do not say theirs.
void* cuda_own_stream(int device);
// Returns when all that was queued in the stream is done; throws CudaError.
void cuda_wait(int device, void* stream);
// Memory for a result; freed when nothing on the device uses it any more. Throws OutOfMemory.
std::shared_ptr<std::byte> cuda_allocate(int device, std::size_t bytes, const char* what_for);

}  // namespace fastattn
