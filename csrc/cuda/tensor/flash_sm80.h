// Fused attention on the tensor cores of Ampere and newer: one block of threads owns 4 * 16 * mt rows of one kv head and walks
// over its keys in tiles, with the online softmax of Milakov and Gimelshein as in FlashAttention-2 (Dao, ICLR 2024):
//
//   S = q k^T (rows, keys), x = log2(e) * score(S), m' = max(m, rows' max of x), a = 2^(m - m')
//   P = 2^(x - m') in 16 bits, l = l a + sum P, O = O a + P v;   at the end out = O / l, lse = ln 2 (m + log2 l)
//
// Row r of a kv head is query r / G of its head r % G, so that K and V are read once for the whole group. S, P and O stay in
// registers: a warp owns 16 * mt rows, and the accumulators of S are the operands of P v as they lie. K and V
// come through shared memory in two stages, copied while the tile before is computed.
#pragma once

#include "cuda/simt/row.h"
#include "cuda/tensor/flash_arguments.h"
#include "cuda/tensor/tensor_core.h"

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

template <class T, class Tile, bool plain>
class FlashBlock {
public:
    static constexpr int kMt = Tile::mt, kNt = Tile::keys / 8, kDt = Tile::width / 8;

    __device__ FlashBlock(const FlashArgs& args, unsigned char* shared)
        : a(args),
          p(args.problem),
          q_tile(reinterpret_cast<std::uint16_t*>(shared)),
          stages(q_tile + Tile::q_items),
          warp(static_cast<int>(threadIdx.x) / 32),
          g(static_cast<int>(threadIdx.x) % 32 / 4),
          t(static_cast<int>(threadIdx.x) % 4) {
        const Index rows_here = a.region.rows * p.group;
        const Index tiles = (rows_here + Tile::rows - 1) / Tile::rows;
        const Index pair = quotient(Index{blockIdx.x}, tiles);
        // The last rows have the most keys when causal: they go first.
        first_row = (tiles - 1 - (Index{blockIdx.x} - pair * tiles)) * Tile::rows;
        rows = static_cast<int>(clamped(rows_here - first_row, 0, Tile::rows));
        const Index entry = quotient(pair, a.region.kv_heads);
        b = a.region.batch + entry;
        kv_head = a.region.kv_head + (pair - entry * a.region.kv_heads);
    }

    __device__ void compute() {
        begin_copies();
        find_rows();
        load_queries();
        clear();
        const Index n = (key_end - key_begin + Tile::keys - 1) / Tile::keys;
        if (n > 0) load_keys(key_begin, 0);
        commit_copies();
        for (Index tile = 0; tile < n; ++tile) {
            const Index first = key_begin + tile * Tile::keys;
            if (tile + 1 < n) load_keys(first + Tile::keys, static_cast<int>((tile + 1) % 2));
            commit_copies();
            wait_copies<1>();
            __syncthreads();
            const std::uint16_t* stage = stages + (tile % 2) * 2 * Tile::stage_items;
            float s[kMt][kNt][4];
            multiply_queries(stage, s);
            to_weights(first, s);
            multiply_values(stage + Tile::stage_items, s);
            __syncthreads();  // before the stage is overwritten
        }
        store();
    }

private:
    // This thread's rows: g and g + 8 of each of the warp's 16-row tiles.
    static constexpr int kRows = 2 * kMt;
    __device__ __forceinline__ int local_row(int r) const {
        return (warp * kMt + r / 2) * 16 + g + 8 * (r % 2);
    }

    __device__ __forceinline__ RowPlace place(int local) const {
        const Index row = first_row + (local < rows ? local : rows - 1);
        const Index i = quotient(row, p.group);
        return {b, kv_head * p.group + (row - i * p.group), a.region.row + i};
    }

    // The keys of all rows: both ends of a row's range grow with its position, and rows that do not exist come last.
    __device__ void find_rows() {
        const Index q_len = length_of(p.q_lens, p.has_q_lens, b, p.q_size);
        const Index existing = clamped((q_len - a.region.row) * p.group - first_row, 0, rows);
        key_begin = key_end = 0;
        if (existing > 0) {
            key_begin = Row(p, place(0)).range.begin;
            key_begin -= key_begin % 8;
            key_end = Row(p, place(static_cast<int>(existing) - 1)).range.end;
            if (key_end < key_begin) key_end = key_begin;
        }
        for (int r = 0; r < kRows; ++r) {
            const Row row(p, place(local_row(r)));
            begin[r] = static_cast<int>(clamped(row.range.begin - key_begin, 0, key_end - key_begin));
            end[r] = static_cast<int>(clamped(row.range.end - key_begin, 0, key_end - key_begin));
        }
    }

