// Fused attention on the tensor cores of Ampere and newer: one block of threads owns 4 * 16 * mt rows of one kv head and walks
// over its keys in tiles (flash_rows.h says what happens to them). A warp owns 16 * mt rows; S, P and O stay in its registers,
// and the accumulators of S are the operands of P v as they lie. K and V come through shared memory in two stages, copied while
// the tile before is computed.
#pragma once

#include "cuda/tensor/flash_rows.h"

namespace fastattn::cuda {
namespace {

inline constexpr int kFlashWarps = 4;
inline constexpr int kFlashThreads = 32 * kFlashWarps;

// One compiled tile: head dimensions up to `width`, 16 * mt rows a warp, `keys` keys.
template <int width_, int mt_, int keys_>
struct FlashTile {
    static constexpr int width = width_, mt = mt_, keys = keys_, rows = 16 * mt_ * kFlashWarps;
    static constexpr int q_items = rows * width, stage_items = keys * width;  // of 16 bits
    static constexpr int shared_bytes = 2 * (q_items + 4 * stage_items);  // q, and k and v twice
};

// The rows of block number blockIdx.x.
template <int most>
__device__ RowBlock row_block(const FlashArgs& a) {
    const Index tiles = (a.region.rows * a.problem.group + most - 1) / most;
    const Index pair = quotient(Index{blockIdx.x}, tiles);
    // The last rows have the most keys when causal: they go first.
    return {a, pair, (tiles - 1 - (Index{blockIdx.x} - pair * tiles)) * most, most};
}

template <class T, class Tile, bool plain>
class FlashBlock {
public:
    static constexpr int kMt = Tile::mt, kNt = Tile::keys / 8, kDt = Tile::width / 8;

    __device__ FlashBlock(const RowBlock& rows_of_block, unsigned char* shared)
        : p(rows_of_block.p),
          q_tile(reinterpret_cast<std::uint16_t*>(shared)),
          stages(q_tile + Tile::q_items),
          warp(static_cast<int>(threadIdx.x) / 32),
          block(rows_of_block),
          rows(block, warp * 16 * kMt) {}

    __device__ void compute() {
        begin_copies();
        load_queries();
        const int n = static_cast<int>((block.key_end - block.key_begin + Tile::keys - 1) / Tile::keys);
        if (n > 0) load_keys(block.key_begin, 0);
        commit_copies();
        for (int tile = 0; tile < n; ++tile) {
            const int offset = tile * Tile::keys;
            if (tile + 1 < n) load_keys(block.key_begin + offset + Tile::keys, (tile + 1) % 2);
            commit_copies();
            wait_copies<1>();
            __syncthreads();
            const std::uint16_t* stage = stages + (tile % 2) * 2 * Tile::stage_items;
            float s[kMt][kNt][4], factor[2 * kMt];
            multiply_queries(stage, s);
            rows.to_weights(offset, s, factor);
            rows.rescale(factor);
            multiply_values(stage + Tile::stage_items, s);
            __syncthreads();  // before the stage is overwritten
        }
        rows.finish_sums();
        rows.store();
    }

private:
    // ---- loading ----------------------------------------------------------------------------------------------
    __device__ void load_queries() {
        constexpr int pieces = Tile::width / 8;
        const int used = static_cast<int>(p.head_dim / 8);
        FASTATTN_UNROLL_LITTLE
        for (int n = static_cast<int>(threadIdx.x); n < Tile::rows * pieces; n += kFlashThreads) {
            const int row = n / pieces, piece = n % pieces;
            const RowPlace at = block.place(row);
            const auto* source = static_cast<const std::uint16_t*>(p.q.data) + at.b * p.q.batch +
                                 at.i * p.q.seq + at.h * p.q.head + piece * 8;
            copy_async(q_tile + swizzled<Tile::width>(row, piece), source, row < block.rows && piece < used);
        }
    }

    __device__ void load_keys(Index first, int stage) {
        std::uint16_t* const to = stages + stage * 2 * Tile::stage_items;
        load_tile(p.k, p.head_dim, first, to);
        load_tile(p.v, p.value_dim, first, to + Tile::stage_items);
    }

