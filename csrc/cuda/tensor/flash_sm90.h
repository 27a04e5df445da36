// Fused attention for Hopper. A block of threads stays for the whole launch and takes tiles of 64 rows for each of its computing
// warp groups, in the order of flash_order.h; flash_rows.h says what happens to a tile. As in FlashAttention-3 (Shah et al. 2024):
//
// - One warp group loads: a thread has the copy engine bring K and V in two stages, three warps bring q, of which the rows of a
//   group of heads are packed and no box of the copy engine. The others compute, with the registers that it gives away.
// - S of the next keys and P v of the last ones are in the tensor cores at once; while P v runs, S becomes weights.
// - The warp groups take turns in handing products over, so that one's softmax runs beside another's products.
#pragma once

#include "cuda/tensor/flash_order.h"
#include "cuda/tensor/flash_rows.h"
#include "cuda/tensor/flash_sm90_arguments.h"
#include "cuda/tensor/hopper.h"

namespace fastattn::cuda {
namespace {

template <int width_, int value_width_, int groups_, int keys_, int loader_registers_, int registers_,
          int polynomial_>
struct HopperTile {
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

// Which of the stages is next, and the parity of its phase.
template <int stages>
struct StageCount {
    int at = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++at == stages) {
            at = 0;
            parity ^= 1;
        }
    }
};

template <class T, class Tile, bool plain>
class HopperBlock {
public:
    static constexpr int kNt = Tile::keys / 8, kDt = Tile::value_width / 8, kStages = Tile::stages;
    using Stage = StageCount<kStages>;

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
            if (threadIdx.x >= kWarpGroup - kQueryThreads) load_queries();
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

    // ---- loading ----------------------------------------------------------------------------------------------
    __device__ void load_keys_and_values() {
        Stage k, v;
        for_each_tile([&](const RowBlock& block, int steps) {
            const auto load = [&](const TileMap& map, int step, int bytes, unsigned char* to, Barrier* full) {
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
                    wait(&barriers.k_empty[k.at], k.parity ^ 1);
                    load(a.k, step, Tile::k_bytes, keys_of(k.at), &barriers.k_full[k.at]);
                    k.next();
                }
                if (step > 0) {
                    wait(&barriers.v_empty[v.at], v.parity ^ 1);
                    load(a.v, step - 1, Tile::v_bytes, values_of(v.at), &barriers.v_full[v.at]);
                    v.next();
                }
            }
        });
    }

    __device__ void load_queries() {
        begin_copies();
        constexpr int pieces = Tile::width / 8;
        const int used = static_cast<int>(p.head_dim / 8);
        int parity = 1;
        for_each_tile([&](const RowBlock& block, int steps) {
            if (steps == 0) return;
            wait(&barriers.q_empty, parity);
            parity ^= 1;
            FASTATTN_UNROLL_LITTLE
            for (int n = static_cast<int>(threadIdx.x) - (kWarpGroup - kQueryThreads);
                 n < Tile::rows * pieces; n += kQueryThreads) {
                const int row = n / pieces, piece = n % pieces;
                const RowPlace at = block.place(row);
                const auto* source = static_cast<const std::uint16_t*>(p.q.data) + at.b * p.q.batch +
                                     at.i * p.q.seq + at.h * p.q.head + piece * 8;
                copy_async(shared + swizzled_128(tile_offset(Tile::rows, row, piece * 8)), source,
                           row < block.rows && piece < used);
            }
            commit_copies();
            wait_copies<0>();
            publish_to_products();
            arrive(&barriers.q_full);
        });
    }

    // ---- computing --------------------------------------------------------------------------------------------
    using Rows = FlashRows<T, 1, kNt, kDt, plain, LazySoftmax<plain ? Tile::polynomial : 0>>;

    __device__ void compute_tiles(int group) {
        const int warp = static_cast<int>(threadIdx.x) % kWarpGroup / 32;
        // The first turn is that of group 0.
        if (group == Tile::groups - 1) end_turn(group);
        Stage k, v;
        int q_parity = 0;
        for_each_tile([&](const RowBlock& block, int steps) {
            Rows rows(block, group * 64 + warp * 16);
            if (steps > 0) {
                wait(&barriers.q_full, q_parity);
                q_parity ^= 1;
                attend(rows, group, steps, k, v);
            }
            rows.finish_sums();
            rows.store();
        });
    }

