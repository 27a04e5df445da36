// Tiles of q, k and v in shared memory (swizzled rows of `width` elements): how they come there, and a warp's
// products of them as instructions of Ampere.
#pragma once

#include "core/keys.h"
#include "cuda/fused/rows.h"

namespace fastattn::cuda {
namespace {

// ---- loading: begun, not waited for -----------------------------------------------------------------------
// The rows of a block, zeros below them, by `threads` threads of which this is number `thread`; place(row,
// piece) is where 16 bytes go.
template <int width, int count, int threads, class Place>
__device__ void load_queries(const RowBlock& block, int thread, Place place) {
    constexpr int pieces = width / 8;
    const AttentionProblem& p = block.p;
    const int used = static_cast<int>(p.head_dim / 8);
    FASTATTN_UNROLL_LITTLE
    for (int n = thread; n < count * pieces; n += threads) {
        const int row = n / pieces, piece = n % pieces;
        const RowPlace at = block.place(row);
        const auto* source = static_cast<const std::uint16_t*>(p.q.data) + at.b * p.q.batch + at.i * p.q.seq +
                             at.h * p.q.head + piece * 8;
        copy_async(place(row, piece), source, row < block.rows && piece < used);
    }
}
// By all threads, as rows of `width` elements.
template <int width, int count, int threads>
__device__ void load_queries(const RowBlock& block, std::uint16_t* to) {
    load_queries<width, count, threads>(block, static_cast<int>(threadIdx.x),
                                        [&](int row, int piece) { return to + swizzled<width>(row, piece); });
}

// `count` keys (or values) from `first` on, zeros for those that no row of the block attends, by `threads`
// threads of which this is number `thread`.
template <int width, int count, int threads>
__device__ __forceinline__ void load_rows(const RowBlock& block, const Operand& x, Index dims, Index first,
                                          std::uint16_t* to, int thread) {
    constexpr int pieces = width / 8;
    const int used = static_cast<int>(dims / 8);
    const int begin = static_cast<int>(clamped(block.key_begin - first, 0, count));
    const int end = static_cast<int>(clamped(block.key_end - first, 0, count));
    const KeyRows<std::uint16_t> rows(x, block.b, block.kv_head);
    FASTATTN_UNROLL_LITTLE
    for (int n = thread; n < count * pieces; n += threads) {
        const int key = n / pieces, piece = n % pieces;
        const bool valid = key >= begin && key < end && piece < used;
        copy_async(to + swizzled<width>(key, piece),
                   rows[valid ? first + key : first] + (valid ? piece * 8 : 0), valid);
    }
}

// ---- S = q k^T --------------------------------------------------------------------------------------------
// Rows `first` .. of the queries' tile, keys from the first of theirs on.
template <class T, int width, int mt, int nt>
__device__ __forceinline__ void multiply_queries(const std::uint16_t* queries, int first,
                                                 const std::uint16_t* keys, float (&s)[mt][nt][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    FASTATTN_UNROLL
    for (int i = 0; i < mt; ++i) {
        FASTATTN_UNROLL
        for (int j = 0; j < nt; ++j) {
            FASTATTN_UNROLL
            for (int e = 0; e < 4; ++e) s[i][j][e] = 0;
        }
    }
    FASTATTN_UNROLL
    for (int d = 0; d < width / 16; ++d) {
        std::uint32_t q[mt][4];
        FASTATTN_UNROLL
        for (int i = 0; i < mt; ++i)
            load_matrices(q[i], queries + swizzled<width>(first + i * 16 + lane % 16, 2 * d + lane / 16));
        FASTATTN_UNROLL
        for (int j = 0; j < nt; j += 2) {
            std::uint32_t k[4];  // two times eight keys
            load_matrices(k, keys + swizzled<width>(j * 8 + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
            FASTATTN_UNROLL
            for (int i = 0; i < mt; ++i) {
                multiply_add<T>(s[i][j], q[i], k[0], k[1]);
                multiply_add<T>(s[i][j + 1], q[i], k[2], k[3]);
            }
        }
    }
}

// ---- O += P v ---------------------------------------------------------------------------------------------
template <int width, class T, int mt, int nt, int dt, bool plain>
__device__ __forceinline__ void multiply_values(const std::uint16_t* values, const float (&s)[mt][nt][4],
                                                FlashRows<T, mt, nt, dt, plain>& rows) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    FASTATTN_UNROLL
    for (int k = 0; k < nt / 2; ++k) {
        std::uint32_t weights[mt][4];  // sixteen keys of s as the left operand
        FASTATTN_UNROLL
        for (int i = 0; i < mt; ++i) pack_weights<T>(s[i][2 * k], s[i][2 * k + 1], weights[i]);
        FASTATTN_UNROLL
        for (int d = 0; d < dt; d += 2) {
            std::uint32_t v[4];  // sixteen keys by two times eight features
            load_matrices_transposed(v, values + swizzled<width>(16 * k + lane % 16, d + lane / 16));
            FASTATTN_UNROLL
            for (int i = 0; i < mt; ++i) {
                multiply_add<T>(rows.o[i][d], weights[i], v[0], v[1]);
                multiply_add<T>(rows.o[i][d + 1], weights[i], v[2], v[3]);
            }
        }
    }
}

}  // namespace
}  // namespace fastattn::cuda
