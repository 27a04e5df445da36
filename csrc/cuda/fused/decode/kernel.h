// Fused attention for few query rows, on the tensor cores of Ampere and newer. Reading K and V is what takes
// the time then, so the keys of a kv head are divided: into pieces, one for each block (arguments.h), and
// within a piece among the warps of the block, 16 keys at a time. All warps have the same rows: the query
// heads of a group and their few queries (RowBlock). Each has a softmax of its own over its keys, and copies
// for itself: a ring of slots in shared memory, filled asynchronously, without a barrier of the block before
// the end. There the four states are merged, and, where there are several pieces, stored for merge_splits.h.
//
// Rows beyond those of a tile are for further blocks, which read K and V again, at the same time and so
// mostly from the second-level cache. That has little more bandwidth than memory: hence tiles of 32 rows
// where the registers allow them, although with 16 rows or fewer they would only compute in vain. From some
// 64 rows on cuda-flash-sm80 reads less.
#pragma once

#include "cuda/fused/decode/merge_splits.h"
#include "cuda/fused/tiles.h"
#include "cuda/simt/launch_macro.h"

namespace fastattn::cuda {
namespace {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = 32 * kDecodeWarps;
inline constexpr int kDecodeKeys = 16;  // of a warp at once, the depth of one product with V
static_assert(kDecodeWarps * kDecodeKeys == kDecodeStep);

template <int width_, int mt_, int slots_>
struct DecodeTile {
    static constexpr int width = width_, mt = mt_, slots = slots_, rows = 16 * mt_;
    static constexpr int q_items = rows * width, slot_items = kDecodeKeys * width;  // of 16 bits
    static constexpr int shared_bytes = 2 * (q_items + kDecodeWarps * slots * slot_items);
    // The states of the warps take the place of the tiles. Eight floats more a row: rows in different banks.
    static constexpr int o_stride = width + 8;
    static_assert(4 * kDecodeWarps * rows * (o_stride + 2) <= shared_bytes);
};

// What block number blockIdx.x works on. Blocks that run at the same time share keys first, then lie side by
// side in BSHD arrays.
struct DecodePlace {
    __device__ DecodePlace(const DecodeArgs& a, int most) {
        const Chunk& region = a.flash.region;
        const Index tiles = (region.rows * a.flash.problem.group + most - 1) / most;
        Index rest = quotient(Index{blockIdx.x}, tiles);
        first_row = (Index{blockIdx.x} - rest * tiles) * most;
        const Index kv_head = rest - quotient(rest, region.kv_heads) * region.kv_heads;
        rest = quotient(rest, region.kv_heads);
        const Index entry = quotient(rest, a.pieces.count);
        piece = static_cast<int>(rest - entry * a.pieces.count);
        pair = entry * region.kv_heads + kv_head;
    }

    Index pair, first_row;
    int piece;
};

template <class T, class Tile, bool plain>
class DecodeBlock {
public:
    static constexpr int kMt = Tile::mt, kNt = kDecodeKeys / 8, kDt = Tile::width / 8;

    // `rows_of_block` with the keys of the piece.
    __device__ DecodeBlock(const DecodeArgs& args, int its_piece, const RowBlock& rows_of_block,
                           unsigned char* shared_memory)
        : a(args),
          p(args.flash.problem),
          piece(its_piece),
          block(rows_of_block),
          shared(shared_memory),
          warp(static_cast<int>(threadIdx.x) / 32),
          ring(Tile::q_items + warp * Tile::slots * Tile::slot_items),
          // Counted from the first key of the piece, so that a key is the same warp's whatever the other rows
          // attend.
          first(warp * kDecodeKeys - static_cast<int>(rows_of_block.key_begin % kDecodeStep)),
          rows(rows_of_block, 0) {
        const int keys = static_cast<int>(block.key_end - block.key_begin);
        tiles = keys > first
                    ? (keys - first + static_cast<int>(kDecodeStep) - 1) / static_cast<int>(kDecodeStep)
                    : 0;
    }

    __device__ void compute() {
        begin_copies();
        auto* const queries = reinterpret_cast<std::uint16_t*>(shared);
        load_queries<Tile::width, Tile::rows, kDecodeThreads>(block, queries);
        for (int n = 0; n < Tile::slots - 1; ++n) load_next();
        wait_copies<Tile::slots - 2>();
        __syncthreads();  // the queries come from all threads
        for (int tile = 0; tile < tiles; ++tile) {
            float s[kMt][kNt][4], factor[2 * kMt];
            multiply_queries<T, Tile::width>(queries, 0, next_slot(), s);
            rows.to_weights(first + tile * static_cast<int>(kDecodeStep), s, factor);
            rows.rescale(factor);
            multiply_values<Tile::width>(next_slot(), s, rows);
        }
        rows.finish_sums();
        merge_warps();
    }

    // For a piece that no row attends.
    __device__ void store_nothing() const {
        for (int row = static_cast<int>(threadIdx.x); row < block.rows; row += kDecodeThreads)
            store_sums(part_of(row), -infinity<float>(), 0);
    }

private:
    // ---- the ring of a warp -------------------------------------------------------------------------------
    __device__ __forceinline__ std::uint16_t* slot(int n) const {
        return reinterpret_cast<std::uint16_t*>(shared) + ring + n * Tile::slot_items;
    }

