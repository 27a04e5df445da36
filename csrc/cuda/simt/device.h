// What every SIMT kernel here stands on: nvcc's names, or the emulator's of tests/cuda_emulator when a C++
// compiler reads the same source; 16-bit floats; and groups of threads that share one row.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTATTN_UNROLL _Pragma("unroll")
#define FASTATTN_UNROLL_LITTLE _Pragma("unroll 2")
#define FASTATTN_UNROLL_LOADS _Pragma("unroll 8")
#else
#include "cuda_shim.h"
#define FASTATTN_UNROLL
#define FASTATTN_UNROLL_LITTLE
#define FASTATTN_UNROLL_LOADS
#endif

#include "core/half.h"
#include "core/ieee_arithmetic.h"

namespace fastattn::cuda {
namespace {

using Index = std::int64_t;

// ---- storage types ----------------------------------------------------------------------------------
struct F16 {
    std::uint16_t bits;
};
struct BF16 {
    std::uint16_t bits;
};

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(F16 x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x.bits));
#else
    return f16_to_f32(x.bits);
#endif
}
__device__ __forceinline__ float widen(BF16 x) { return bf16_to_f32(x.bits); }

__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(float x, F16& to) {
#if defined(__CUDA_ARCH__)
    to.bits = __half_as_ushort(__float2half_rn(x));
#else
    to.bits = f32_to_f16(x);
#endif
}
__device__ __forceinline__ void narrow(float x, BF16& to) {
#if defined(__CUDA_ARCH__)
    to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    to.bits = f32_to_bf16(x);
#endif
}

// Four neighbours, moved as one: 16 bytes of float, 8 of a 16-bit type.
template <class T>
struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) Quad {
    T at[4];
};

// ---- arithmetic: what must not be fused, and what must be -------------------------------------------------
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double plus(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // a b + c
__device__ __forceinline__ float larger(float a, float b) {
    return fmaxf(a, b);
}  // of a NaN and a number, the number
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float power2(float x) { return exp2f(x); }
__device__ __forceinline__ double power2(double x) { return exp2(x); }

// NaN where one is.
__device__ __forceinline__ float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
#else
    return a > b || a != a ? a : b;
#endif
}

// 2^x for x <= 127 without the unit for exponentials, which has a quarter of the multipliers' rate (as in
// Cody and Waite 1980): 2^x is 2^n 2^f with n the nearest integer, and the polynomial, whose largest relative
// error on [-1/2, 1/2] is the least possible, 2.7e-6. Below 2^-126: 0.
__device__ __forceinline__ float power2_by_polynomial(float x) {
    x = larger_or_nan(x, -127.0f);
    constexpr float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23: the sum's last bits are n + 127
    const float biased = plus(x, shift);
    const float f = plus(x, -plus(biased, -shift));
    float sum = fused(f, 0.009570101276040077f, 0.05591785907745361f);
    sum = fused(f, sum, 0.240247443318367f);
    sum = fused(f, sum, 0.6931217908859253f);
    sum = fused(f, sum, 0.9999992847442627f);
#if defined(__CUDA_ARCH__)
    return times(sum, __uint_as_float(__float_as_uint(biased) << 23));
#else
    return times(sum, std::bit_cast<float>(std::bit_cast<std::uint32_t>(biased) << 23));
#endif
}

template <class Acc>
__device__ __forceinline__ Acc infinity() {
    return static_cast<Acc>(HUGE_VAL);
}

// ---- threads that share one row: a warp, or a whole block ------------------------------------------------
template <int threads>
struct Group {
    static_assert(threads == 32 || (threads % 32 == 0 && threads <= 1024));
    static constexpr int kThreads = threads;

    __device__ static __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % threads; }

    __device__ static __forceinline__ void sync() {
        if constexpr (threads == 32) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }

    // The combination of all threads' x, the same bits in every thread. All threads take part.
    template <class Acc, class Combine>
    __device__ static __forceinline__ Acc reduce(Acc x, Combine combine) {
        FASTATTN_UNROLL
        for (int step = 16; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
        if constexpr (threads > 32) {
            __shared__ Acc partial[threads / 32];
            const int warp = static_cast<int>(threadIdx.x) / 32;
            if (threadIdx.x % 32 == 0) partial[warp] = x;
            __syncthreads();
            x = partial[0];
            for (int w = 1; w < threads / 32; ++w) x = combine(x, partial[w]);
            __syncthreads();  // before the next reduction writes
        }
        return x;
    }
};

}  // namespace
}  // namespace fastattn::cuda
