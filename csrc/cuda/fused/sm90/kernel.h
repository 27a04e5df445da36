// Fused attention for Hopper. A block of threads stays for the whole launch and takes tiles of 64 rows for
// each of its computing warp groups, in the order of order.h; fused/rows.h says what happens to a tile. As in
// FlashAttention-3 (Shah et al. 2024):
//
// - One warp group loads: a thread has the copy engine bring K and V in two stages, three warps bring q, of
//   which the rows of a group of heads are packed and no box of the copy engine. The others compute, with the
//   registers that it gives away.
// - S of the next keys and P v of the last ones are in the tensor cores at once; while P v runs, S becomes
//   weights.
// - The copy engine brings what is there: keys that no row attends too, if they lie in a tile with some that
//   are. A NaN among them costs a second look at the tile's rows (recompute.h), where sm80/kernel.h has
//   zeros.
// - The warp groups take turns in handing products over, so that one's softmax runs beside another's
//   products.
#pragma once

#include "cuda/fused/sm90/arguments.h"
#include "cuda/fused/sm90/hopper.h"
#include "cuda/fused/sm90/order.h"
#include "cuda/fused/tiles.h"
#include "cuda/simt/launch_macro.h"

namespace fastattn::cuda {
namespace {

template <bool plain_, int width_, int value_width_, int keys_, int groups_, int loader_registers_,
          int registers_, int polynomial_>
struct HopperTile {
    static constexpr bool plain = plain_;
    static constexpr int width = width_, value_width = value_width_, groups = groups_, keys = keys_,
                         loader_registers = loader_registers_, registers = registers_,
                         polynomial = polynomial_;
    static constexpr int rows = 64 * groups, threads = kWarpGroup * (1 + groups), stages = 2;
    static constexpr int q_bytes = 2 * rows * width, k_bytes = 2 * keys * width,
                         v_bytes = 2 * keys * value_width;
    static constexpr int barriers_at = q_bytes + stages * (k_bytes + v_bytes);
    static constexpr int shared_bytes = barriers_at + 256;
    static_assert(shared_bytes <= 227 * 1024);
    static_assert((loader_registers + groups * registers) * kWarpGroup <= 65536);
    static_assert(k_bytes % kSwizzleBytes == 0 && v_bytes % kSwizzleBytes == 0);
};

template <class T, class Tile>
class HopperBlock {
public:
    static constexpr int kNt = Tile::keys / 8, kDt = Tile::value_width / 8, kStages = Tile::stages;

    __device__ HopperBlock(const HopperArgs& args, unsigned char* shared_memory)
        : a(args),
          p(args.flash.problem),
          shared(shared_memory),
          barriers(*reinterpret_cast<Barriers*>(shared_memory + Tile::barriers_at)) {}

    __device__ void compute() {
        begin_shared(shared);
        if (threadIdx.x == 0) {
            constexpr int computing_warps = 4 * Tile::groups;
            init_barrier(&barriers.q_full, kQueryThreads);
            init_barrier(&barriers.q_empty, computing_warps);
            for (int s = 0; s < kStages; ++s) {
                init_barrier(&barriers.k_full[s], 1);
                init_barrier(&barriers.v_full[s], 1);
                init_barrier(&barriers.k_empty[s], computing_warps);
                init_barrier(&barriers.v_empty[s], computing_warps);
            }
            publish_barriers();
        }
        __syncthreads();
        const int group = static_cast<int>(threadIdx.x) / kWarpGroup;
        if (group == 0) {
            shrink_registers<Tile::loader_registers>();
            if (threadIdx.x == 0) load_keys_and_values();
            if (threadIdx.x >= kWarpGroup - kQueryThreads) load_all_queries();
        } else {
            grow_registers<Tile::registers>();
            compute_tiles(group - 1);
        }
    }

private:
    static constexpr int kQueryThreads = kWarpGroup - 32;
    struct Barriers {
        Barrier q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    };

    // Tile n of the keys that this block of threads has had so far is in this stage, and the stage's barriers
    // have this parity then.
    static __device__ __forceinline__ int stage_of(unsigned n) { return static_cast<int>(n % kStages); }
    static __device__ __forceinline__ int parity_of(unsigned n) { return static_cast<int>(n / kStages % 2); }