    // Begins to copy the keys, then the values, of the next tile; nothing when there is none.
    __device__ __forceinline__ void load_next() {
        const int tile = loaded / 2;
        if (tile < tiles) {
            const Index key = block.key_begin + first + tile * kDecodeStep;
            const bool values = loaded % 2 != 0;
            load_rows<Tile::width, kDecodeKeys, 32>(block, values ? p.v : p.k,
                                                    values ? p.value_dim : p.head_dim, key, slot(to_fill),
                                                    static_cast<int>(threadIdx.x) % 32);
        }
        commit_copies();
        ++loaded;
        to_fill = to_fill + 1 == Tile::slots ? 0 : to_fill + 1;
    }

    // What has come next, for all lanes. All have read the slot before, so that is filled again.
    __device__ __forceinline__ const std::uint16_t* next_slot() {
        wait_copies<Tile::slots - 2>();
        __syncwarp();
        load_next();
        return slot(to_fill);  // the oldest is what is filled next
    }

    // ---- the end ------------------------------------------------------------------------------------------
    // [warp][row] of maxima, sums and outputs; then each warp merges rows of its own.
    __device__ void merge_warps() {
        auto* const m = reinterpret_cast<float*>(shared);
        float* const l = m + kDecodeWarps * Tile::rows;
        float* const o = l + kDecodeWarps * Tile::rows;
        __syncthreads();  // before the tiles are overwritten
        FASTATTN_UNROLL
        for (int r = 0; r < 2 * kMt; ++r) {
            const int at = warp * Tile::rows + rows.local_row(r);
            if (rows.t == 0) {
                m[at] = rows.m[r];
                l[at] = rows.l[r];
            }
            FASTATTN_UNROLL
            for (int d = 0; d < kDt; ++d) {
                float* to = o + at * Tile::o_stride + 8 * d + 2 * rows.t;
                to[0] = rows.o[r / 2][d][2 * (r % 2)];
                to[1] = rows.o[r / 2][d][2 * (r % 2) + 1];
            }
        }
        __syncthreads();
        for (int row = warp; row < block.rows; row += kDecodeWarps)
            store({m + row, l + row, o + row * Tile::o_stride, Tile::rows, Tile::rows * Tile::o_stride,
                   kDecodeWarps},
                  row);
    }

    // The result of a row, or its sums over the piece.
    __device__ void store(const RowParts& parts, int local) const {
        const MergedRow merged(parts);
        const int lane = static_cast<int>(threadIdx.x) % 32;
        float scale = 1;
        const RowPlace at = block.place(local);
        const Index part = part_of(local);
        const bool whole = a.pieces.count == 1;
        if (whole) {
            scale = finish_row(p, Row(p, at), merged.m, merged.l, lane == 0);
        } else if (lane == 0) {
            store_sums(part, merged.m, merged.l);
        }
        for (int d = 2 * lane; d < p.value_dim; d += 64) {
            float sum[2];
            merged.output(d, sum);
            if (whole) {
                store_pair<T>(p, at, d, sum[0] * scale, sum[1] * scale);
            } else {
                float* to = a.o + part * p.value_dim + d;
                to[0] = sum[0];
                to[1] = sum[1];
            }
        }
    }

    __device__ __forceinline__ Index part_of(int local) const {
        const Chunk& region = a.flash.region;
        const Index pair = (block.b - region.batch) * region.kv_heads + block.kv_head - region.kv_head;
        return (pair * region.rows * p.group + block.first_row + local) * a.pieces.count + piece;
    }

    __device__ __forceinline__ void store_sums(Index part, float m, float l) const {
        a.m[part] = m;
        a.l[part] = l;
    }

    const DecodeArgs& a;
    const AttentionProblem& p;
    const int piece;
    const RowBlock& block;
    unsigned char* const shared;
    const int warp;
    const int ring;  // where the warp's slots begin, in elements
    const int first;  // key of the warp's first tile, counted from key_begin
    int tiles;
    int loaded = 0, to_fill = 0;
    FlashRows<T, kMt, kNt, kDt, plain> rows;
};

template <class T, class Tile, bool plain>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode_forward(const __grid_constant__ DecodeArgs a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    __trap();  // the host does not come here
#endif
    FASTATTN_DYNAMIC_SHARED(shared);
    const DecodePlace place(a, Tile::rows);
    RowBlock block(a.flash, place.pair, place.first_row, Tile::rows);
    const Index begin = (a.pieces.first + place.piece) * a.pieces.size;
    block.restrict_keys(begin, begin + a.pieces.size);
    DecodeBlock<T, Tile, plain> work(a, place.piece, block, shared);
    if (a.pieces.count > 1 && block.key_begin >= block.key_end) {
        work.store_nothing();
    } else {
        work.compute();
    }
}

}  // namespace
}  // namespace fastattn::cuda