    __device__ __forceinline__ void load_tile(const Operand& x, Index dims, Index first, std::uint16_t* to) {
        constexpr int pieces = Tile::width / 8;
        const int used = static_cast<int>(dims / 8);
        const int left = static_cast<int>(clamped(block.key_end - first, 0, Tile::keys));
        const auto* from = static_cast<const std::uint16_t*>(x.data) + block.b * x.batch + first * x.seq +
                           block.kv_head * x.head;
        FASTATTN_UNROLL_LITTLE
        for (int n = static_cast<int>(threadIdx.x); n < Tile::keys * pieces; n += kFlashThreads) {
            const int key = n / pieces, piece = n % pieces;
            const bool valid = key < left && piece < used;
            copy_async(to + swizzled<Tile::width>(key, piece), from + (valid ? key * x.seq + piece * 8 : 0),
                       valid);
        }
    }

    // ---- S = q k^T ------------------------------------------------------------------------------------------------
    __device__ void multiply_queries(const std::uint16_t* keys, float (&s)[kMt][kNt][4]) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        FASTATTN_UNROLL
        for (int i = 0; i < kMt; ++i) {
            FASTATTN_UNROLL
            for (int j = 0; j < kNt; ++j) {
                FASTATTN_UNROLL
                for (int e = 0; e < 4; ++e) s[i][j][e] = 0;
            }
        }
        FASTATTN_UNROLL
        for (int d = 0; d < Tile::width / 16; ++d) {
            std::uint32_t q[kMt][4];
            FASTATTN_UNROLL
            for (int i = 0; i < kMt; ++i)
                load_matrices(q[i], q_tile + swizzled<Tile::width>((warp * kMt + i) * 16 + lane % 16,
                                                                   2 * d + lane / 16));
            FASTATTN_UNROLL
            for (int j = 0; j < kNt; j += 2) {
                std::uint32_t k[4];  // two times eight keys
                load_matrices(
                    k, keys + swizzled<Tile::width>(j * 8 + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
                FASTATTN_UNROLL
                for (int i = 0; i < kMt; ++i) {
                    multiply_add<T>(s[i][j], q[i], k[0], k[1]);
                    multiply_add<T>(s[i][j + 1], q[i], k[2], k[3]);
                }
            }
        }
    }

    // ---- O += P v --------------------------------------------------------------------------------------------------
    __device__ void multiply_values(const std::uint16_t* values, const float (&s)[kMt][kNt][4]) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        FASTATTN_UNROLL
        for (int k = 0; k < Tile::keys / 16; ++k) {
            std::uint32_t weights[kMt][4];  // sixteen keys of s as the left operand
            FASTATTN_UNROLL
            for (int i = 0; i < kMt; ++i) rows.pack_weights(s, i, k, weights[i]);
            FASTATTN_UNROLL
            for (int d = 0; d < kDt; d += 2) {
                std::uint32_t v[4];  // sixteen keys by two times eight features
                load_matrices_transposed(v,
                                         values + swizzled<Tile::width>(16 * k + lane % 16, d + lane / 16));
                FASTATTN_UNROLL
                for (int i = 0; i < kMt; ++i) {
                    multiply_add<T>(rows.o[i][d], weights[i], v[0], v[1]);
                    multiply_add<T>(rows.o[i][d + 1], weights[i], v[2], v[3]);
                }
            }
        }
    }

    const AttentionProblem& p;
    std::uint16_t *q_tile, *stages;
    const int warp;
    const RowBlock& block;
    FlashRows<T, kMt, kNt, kDt, plain> rows;
};

template <class T, class Tile, bool plain>
__global__ void __launch_bounds__(kFlashThreads) flash_forward(const __grid_constant__ FlashArgs a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    __trap();  // the host does not come here
#endif
    FASTATTN_DYNAMIC_SHARED(shared);
    const RowBlock block = row_block<Tile::rows>(a);
    FlashBlock<T, Tile, plain>(block, shared).compute();
}

}  // namespace
}  // namespace fastattn::cuda