    // f(block, steps) for each tile of this block of threads, in all its threads; steps: tiles of keys.
    template <class F>
    __device__ __forceinline__ void for_each_tile(F f) {
        for (Index n = blockIdx.x; n < a.order.tiles(); n += gridDim.x) {
            const FlashOrder::Place place = a.order.place(n);
            const RowBlock block(a.flash, place.pair, place.row_tile * Tile::rows, Tile::rows);
            f(block, static_cast<int>((block.key_end - block.key_begin + Tile::keys - 1) / Tile::keys));
        }
    }

    __device__ __forceinline__ unsigned char* keys_of(int stage) const {
        return shared + Tile::q_bytes + stage * Tile::k_bytes;
    }
    __device__ __forceinline__ unsigned char* values_of(int stage) const {
        return shared + Tile::q_bytes + kStages * Tile::k_bytes + stage * Tile::v_bytes;
    }

    // ---- loading ------------------------------------------------------------------------------------------
    __device__ void load_keys_and_values() {
        unsigned had = 0;  // tiles of keys before this tile of rows
        for_each_tile([&](const RowBlock& block, int steps) {
            const auto load = [&](const TileMap& map, int step, int bytes, unsigned char* to, Barrier* full,
                                  Barrier* empty, int parity) {
                wait(empty, parity ^ 1);
                arrive_and_expect(full, bytes);
                const int key = static_cast<int>(block.key_begin - a.flash.region.key) + step * Tile::keys;
                const int head = static_cast<int>(block.kv_head - a.flash.region.kv_head) * map.head_step;
                const int batch = static_cast<int>(block.b - a.flash.region.batch) * map.batch_step;
                constexpr int chunk_bytes = Tile::keys * kChunkRowBytes;
                for (int at = 0; at < bytes; at += chunk_bytes)
                    copy_box(to + at, &map.map, at / chunk_bytes * kChunkColumns, key, head, batch, full);
            };
            // Values one step behind: they are needed after the next keys.
            for (int step = 0; step <= steps; ++step) {
                if (step < steps) {
                    const unsigned n = had + static_cast<unsigned>(step);
                    const int stage = stage_of(n);
                    load(a.k, step, Tile::k_bytes, keys_of(stage), &barriers.k_full[stage],
                         &barriers.k_empty[stage], parity_of(n));
                }
                if (step > 0) {
                    const unsigned n = had + static_cast<unsigned>(step) - 1;
                    const int stage = stage_of(n);
                    load(a.v, step - 1, Tile::v_bytes, values_of(stage), &barriers.v_full[stage],
                         &barriers.v_empty[stage], parity_of(n));
                }
            }
            had += static_cast<unsigned>(steps);
        });
    }

    __device__ void load_all_queries() {
        begin_copies();
        int parity = 1;
        for_each_tile([&](const RowBlock& block, int steps) {
            if (steps == 0) return;
            wait(&barriers.q_empty, parity);
            parity ^= 1;
            load_queries<Tile::width, Tile::rows, kQueryThreads>(
                block, static_cast<int>(threadIdx.x) - (kWarpGroup - kQueryThreads), [&](int row, int piece) {
                    return shared + swizzled_128(tile_offset(Tile::rows, row, piece * 8));
                });
            commit_copies();
            wait_copies<0>();
            publish_to_products();
            arrive(&barriers.q_full);
        });
    }

    // ---- computing ----------------------------------------------------------------------------------------
    using Rows = FlashRows<T, 1, kNt, kDt, Tile::plain, LazySoftmax<Tile::polynomial>>;

    __device__ void compute_tiles(int group) {
        const int warp = static_cast<int>(threadIdx.x) % kWarpGroup / 32;
        // The first turn is that of group 0.
        if (group == Tile::groups - 1) end_turn(group);
        unsigned had = 0;
        int q_parity = 0;
        for_each_tile([&](const RowBlock& block, int steps) {
            Rows rows(block, group * 64 + warp * 16);
            if (steps > 0) {
                wait(&barriers.q_full, q_parity);
                q_parity ^= 1;
                attend(rows, group, steps, had);
                had += static_cast<unsigned>(steps);
            }
            rows.finish_sums();
            rows.store();
        });
    }

