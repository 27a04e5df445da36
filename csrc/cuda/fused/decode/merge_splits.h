// Softmax states of one row over disjoint sets of keys, put together in their order: what the warps of a
// block have found, and what the pieces of a head have (FlashDecoding, Dao et al. 2023, merges the same way).
//
//   m = max m_n,   l = sum 2^(m_n - m) l_n,   o = sum 2^(m_n - m) o_n
#pragma once

#include "cuda/fused/decode/arguments.h"
#include "cuda/fused/rows.h"

namespace fastattn::cuda {
namespace {

inline constexpr int kMergeBlock = 128;  // threads, each for two neighbours of a row
static_assert(2 * kMergeBlock >= 256, "the largest Dv");

struct RowParts {
    const float *m, *l, *o;
    Index step, o_step;  // from one part to the next
    int count;
};

// All lanes of a warp make it together, for the same row. Parts without keys (l = 0) change no bit, wherever
// they stand: how many of them are launched may depend on other batch entries.
class MergedRow {
public:
    __device__ __forceinline__ explicit MergedRow(const RowParts& row_parts)
        : m(-infinity<float>()), l(0), parts(row_parts) {
        for (int n = static_cast<int>(threadIdx.x) % 32; n < parts.count; n += 32)
            m = larger(m, parts.m[n * parts.step]);
        for (int step = 16; step > 0; step /= 2) m = larger(m, __shfl_xor_sync(0xFFFFFFFFu, m, step));
        FASTATTN_UNROLL_LOADS
        for (int n = 0; n < parts.count; ++n) {
            const float of_part = parts.l[n * parts.step];
            l += of_part == 0.0f ? 0.0f : share(n) * of_part;
        }
    }

    // Features d and d + 1 of o.
    __device__ __forceinline__ void output(int d, float (&sum)[2]) const {
        sum[0] = sum[1] = 0;
        FASTATTN_UNROLL_LOADS
        for (int n = 0; n < parts.count; ++n) {
            if (parts.l[n * parts.step] == 0.0f) continue;  // o may be anything
            const float* from = parts.o + n * parts.o_step + d;
            const float factor = share(n);
            sum[0] += factor * from[0];
            sum[1] += factor * from[1];
        }
    }

    float m, l;

private:
    // As FlashRows: scores that are all NaN leave a maximum of -inf, and NaN in l and o.
    __device__ __forceinline__ float share(int n) const {
        const float of_part = parts.m[n * parts.step];
        return of_part == -infinity<float>() ? 0.0f : power2(of_part - m);
    }

    const RowParts parts;
};

// A block for each row of the region.
template <class T>
__global__ void __launch_bounds__(kMergeBlock) merge_splits(const __grid_constant__ DecodeArgs a) {
    const AttentionProblem& p = a.flash.problem;
    const Index number = blockIdx.x, first = number * a.pieces.count;
    const MergedRow merged({a.m + first, a.l + first, a.o + first * p.value_dim, 1, p.value_dim,
                            static_cast<int>(a.pieces.count)});
    const Row row(p, place_of_row(p.group, a.flash.region, true, number));
    const float scale = finish_row(p, row, merged.m, merged.l, threadIdx.x == 0);
    const int d = 2 * static_cast<int>(threadIdx.x);
    if (d >= p.value_dim) return;
    float sum[2];
    merged.output(d, sum);
    store_pair<T>(p, row.place, d, sum[0] * scale, sum[1] * scale);
}

}  // namespace
}  // namespace fastattn::cuda
