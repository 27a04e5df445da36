// The register tile that all matrix products are made of.
#pragma once

#include "cpu/flash_engine.h"

namespace fastattn::cpu {
namespace {

// acc[m][n] += sum_{k<depth} a[m*a_row + k] . b[k*b_row + n*width ...]
//   a: (MR, depth) units, row stride a_row       b: (depth, NV*width), row stride b_row, any storage type
//   that Vec loads (packed units, or k and v as they lie in memory)
template <class E, int MR, int NV, class B>
FASTATTN_INLINE void gemm_tile(typename E::V (&acc)[MR][NV], const typename E::Unit* a, std::int64_t a_row,
                               const B* b, std::int64_t b_row, std::int64_t depth) {
    using V = typename E::V;
    for (std::int64_t k = 0; k < depth; ++k) {
        V column[NV];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) column[n] = V::load(b + n * V::width);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            const V x = V::set1(a[m * a_row + k]);
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) acc[m][n] = E::mma(x, column[n], acc[m][n]);
        }
        b += b_row;
    }
}

// out[m][0 .. NV*width) += a . b, with out in memory (row stride out_row).
template <class E, int MR, int NV, class B>
FASTATTN_INLINE void gemm_accumulate(typename E::Acc* out, std::int64_t out_row, const typename E::Unit* a,
                                     std::int64_t a_row, const B* b, std::int64_t b_row, std::int64_t depth) {
    using V = typename E::V;
    V acc[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[m][n] = V::load(out + m * out_row + n * V::width);
    }
    gemm_tile<E, MR, NV>(acc, a, a_row, b, b_row, depth);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[m][n].store(out + m * out_row + n * V::width);
    }
}

// Calls f(std::integral_constant<int, n>) for a run-time n in [1, N]: tails as their own code.
template <int N>
struct Count {
    static constexpr int value = N;
};
template <int N, class F>
FASTATTN_INLINE void with_count(int n, F&& f) {
    if constexpr (N > 1) {
        if (n < N) {
            with_count<N - 1>(n, f);
            return;
        }
    }
    f(Count<N>{});
}

}  // namespace
}  // namespace fastattn::cpu
