// What Hopper (sm_90a) has for matrix products and copies, behind names: barriers in shared memory, the copy
// engine (TMA), asynchronous products of a warp group (wgmma), registers that pass from one warp group to
// another. PTX ISA, sections "mbarrier", "cp.async.bulk.tensor", "Asynchronous Warpgroup Level Matrix
// Instructions" and "setmaxnreg". hopper_layout.h says how tiles lie. The emulated GPU has the same names in
// tests/cuda_emulator/hopper_shim.h.
#pragma once

#include "cuda/fused/sm90/hopper_layout.h"
#include "cuda/fused/tensor_core.h"
#include "cuda/simt/tile_map.h"

#if !defined(__CUDACC__)
#include "hopper_shim.h"
#else

namespace fastattn::cuda {
namespace {

// Code for what is not sm_90a is compiled, and empty: the host does not come there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTATTN_HAS_WGMMA 1
#else
#define FASTATTN_HAS_WGMMA 0
#endif

inline constexpr int kWarpGroup = 128;  // threads

__device__ __forceinline__ std::uint32_t shared_address(const void* data) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(data));
}
// First thing in a kernel: the block's dynamic shared memory, which begins at a multiple of 1024.
__device__ __forceinline__ void begin_shared(const void* data) {
    if (shared_address(data) % kSwizzleBytes != 0) __trap();
}

// ---- barriers in shared memory ----------------------------------------------------------------------------
// A phase of a barrier is over when `count` threads have arrived and all bytes that were expected are there;
// phases have parity 0, 1, 0, ...
struct Barrier {
    std::uint64_t state;
};

__device__ __forceinline__ void init_barrier(Barrier* barrier, int count) {
#if FASTATTN_HAS_WGMMA
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count));
#endif
}

// After all init_barrier() and before __syncthreads(): the copy engine sees them too.
__device__ __forceinline__ void publish_barriers() {
#if FASTATTN_HAS_WGMMA
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
#if FASTATTN_HAS_WGMMA
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives, and makes the phase wait for `bytes` of copies.
__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, int bytes) {
#if FASTATTN_HAS_WGMMA
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
#endif
}

// Returns when the latest phase of this parity is over; of a new barrier, that of parity 1 is.
__device__ __forceinline__ void wait(Barrier* barrier, int parity) {
#if FASTATTN_HAS_WGMMA
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// ---- barriers of warp groups, 1 to 15; `threads` of those that wait and those that only arrive ------------
__device__ __forceinline__ void wait_named(int id, int threads) {
#if FASTATTN_HAS_WGMMA
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}
__device__ __forceinline__ void arrive_named(int id, int threads) {
#if FASTATTN_HAS_WGMMA
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- copies -----------------------------------------------------------------------------------------------
// One thread: the box at (column, row, head, batch) into shared memory; its bytes count towards `barrier`.
__device__ __forceinline__ void copy_box(void* target, const TensorMap* map, int column, int row, int head,
                                         int batch, Barrier* barrier) {
#if FASTATTN_HAS_WGMMA
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], "
        "[%2];\n" ::"r"(shared_address(target)),
        "l"(reinterpret_cast<std::uint64_t>(map)), "r"(shared_address(barrier)), "r"(column), "r"(row),
        "r"(head), "r"(batch)
        : "memory");
#endif
}

// What this thread wrote to shared memory is seen by wgmma.
__device__ __forceinline__ void publish_to_products() {
#if FASTATTN_HAS_WGMMA
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// ---- registers --------------------------------------------------------------------------------------------
// All threads of a warp group: its registers for each thread become fewer or more, a multiple of 8.
template <int count>
__device__ __forceinline__ void shrink_registers() {
#if FASTATTN_HAS_WGMMA
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(count));
#endif
}
template <int count>
__device__ __forceinline__ void grow_registers() {
#if FASTATTN_HAS_WGMMA
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(count));
#endif
}

// ---- products ---------------------------------------------------------------------------------------------
// c (64, 8 nt) of a warp group in f32, warp w of it rows 16 w .. 16 w + 15, laid out as those of
// multiply_add() in tensor_core.h. All threads of the group call; accumulators and operands are not to be
// touched until wait_products().

// Before the first product, and before one whose accumulators or register operands were written since.
__device__ __forceinline__ void begin_products() {
#if FASTATTN_HAS_WGMMA
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
// The products so far form a group.
__device__ __forceinline__ void commit_products() {
#if FASTATTN_HAS_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}
// Waits until at most `pending` of the latest groups are under way.
template <int pending>
__device__ __forceinline__ void wait_products() {
#if FASTATTN_HAS_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
#endif
}
// The compiler must not move reads and writes of accumulators over this point: it does not know that products
// are under way.
template <int nt>
__device__ __forceinline__ void pin(float (&c)[nt][4]) {
    FASTATTN_UNROLL
    for (int j = 0; j < nt; ++j) {
        FASTATTN_UNROLL
        for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[j][e])::"memory");
    }
}

