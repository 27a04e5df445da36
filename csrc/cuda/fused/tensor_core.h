// Tensor-core and asynchronous-copy instructions of Ampere (sm_80 and newer) behind names, and what they do
// in plain C++ for the emulated GPU: layouts as in the PTX ISA, sections "Matrix fragments for mma.m16n8k16"
// and "ldmatrix".
//
// g = lane / 4, t = lane % 4 throughout.
#pragma once

#include "cuda/simt/device.h"

#if !defined(__CUDACC__)
#include <deque>
#include <vector>
#endif

namespace fastattn::cuda {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define FASTATTN_HAS_MMA 1
#else
#define FASTATTN_HAS_MMA 0
#endif

#if !defined(__CUDACC__)
// A warp's instruction: every lane lays down its operands, all read what they need.
template <class T>
struct WarpBoard {
    T at[32];
};
template <class T>
WarpBoard<T>& warp_board() {
    static WarpBoard<T> boards[32];
    return boards[threadIdx.x / 32];
}
template <class T, class F>
void exchange(const T& mine, F read) {
    WarpBoard<T>& board = warp_board<T>();
    board.at[threadIdx.x % 32] = mine;
    __syncwarp();
    read(board.at);
    __syncwarp();
}
#endif

// ---- asynchronous copies to shared memory -----------------------------------------------------------------
#if !defined(__CUDACC__)
// A thread's copies, group by group; the last group is open. Nothing is copied before somebody waits for it:
// the latest that the rules allow.
struct CopyQueue {
    struct Item {
        void* target;
        const void* source;
        bool valid;
    };
    std::deque<std::vector<Item>> groups{1};

    void finish_first() {
        for (const Item& item : groups.front()) {
            std::memset(item.target, 0, 16);
            if (item.valid) std::memcpy(item.target, item.source, 16);
        }
        groups.pop_front();
    }
};
inline CopyQueue& copy_queue() {
    static CopyQueue queues[1024];
    return queues[threadIdx.x];
}
#endif

// First thing in a kernel that copies.
__device__ __forceinline__ void begin_copies() {
#if !defined(__CUDACC__)
    copy_queue() = {};  // what the same thread of another block left
#endif
}

// 16 bytes, both addresses multiples of 16; zeros where not valid, and `source` is not read.
__device__ __forceinline__ void copy_async(void* target, const void* source, bool valid) {
#if FASTATTN_HAS_MMA
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(target));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(source), "r"(bytes));
#elif !defined(__CUDACC__)
    copy_queue().groups.back().push_back({target, source, valid});
#endif
}

// The copies so far form a group.
__device__ __forceinline__ void commit_copies() {
#if FASTATTN_HAS_MMA
    asm volatile("cp.async.commit_group;\n" ::);
#elif !defined(__CUDACC__)
    copy_queue().groups.emplace_back();
#endif
}

// Waits until at most `pending` of this thread's latest groups are under way.
template <int pending>
__device__ __forceinline__ void wait_copies() {
#if FASTATTN_HAS_MMA
    asm volatile("cp.async.wait_group %0;\n" ::"n"(pending));
#elif !defined(__CUDACC__)
    while (copy_queue().groups.size() > 1 + pending) copy_queue().finish_first();
#endif
}

// ---- fragments from shared memory -------------------------------------------------------------------------
// Four 8x8 matrices of 16-bit elements; lanes 8n .. 8n+7 give the addresses of the rows of matrix n. r[n]
// gets elements (row g, columns 2t and 2t+1) of matrix n; transposed: (rows 2t and 2t+1, column g).
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], const void* row) {
#if FASTATTN_HAS_MMA
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#elif !defined(__CUDACC__)
    exchange(row, [&](const void* const* rows) {
        const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (unsigned n = 0; n < 4; ++n)
            std::memcpy(&r[n], static_cast<const std::uint16_t*>(rows[8 * n + g]) + 2 * t, 4);
    });
#endif
}

__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&r)[4], const void* row) {
#if FASTATTN_HAS_MMA
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#elif !defined(__CUDACC__)
    exchange(row, [&](const void* const* rows) {
        const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (unsigned n = 0; n < 4; ++n) {
            const std::uint32_t low = static_cast<const std::uint16_t*>(rows[8 * n + 2 * t])[g];
            const std::uint32_t high = static_cast<const std::uint16_t*>(rows[8 * n + 2 * t + 1])[g];
            r[n] = low | high << 16;
        }
    });
#endif
}

// ---- products ---------------------------------------------------------------------------------------------
// Two floats as neighbours of a 16-bit type, the first in the lower half.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
    T x, y;
    narrow(low, x);
    narrow(high, y);
    return static_cast<std::uint32_t>(x.bits) | static_cast<std::uint32_t>(y.bits) << 16;
}

// c (16, 8) += a (16, 16) b (16, 8), f32 sums.
//   a[0]: (g, 2t), (g, 2t+1)   a[1]: rows g+8   a[2]: columns +8   a[3]: both
//   b0: (2t, g), (2t+1, g)     b1: rows +8
//   c[0], c[1]: (g, 2t), (g, 2t+1)   c[2], c[3]: rows g+8
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
#if FASTATTN_HAS_MMA
    if constexpr (std::is_same_v<T, F16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, "
            "{%0, %1, %2, %3};\n"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#elif !defined(__CUDACC__)
    struct Operands {
        std::uint32_t a[4], b[2];
    };
    const auto half = [](std::uint32_t pair, unsigned which) {
        return widen(T{static_cast<std::uint16_t>(pair >> (16 * which))});
    };
    exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](const Operands* of) {
        const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        for (unsigned e = 0; e < 4; ++e) {
            const unsigned row = g, column = 2 * t + e % 2, lower = e / 2;
            float sum = 0;
            for (unsigned k = 0; k < 16; ++k) {
                const Operands &left = of[4 * row + k % 8 / 2], &right = of[4 * column + k % 8 / 2];
                sum += half(left.a[lower + 2 * (k / 8)], k % 2) * half(right.b[k / 8], k % 2);
            }
            c[e] += sum;
        }
    });
#endif
}

// ---- shared memory ----------------------------------------------------------------------------------------
// Tiles of rows of `width` 16-bit elements (a multiple of 64 or of 32), 16 bytes at a time; the place of a
// piece within its row depends on the row, so that eight rows of one column lie in different banks.
template <int width>
__device__ __forceinline__ int swizzled(int row, int piece) {
    static_assert(width % 32 == 0);
    constexpr int mask = width % 64 == 0 ? 7 : 3;
    // Rows of 64 bytes share 128 bytes two by two.
    const int turn = width % 64 == 0 ? row : row / 2;
    return row * width + (piece ^ (turn & mask)) * 8;
}

}  // namespace
}  // namespace fastattn::cuda
