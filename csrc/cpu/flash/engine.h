// Engines: what a matrix product is made of. The algorithms see units - a float, a double, or a pair of
// bf16 that one dot-product instruction takes - and never how many scalars a unit holds.
//
//   acc[m][n] += sum_k a[m][k] . b[k][n]      a: units broadcast one by one, b: rows of units
#pragma once

#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace fastattn::cpu {
namespace {

constexpr int kLineBytes = 64;

// Asks for the line at p. Into L2, whose pending misses are more than L1's.
template <bool for_writing = false>
FASTATTN_INLINE void fetch_line(const void* p) {
    __builtin_prefetch(p, for_writing, 2);
}

// Neighbours first.
template <class V, int N>
FASTATTN_INLINE V sum_of(const V (&x)[N]) {
    static_assert(N % 2 == 0);
    V sum = x[0] + x[1];
#pragma GCC unroll 8
    for (int n = 2; n < N; n += 2) sum = sum + (x[n] + x[n + 1]);
    return sum;
}

// Products by fused multiply-add in the compute type (f64 for f64, f32 for the others).
template <class T, class Isa, int kRows, int kVecs>
struct FmaEngine {
    using V = Vec<T, Isa>;
    using Acc = T;
    using Unit = T;             // storage of packed q, k, v and of the weights
    static constexpr int mr = kRows;           // register tile: mr rows x nv vectors
    static constexpr int nv = kVecs;
    static constexpr int nr = kVecs * V::width;
    static constexpr int scalars = 1;          // scalars in a unit, along the summed axis
    static constexpr Accuracy accuracy = Accuracy::full;

    static FASTATTN_INLINE V mma(V a, V b, V acc) { return V::fma(a, b, acc); }
    static constexpr int sums = 1;             // of a row: see Bf16DotEngine

    // Weights: two vectors stored as the product with v takes them; those of a panel added to the row's sums
    // in memory.
    static FASTATTN_INLINE void store_weights(V a, V b, Unit* row, std::int64_t column) {
        a.store(row + column);
        b.store(row + column + V::width);
    }
    static FASTATTN_INLINE void add_weights(const V (&p)[nv], Acc* sum) {
        (V::load(sum) + sum_of(p)).store(sum);
    }
    static FASTATTN_INLINE T weight(const Unit* row, std::int64_t column) { return row[column]; }
    static FASTATTN_INLINE void set_weight(Unit* row, std::int64_t column, T p) { row[column] = p; }

    // One vector of units from the `scalars` rows that they combine (as numbers, one vector per row).
    static FASTATTN_INLINE V combine(const V (&rows)[scalars]) { return rows[0]; }

    // The same with numbers that are rounded on the way; and one scalar of a unit.
    static FASTATTN_INLINE V combine_rounded(const V (&rows)[scalars]) { return rows[0]; }
    static FASTATTN_INLINE T scalar_of(const Unit* unit, std::int64_t) { return *unit; }

    // Loads units [u, u + width) of a row whose scalars lie side by side; or of one of n scalars with the
    // given stride, zeros beyond it.
    template <class S>
    static FASTATTN_INLINE V load_whole(const S* row, std::int64_t u) {
        return V::load(row + u);
    }
    template <class S>
    static FASTATTN_INLINE V load_units(const S* row, std::int64_t stride, std::int64_t u, std::int64_t n) {
        return load_strided<V>(row + u * stride, stride, n - u);
    }
};

}  // namespace
}  // namespace fastattn::cpu