    __device__ __forceinline__ void attend(Rows& rows, int group, int steps, Stage& k, Stage& v) {
        float s[1][kNt][4], factor[2];
        std::uint32_t weights[Tile::keys / 16][4];
        wait(&barriers.k_full[k.at], k.parity);
        begin_products();
        queue_scores(s[0], group, k.at);
        wait_products<0>();
        pin(s[0]);
        release(&barriers.k_empty[k.at]);
        k.next();
        rows.to_weights(0, s, factor);
        pack_all(rows, s, weights);
        for (int step = 1; step < steps; ++step) {
            wait(&barriers.k_full[k.at], k.parity);
            begin_turn(group);
            pin(s[0]);
            pin(rows.o[0]);
            begin_products();
            queue_scores(s[0], group, k.at);
            wait(&barriers.v_full[v.at], v.parity);
            queue_values(rows.o[0], weights, v.at);
            end_turn(group);
            wait_products<1>();
            pin(s[0]);
            release(&barriers.k_empty[k.at]);
            k.next();
            rows.to_weights(step * Tile::keys, s, factor);
            wait_products<0>();
            pin(rows.o[0]);
            release(&barriers.v_empty[v.at]);
            v.next();
            rows.rescale(factor);
            pack_all(rows, s, weights);
        }
        release(&barriers.q_empty);
        wait(&barriers.v_full[v.at], v.parity);
        pin(rows.o[0]);
        begin_products();
        queue_values(rows.o[0], weights, v.at);
        wait_products<0>();
        pin(rows.o[0]);
        release(&barriers.v_empty[v.at]);
        v.next();
    }

    __device__ __forceinline__ void queue_scores(float (&s)[kNt][4], int group, int stage) {
        const std::uint32_t q = shared_address(shared), k = shared_address(keys_of(stage));
        FASTATTN_UNROLL
        for (int d = 0; d < Tile::width; d += 16)
            multiply_rows<T>(s, descriptor_of_rows(q, Tile::rows, 64 * group, d),
                             descriptor_of_rows(k, Tile::keys, 0, d), d > 0);
        commit_products();
    }

    __device__ __forceinline__ void queue_values(float (&o)[kDt][4],
                                                 const std::uint32_t (&weights)[Tile::keys / 16][4],
                                                 int stage) {
        const std::uint32_t v = shared_address(values_of(stage));
        FASTATTN_UNROLL
        for (int key = 0; key < Tile::keys; key += 16)
            multiply_columns<T>(o, weights[key / 16], descriptor_of_columns(v, Tile::keys, key));
        commit_products();
    }

    __device__ __forceinline__ void pack_all(const Rows& rows, const float (&s)[1][kNt][4],
                                             std::uint32_t (&weights)[Tile::keys / 16][4]) {
        FASTATTN_UNROLL
        for (int n = 0; n < Tile::keys / 16; ++n) rows.pack_weights(s, 0, n, weights[n]);
    }

    // This warp has read a stage.
    __device__ __forceinline__ void release(Barrier* empty) {
        if (threadIdx.x % 32 == 0) arrive(empty);
    }

    // Groups take turns: barrier 1 + g is reached by group g and, when its own turn is over, by the group before.
    __device__ __forceinline__ void begin_turn(int group) { wait_named(1 + group, 2 * kWarpGroup); }
    __device__ __forceinline__ void end_turn(int group) {
        arrive_named(1 + (group + 1) % Tile::groups, 2 * kWarpGroup);
    }

    const HopperArgs& a;
    const AttentionProblem& p;
    unsigned char* const shared;
    Barriers& barriers;
};

template <class T, class Tile, bool plain>
__global__ void __launch_bounds__(Tile::threads, 1) flash_forward_sm90(const __grid_constant__ HopperArgs a) {
#if defined(__CUDA_ARCH__) && !FASTATTN_HAS_WGMMA
    __trap();  // the host does not come here
#endif
    FASTATTN_DYNAMIC_SHARED(shared);
    HopperBlock<T, Tile, plain>(a, shared).compute();
}

}  // namespace
}  // namespace fastattn::cuda
