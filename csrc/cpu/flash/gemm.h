// The register tile that all matrix products are made of.
#pragma once

#include "cpu/flash/engine.h"

namespace fastattn::cpu {
namespace {

// NV vectors of units of row k of b: packed units, or numbers of any storage type as they lie in memory.
template <class E, int NV, class B>
FASTATTN_INLINE void load_columns(const B* b, std::int64_t b_row, std::int64_t k,
                                  typename E::V (&column)[NV]) {
    using V = typename E::V;
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) column[n] = V::load(b + k * b_row + n * V::width);
}

// Rows in memory; each line that is loaded prefetches the one `ahead` numbers further on.
template <class S>
struct RowsAhead {
    const S* first;
    std::int64_t ahead;
};
template <class E, int NV, class S>
FASTATTN_INLINE void load_columns(const RowsAhead<S>& b, std::int64_t b_row, std::int64_t k,
                                  typename E::V (&column)[NV]) {
    load_columns<E, NV>(b.first, b_row, k, column);
    const S* const next = b.first + k * b_row + b.ahead;
#pragma GCC unroll 8
    for (int c = 0; c < NV * E::V::width; c += kLineBytes / static_cast<int>(sizeof(S))) fetch_line(next + c);
}

// Rows in memory of which a unit takes two. The columns come as the engine pairs them; an odd last row counts
// twice.
template <class S>
struct PairedRows {
    const S* first;
    std::int64_t rows;
};
template <class E, int NV, class S>
FASTATTN_INLINE void load_columns(const PairedRows<S>& b, std::int64_t b_row, std::int64_t k,
                                  typename E::V (&column)[NV]) {
    const S* const row = b.first + 2 * k * b_row;
    const S* const next = row + (2 * k + 1 < b.rows ? b_row : 0);
#pragma GCC unroll 8
    for (int n = 0; n < NV; n += 2)
        E::pair_rows(row + n * E::V::width, next + n * E::V::width, column[n], column[n + 1]);
}

// acc[m][n] += sum_{k=first}^{last-1} a[m*a_row + k*a_step] . b[k*b_row + n*width ...]
//   a: (MR, depth) units, row stride a_row  b: (depth, NV*width), row stride b_row, as load_columns takes it
template <class E, int MR, int NV, class B>
FASTATTN_INLINE void gemm_tile(typename E::V (&acc)[MR][NV], const typename E::Unit* a, std::int64_t a_row,
                               B b, std::int64_t b_row, std::int64_t first, std::int64_t last,
                               std::int64_t a_step = 1) {
    using V = typename E::V;
    for (std::int64_t k = first; k < last; ++k) {
        V column[NV];
        load_columns<E, NV>(b, b_row, k, column);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            const V x = V::set1(a[m * a_row + k * a_step]);
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) acc[m][n] = E::mma(x, column[n], acc[m][n]);
        }
    }
}

// Work on the side of a product, in steps side(0) .. side(Side::steps - 1); `vectors`: it computes with them.
// None:
struct NoSide {
    static constexpr int steps = 0;
    static constexpr bool vectors = false;
    FASTATTN_INLINE void operator()(int) const {}
};

// With 16 registers a tile's sums would go to memory at every step of it.
template <class E, class Side>
inline constexpr bool runs_beside = Side::steps > 0 && (!Side::vectors || E::V::registers >= 32);

// What cannot run beside a product runs before it.
template <class E, class Side>
FASTATTN_INLINE void run_before(Side& side) {
    if constexpr (!runs_beside<E, Side>) {
        for (int s = 0; s < Side::steps; ++s) side(s);
    }
}

// The same with other work spread over it, unless `alone`. Nothing here waits for the work on the side, so
// the CPU runs both at once. Where it cannot, the caller has used run_before().
template <class E, int MR, int NV, class B, class Side>
FASTATTN_INLINE void gemm_tile_with(typename E::V (&acc)[MR][NV], const typename E::Unit* a,
                                    std::int64_t a_row, B b, std::int64_t b_row, std::int64_t depth,
                                    bool alone, Side& side) {
    std::int64_t done = 0;
    if constexpr (runs_beside<E, Side>) {
        if (!alone) {
            const std::int64_t chunk = depth / Side::steps;
            for (int s = 0; s < Side::steps; ++s, done += chunk) {
                gemm_tile<E, MR, NV>(acc, a, a_row, b, b_row, done, done + chunk);
                side(s);
            }
        }
    }
    gemm_tile<E, MR, NV>(acc, a, a_row, b, b_row, done, depth);
}

// out[m][0 .. NV*width) += a . b, with out in memory (row stride out_row), or = where `fresh`; side: beside
// the first `before` of depth, whose results the rest may need. The products are summed by themselves and
// then added: a sum that runs on over thousands of them rounds each to its own size.
template <class E, int MR, int NV, class B, class Side>
FASTATTN_INLINE void gemm_accumulate_with(typename E::Acc* out, std::int64_t out_row,
                                          const typename E::Unit* a, std::int64_t a_row, B b,
                                          std::int64_t b_row, std::int64_t depth, std::int64_t before,
                                          Side& side, std::int64_t a_step, bool fresh) {
    using V = typename E::V;
    run_before<E>(side);
    V acc[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[m][n] = V::zero();
    }
    if constexpr (runs_beside<E, Side>) {
        gemm_tile_with<E, MR, NV>(acc, a, a_row, b, b_row, before, false, side);
    } else {
        before = 0;
    }
    gemm_tile<E, MR, NV>(acc, a, a_row, b, b_row, before, depth, a_step);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) {
            auto* const to = out + m * out_row + n * V::width;
            (fresh ? acc[m][n] : V::load(to) + acc[m][n]).store(to);
        }
    }
}
template <class E, int MR, int NV, class B>
FASTATTN_INLINE void gemm_accumulate(typename E::Acc* out, std::int64_t out_row, const typename E::Unit* a,
                                     std::int64_t a_row, B b, std::int64_t b_row, std::int64_t depth,
                                     std::int64_t a_step = 1, bool fresh = false) {
    NoSide none;
    gemm_accumulate_with<E, MR, NV>(out, out_row, a, a_row, b, b_row, depth, 0, none, a_step, fresh);
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