    __device__ __forceinline__ void attend(Rows& rows, int group, int steps, unsigned n) {
        float s[1][kNt][4], factor[2];
        std::uint32_t weights[Tile::keys / 16][4];
        wait(&barriers.k_full[stage_of(n)], parity_of(n));
        begin_products();
        queue_scores(s[0], group, stage_of(n));
        wait_products<0>();
        pin(s[0]);
        release(&barriers.k_empty[stage_of(n)]);
        for (int step = 0;; ++step) {
            rows.to_weights(step * Tile::keys, s, factor);
            pin(s[0]);  // before the wait, beside the products
            wait_products<0>();
            pin(rows.o[0]);
            if (step > 0) release(&barriers.v_empty[stage_of(n - 1)]);
            rows.rescale(factor);
            pack_all(s, weights);
            if (step + 1 == steps) break;
            wait(&barriers.k_full[stage_of(n + 1)], parity_of(n + 1));
            begin_turn(group);
            pin(s[0]);
            pin(rows.o[0]);
            begin_products();
            queue_scores(s[0], group, stage_of(n + 1));
            wait(&barriers.v_full[stage_of(n)], parity_of(n));
            begin_products();
            queue_values(rows.o[0], weights, stage_of(n));
            end_turn(group);
            wait_products<1>();
            pin(s[0]);
            ++n;
            release(&barriers.k_empty[stage_of(n)]);
        }
        release(&barriers.q_empty);
        wait(&barriers.v_full[stage_of(n)], parity_of(n));
        pin(rows.o[0]);
        begin_products();
        queue_values(rows.o[0], weights, stage_of(n));
        wait_products<0>();
        pin(rows.o[0]);
        release(&barriers.v_empty[stage_of(n)]);
    }

    __device__ __forceinline__ void queue_scores(float (&s)[kNt][4], int group, int stage) {
        const std::uint64_t q = descriptor_of_rows(shared_address(shared), Tile::rows, 64 * group, 0),
                            k = descriptor_of_rows(shared_address(keys_of(stage)), Tile::keys, 0, 0);
        FASTATTN_UNROLL
        for (int d = 0; d < Tile::width; d += 16)
            multiply_rows<T>(s, advanced(q, tile_offset(Tile::rows, 0, d)),
                             advanced(k, tile_offset(Tile::keys, 0, d)), d > 0);
        commit_products();
    }

    __device__ __forceinline__ void queue_values(float (&o)[kDt][4],
                                                 const std::uint32_t (&weights)[Tile::keys / 16][4],
                                                 int stage) {
        const std::uint64_t v = descriptor_of_columns(shared_address(values_of(stage)), Tile::keys, 0);
        FASTATTN_UNROLL
        for (int key = 0; key < Tile::keys; key += 16)
            multiply_columns<T>(o, weights[key / 16], advanced(v, tile_offset(Tile::keys, key, 0)));
        commit_products();
    }

    __device__ __forceinline__ void pack_all(const float (&s)[1][kNt][4],
                                             std::uint32_t (&weights)[Tile::keys / 16][4]) {
        FASTATTN_UNROLL
        for (int n = 0; n < Tile::keys / 16; ++n) pack_weights<T>(s[0][2 * n], s[0][2 * n + 1], weights[n]);
    }

    // This warp has read a stage.
    __device__ __forceinline__ void release(Barrier* empty) {
        if (threadIdx.x % 32 == 0) arrive(empty);
    }

    // Groups take turns: barrier 1 + g is reached by group g and, when its own turn is over, by the group
    // before.
    __device__ __forceinline__ void begin_turn(int group) { wait_named(1 + group, 2 * kWarpGroup); }
    __device__ __forceinline__ void end_turn(int group) {
        arrive_named(1 + (group + 1) % Tile::groups, 2 * kWarpGroup);
    }

    const HopperArgs& a;
    const AttentionProblem& p;
    unsigned char* const shared;
    Barriers& barriers;
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1) flash_forward_sm90(const __grid_constant__ HopperArgs a) {
#if defined(__CUDA_ARCH__) && !FASTATTN_HAS_WGMMA
    __trap();  // the host does not come here
#endif
    FASTATTN_DYNAMIC_SHARED(shared);
    HopperBlock<T, Tile>(a, shared).compute();
}

}  // namespace
}  // namespace fastattn::cuda