    // ---- loading ----------------------------------------------------------------------------------------------
    __device__ void load_queries() {
        constexpr int pieces = Tile::width / 8;
        const int used = static_cast<int>(p.head_dim / 8);
        FASTATTN_UNROLL_LITTLE
        for (int n = static_cast<int>(threadIdx.x); n < Tile::rows * pieces; n += kFlashThreads) {
            const int row = n / pieces, piece = n % pieces;
            const RowPlace at = place(row);
            const auto* source = static_cast<const std::uint16_t*>(p.q.data) + at.b * p.q.batch +
                                 at.i * p.q.seq + at.h * p.q.head + piece * 8;
            copy_async(q_tile + swizzled<Tile::width>(row, piece), source, row < rows && piece < used);
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
        const int left = static_cast<int>(clamped(key_end - first, 0, Tile::keys));
        const auto* from =
            static_cast<const std::uint16_t*>(x.data) + b * x.batch + first * x.seq + kv_head * x.head;
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

    // ---- online softmax -------------------------------------------------------------------------------------------
    // Element e of s[i][j] belongs to this thread's row 2i + e/2 and to key 8j + 2t + e%2 of the tile.
    __device__ void to_weights(Index first, float (&s)[kMt][kNt][4]) {
        const int offset = static_cast<int>(first - key_begin);
        FASTATTN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float peak = m[r];
            if constexpr (plain) {
                const float scale = to_finite<float>(p.scale * kLog2E);
                const bool whole = begin[r] <= offset && end[r] >= offset + Tile::keys;
                FASTATTN_UNROLL
                for (int j = 0; j < kNt; ++j) {
                    FASTATTN_UNROLL
                    for (int e = 0; e < 2; ++e) {
                        const int v = offset + 8 * j + 2 * t + e;
                        float& x = s[r / 2][j][2 * (r % 2) + e];
                        x = whole || (v >= begin[r] && v < end[r]) ? times(x, scale) : -infinity<float>();
                        peak = larger(peak, x);
                    }
                }
            } else {
                const Row row(p, place(local_row(r)));
                Chunk keys;
                keys.key = key_begin;
                keys.keys = key_end - key_begin;
                const Scorer<float, false> score(p, keys, row);
                for (int j = 0; j < kNt; ++j) {
                    for (int e = 0; e < 2; ++e) {
                        float& x = s[r / 2][j][2 * (r % 2) + e];
                        x = score(offset + 8 * j + 2 * t + e, x);
                        peak = larger(peak, x);
                    }
                }
            }
            // The four threads of a row.
            peak = larger(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 1));
            peak = larger(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 2));
            const float shift = peak == -infinity<float>() ? 0.0f : peak;
            const float factor = m[r] == -infinity<float>() ? 0.0f : power2(m[r] - shift);
            m[r] = peak;
            float sum = 0;
            FASTATTN_UNROLL
            for (int j = 0; j < kNt; ++j) {
                FASTATTN_UNROLL
                for (int e = 0; e < 2; ++e) {
                    float& x = s[r / 2][j][2 * (r % 2) + e];
                    x = power2(x - shift);
                    sum += x;
                }
            }
            l[r] = l[r] * factor + sum;  // this thread's part; the four are added at the end
            FASTATTN_UNROLL
            for (int d = 0; d < kDt; ++d) {
                o[r / 2][d][2 * (r % 2)] *= factor;
                o[r / 2][d][2 * (r % 2) + 1] *= factor;
            }
            if constexpr (!plain) {
                if (p.dropout > 0) drop(first, r, s);
            }
        }
    }

    __device__ void drop(Index first, int r, float (&s)[kMt][kNt][4]) {
        const RowPlace at = place(local_row(r));
        const std::uint32_t threshold = dropout_threshold(p.dropout);
        const auto word = [](Index n) { return static_cast<std::uint32_t>(n); };
        for (int j = 0; j < kNt; ++j) {
            const Index key = first + 8 * j + 2 * t;  // even, as the tile begins at a multiple of 8
            const PhiloxBlock random = philox4x32(word(key / 4), word(at.i), word(at.h), word(at.b), p.seed);
            for (int e = 0; e < 2; ++e)
                if (random.word[key % 4 + e] < threshold) s[r / 2][j][2 * (r % 2) + e] = 0;
        }
    }

    // ---- O += P v --------------------------------------------------------------------------------------------------
    __device__ void multiply_values(const std::uint16_t* values, const float (&s)[kMt][kNt][4]) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        FASTATTN_UNROLL
        for (int k = 0; k < Tile::keys / 16; ++k) {
            std::uint32_t weights[kMt][4];  // sixteen keys of s as the left operand
            FASTATTN_UNROLL
            for (int i = 0; i < kMt; ++i) {
                weights[i][0] = pack<T>(s[i][2 * k][0], s[i][2 * k][1]);
                weights[i][1] = pack<T>(s[i][2 * k][2], s[i][2 * k][3]);
                weights[i][2] = pack<T>(s[i][2 * k + 1][0], s[i][2 * k + 1][1]);
                weights[i][3] = pack<T>(s[i][2 * k + 1][2], s[i][2 * k + 1][3]);
            }
            FASTATTN_UNROLL
            for (int d = 0; d < kDt; d += 2) {
                std::uint32_t v[4];  // sixteen keys by two times eight features
                load_matrices_transposed(v,
                                         values + swizzled<Tile::width>(16 * k + lane % 16, d + lane / 16));
                FASTATTN_UNROLL
                for (int i = 0; i < kMt; ++i) {
                    multiply_add<T>(o[i][d], weights[i], v[0], v[1]);
                    multiply_add<T>(o[i][d + 1], weights[i], v[2], v[3]);
                }
            }
        }
    }

    // ---- the result --------------------------------------------------------------------------------------------------
    __device__ void clear() {
        FASTATTN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            m[r] = -infinity<float>();
            l[r] = 0;
        }
        FASTATTN_UNROLL
        for (int i = 0; i < kMt; ++i) {
            FASTATTN_UNROLL
            for (int d = 0; d < kDt; ++d) {
                FASTATTN_UNROLL
                for (int e = 0; e < 4; ++e) o[i][d][e] = 0;
            }
        }
    }

    __device__ void store() {
        FASTATTN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float total = l[r];
            total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
            total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
            const int local = local_row(r);
            if (local >= rows) continue;
            const Row row(p, place(local));
            const Denominator<float> denominator(p, row, m[r], total);
            // A row without keys is 0; one whose keys have no weight is NaN, or found by recompute_rows to have none.
            const bool empty = row.range.begin >= row.range.end;
            const float scale = empty ? 0.0f : denominator.factor / static_cast<float>(1.0 - p.dropout);
            T* out = static_cast<T*>(p.out.data) + row.place.b * p.out.batch + row.place.i * p.out.seq +
                     row.place.h * p.out.head;
            FASTATTN_UNROLL
            for (int d = 0; d < kDt; ++d) {
                if (8 * d >= p.value_dim) continue;
                const float* from = o[r / 2][d] + 2 * (r % 2);
                const std::uint32_t pair = pack<T>(from[0] * scale, from[1] * scale);
                *reinterpret_cast<std::uint32_t*>(out + 8 * d + 2 * t) = pair;
            }
            if (t == 0 && p.lse.data != nullptr)
                static_cast<float*>(p.lse.data)[row.offset(p.lse)] =
                    static_cast<float>(denominator.log_sum());
        }
    }

    const FlashArgs& a;
    const AttentionProblem& p;
    std::uint16_t *q_tile, *stages;
    const int warp, g, t;
    Index first_row, b, kv_head;  // the block's first row of the kv head's rows, its batch entry, its kv head
    int rows;  // of this block that are there
    Index key_begin, key_end;  // of all its rows; begin a multiple of 8
    int begin[kRows], end[kRows];  // of this thread's rows, from key_begin on
    float m[kRows], l[kRows];
    float o[kMt][kDt][4];
};

template <class T, class Tile, bool plain>
__global__ void __launch_bounds__(kFlashThreads) flash_forward(const __grid_constant__ FlashArgs a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    __trap();  // the host does not come here
#endif
    FASTATTN_DYNAMIC_SHARED(shared);
    FlashBlock<T, Tile, plain>(a, shared).compute();
}

}  // namespace
}  // namespace fastattn::cuda
