// Launches of kernels as nvcc writes them, and as the emulated GPU takes them.
#pragma once

#include "cuda/simt/arguments.h"
#include "cuda/simt/device.h"

// Dynamic shared memory of a kernel, 1024-byte aligned.
#if defined(__CUDACC__)
#define FASTATTN_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define FASTATTN_LAUNCH_SHARED(kernel, blocks, threads, bytes, stream, args) \
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, static_cast<cudaStream_t>(stream)>>>(args)
#else
#define FASTATTN_DYNAMIC_SHARED(name) alignas(1024) static unsigned char name[228 << 10]
#define FASTATTN_LAUNCH_SHARED(kernel, blocks, threads, bytes, stream, args)                        \
    emulator::launch({static_cast<unsigned>(blocks), 1, 1}, static_cast<unsigned>(threads), stream, \
                     std::function<void()>([copied = args] { kernel(copied); }))
#endif
#define FASTATTN_LAUNCH(kernel, blocks, threads, stream, args) \
    FASTATTN_LAUNCH_SHARED(kernel, blocks, threads, 0, stream, args)

namespace fastattn::cuda {
namespace {

[[maybe_unused]] constexpr std::int64_t kWarpKeys =
    1024;  // rows up to this are a warp's work, longer ones a block's

// Calls f with null pointers that carry the storage type and the accumulator.
template <class F>
void with_types(DType dtype, F f) {
    switch (dtype) {
        case DType::f64: return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
        case DType::f32: return f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
        case DType::f16: return f(static_cast<F16*>(nullptr), static_cast<float*>(nullptr));
        case DType::bf16: return f(static_cast<BF16*>(nullptr), static_cast<float*>(nullptr));
        default: return;
    }
}

// More than 48 KiB of shared memory are to be asked for.
[[maybe_unused]] inline int allow_shared_memory([[maybe_unused]] const void* kernel,
                                                [[maybe_unused]] int bytes) {
#if defined(__CUDACC__)
    return static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
#else
    return 0;
#endif
}

}  // namespace
}  // namespace fastattn::cuda
