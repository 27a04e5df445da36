// What sources of CUDA kernels need to compile as ordinary C++ and to run on the emulated GPU (simt.cpp).
// Blocks are one-dimensional, shared memory is static arrays, lanes of a warp are 32. Each thread runs until
// it has to wait.
//
// Stricter than a GPU: __syncthreads() wants every thread of the block, those that returned too; a warp
// function wants every lane of its mask, with the same mask in the same function, and no shuffle may read a
// lane outside it.
#pragma once

#if defined(__CUDACC__)
#error "cuda_shim.h is for compilers that are not nvcc"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

// Threads instead of fibers: ThreadSanitizer then sees the races of a kernel.
#if defined(__SANITIZE_THREAD__) && !defined(FASTATTN_EMULATOR_THREADS)
#define FASTATTN_EMULATOR_THREADS 1
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __launch_bounds__(...)

namespace fastattn::emulator {

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// Queues a run of `body` in `stream` for each thread of each block; everything `body` captures must be a
// copy. Errors are found by runtime::last_error().
void launch(Dim3 grid, unsigned block_threads, void* stream, std::function<void()> body);

enum class WarpFunction { sync, shuffle, any, all, ballot };
// Waits for the lanes of `mask`. shuffle: the value of lane `source`; the others: of all values.
std::uint64_t warp_exchange(WarpFunction function, unsigned mask, std::uint64_t value, unsigned source);
unsigned warp_lane();

// Waits until `ready()`, which any thread may evaluate, at any time, some other thread's state in mind: it
// may look at shared memory and change it, but not at threadIdx. Nobody else is in a ready() or in
// atomically() meanwhile.
void wait_until(const std::function<bool()>& ready);
void atomically(const std::function<void()>& change);

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = warp_exchange(WarpFunction::shuffle, mask, bits, source);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace fastattn::emulator

// Variables that the scheduler sets when it resumes a fiber.
#if defined(FASTATTN_EMULATOR_THREADS)
extern constinit thread_local fastattn::emulator::Dim3 threadIdx, blockIdx;
#else
extern fastattn::emulator::Dim3 threadIdx, blockIdx;
#endif
extern fastattn::emulator::Dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

void __syncthreads();

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
    using namespace fastattn::emulator;
    warp_exchange(WarpFunction::sync, mask, 0, 0);
}

// As in CUDA, a shuffle that would leave the segment of `width` lanes gives the own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned w = static_cast<unsigned>(width), lane = fastattn::emulator::warp_lane();
    return fastattn::emulator::shuffle(mask, value, lane / w * w + static_cast<unsigned>(source) % w);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    const unsigned w = static_cast<unsigned>(width), lane = fastattn::emulator::warp_lane();
    const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
    return fastattn::emulator::shuffle(mask, value, source < (lane / w + 1) * w ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned w = static_cast<unsigned>(width), lane = fastattn::emulator::warp_lane();
    return fastattn::emulator::shuffle(mask, value, lane % w + delta < w ? lane + delta : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned w = static_cast<unsigned>(width), lane = fastattn::emulator::warp_lane();
    return fastattn::emulator::shuffle(mask, value, lane % w >= delta ? lane - delta : lane);
}
inline int __any_sync(unsigned mask, int predicate) {
    using namespace fastattn::emulator;
    return static_cast<int>(warp_exchange(WarpFunction::any, mask, predicate != 0, 0));
}
inline int __all_sync(unsigned mask, int predicate) {
    using namespace fastattn::emulator;
    return static_cast<int>(warp_exchange(WarpFunction::all, mask, predicate != 0, 0));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    using namespace fastattn::emulator;
    return static_cast<unsigned>(warp_exchange(WarpFunction::ballot, mask, predicate != 0, 0));
}

// Compile with -ffp-contract=off: these are the operations that nvcc must not fuse.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

template <class T>
T __ldg(const T* p) {
    return *p;
}
