// Fused attention on the tensor cores of Ampere and newer: one block of threads owns 4 * 16 * mt rows of one
// kv head and walks over its keys in tiles (fused/rows.h says what happens to them). A warp owns 16 * mt
// rows; S, P and O stay in its registers, and the accumulators of S are the operands of P v as they lie. K
// and V come through shared memory in two stages, copied while the tile before is computed.
#pragma once

#include "cuda/fused/rows.h"
#include "cuda/fused/tiles.h"
#include "cuda/simt/launch_macro.h"

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
        load_queries<Tile::width, Tile::rows, kFlashThreads>(block, q_tile);
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
            multiply_queries<T, Tile::width>(q_tile, warp * 16 * kMt, stage, s);
            rows.to_weights(offset, s, factor);
            rows.rescale(factor);
            multiply_values<Tile::width>(stage + Tile::stage_items, s, rows);
            __syncthreads();  // before the stage is overwritten
        }
        rows.finish_sums();
        rows.store();
    }

private:
    __device__ void load_keys(Index first, int stage) {
        std::uint16_t* const to = stages + stage * 2 * Tile::stage_items;
        const int thread = static_cast<int>(threadIdx.x);
        load_rows<Tile::width, Tile::keys, kFlashThreads>(block, p.k, p.head_dim, first, to, thread);
        load_rows<Tile::width, Tile::keys, kFlashThreads>(block, p.v, p.value_dim, first,
                                                          to + Tile::stage_items, thread);
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