// Operand lists of the instructions: accumulators of 8 columns are four registers.
#define FASTATTN_C1(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define FASTATTN_C2(j) FASTATTN_C1(j), FASTATTN_C1(j + 1)
#define FASTATTN_C8(j) FASTATTN_C2(j), FASTATTN_C2(j + 2), FASTATTN_C2(j + 4), FASTATTN_C2(j + 6)
#define FASTATTN_SUMS8 FASTATTN_C8(0)
#define FASTATTN_SUMS10 FASTATTN_C8(0), FASTATTN_C2(8)
#define FASTATTN_SUMS16 FASTATTN_C8(0), FASTATTN_C8(8)
#define FASTATTN_SUMS22 FASTATTN_SUMS16, FASTATTN_C2(16), FASTATTN_C2(18), FASTATTN_C2(20)
#define FASTATTN_SUMS32 FASTATTN_SUMS16, FASTATTN_C8(16), FASTATTN_C8(24)
#define FASTATTN_NAMES8                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_NAMES10                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39"
#define FASTATTN_NAMES16                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_NAMES22                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87"
#define FASTATTN_NAMES32                                                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Both operands in shared memory, the inner dimension of both within their rows: c = a b, or c += a b.
#define FASTATTN_WGMMA_SS(columns, type, names, accumulators, a, b, adds)                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #adds                                                 \
                 ", 0;\n"                                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, %" #a \
                 ", %" #b ", p, 1, 1, 0, 0;\n}\n"                                                           \
                 : accumulators                                                                             \
                 : "l"(a_rows), "l"(b_rows), "r"(add))
// The left operand in registers as that of multiply_add(), the right one transposed: c += a b.
#define FASTATTN_WGMMA_RS(columns, type, names, accumulators, a0, a1, a2, a3, b)                     \
    asm volatile(                                                                                    \
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                   \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, {%" #a0 \
        ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, 1;\n}\n"                                 \
        : accumulators                                                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_columns))
#define FASTATTN_WGMMA_OF(T, instruction, columns, nt, ...)                               \
    if constexpr (std::is_same_v<T, F16>) {                                               \
        instruction(columns, "f16", FASTATTN_NAMES##nt, FASTATTN_SUMS##nt, __VA_ARGS__);  \
    } else {                                                                              \
        instruction(columns, "bf16", FASTATTN_NAMES##nt, FASTATTN_SUMS##nt, __VA_ARGS__); \
    }

// add: 0 or 1.
template <class T, int nt>
__device__ __forceinline__ void multiply_rows([[maybe_unused]] float (&c)[nt][4],
                                              [[maybe_unused]] std::uint64_t a_rows,
                                              [[maybe_unused]] std::uint64_t b_rows,
                                              [[maybe_unused]] int add) {
    static_assert(nt == 10 || nt == 16 || nt == 22, "add the instruction's width here");
#if FASTATTN_HAS_WGMMA
    if constexpr (nt == 10) {
        FASTATTN_WGMMA_OF(T, FASTATTN_WGMMA_SS, 80, 10, 40, 41, 42)
    } else if constexpr (nt == 16) {
        FASTATTN_WGMMA_OF(T, FASTATTN_WGMMA_SS, 128, 16, 64, 65, 66)
    } else {
        FASTATTN_WGMMA_OF(T, FASTATTN_WGMMA_SS, 176, 22, 88, 89, 90)
    }
#endif
}

template <class T, int nt>
__device__ __forceinline__ void multiply_columns([[maybe_unused]] float (&c)[nt][4],
                                                 [[maybe_unused]] const std::uint32_t (&a)[4],
                                                 [[maybe_unused]] std::uint64_t b_columns) {
    static_assert(nt == 8 || nt == 16 || nt == 32, "add the instruction's width here");
#if FASTATTN_HAS_WGMMA
    if constexpr (nt == 8) {
        FASTATTN_WGMMA_OF(T, FASTATTN_WGMMA_RS, 64, 8, 32, 33, 34, 35, 36)
    } else if constexpr (nt == 16) {
        FASTATTN_WGMMA_OF(T, FASTATTN_WGMMA_RS, 128, 16, 64, 65, 66, 67, 68)
    } else {
        FASTATTN_WGMMA_OF(T, FASTATTN_WGMMA_RS, 256, 32, 128, 129, 130, 131, 132)
    }
#endif
}

}  // namespace
}  // namespace fastattn::cuda

#endif  // __CUDACC__
