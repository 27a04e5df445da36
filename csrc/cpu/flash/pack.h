// Packing: q, k and v of one block from any strides and storage type into units in the order in which
// the register tiles read them.
//
//   q -> (rows, Du)                row-major, Du = ceil(D / scalars) units
//   k -> panels of nr keys:        (panels, Du, nr)
//   v -> panels of nr columns:     (panels, Ku, nr), Ku = key_block / scalars units
//
// Zeros fill up the last vector of keys; what lies beyond it in the panels is never used.
#pragma once

#include "cpu/flash/engine.h"

namespace fastattn::cpu {
namespace {

// Rows become columns, in log2(width) rounds of interleaving.
template <class V>
FASTATTN_INLINE void transpose(V (&r)[V::width]) {
    constexpr int half = V::width / 2;
    for (int round = 1; round < V::width; round *= 2) {
        V t[V::width];
#pragma GCC unroll 16
        for (int i = 0; i < half; ++i) {
            t[2 * i] = V::interleave_lo(r[i], r[i + half]);
            t[2 * i + 1] = V::interleave_hi(r[i], r[i + half]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < V::width; ++i) r[i] = t[i];
    }
}

// One row of D scalars as Du units at dst (Du is rounded up to whole vectors by the caller's stride).
template <class E, class S>
FASTATTN_INLINE void pack_row(typename E::Unit* dst, const S* src, std::int64_t stride, std::int64_t d) {
    using V = typename E::V;
    const std::int64_t units = (d + E::scalars - 1) / E::scalars;
    std::int64_t u = 0;
    if (stride == 1) {
        for (; (u + V::width) * E::scalars <= d; u += V::width) E::load_whole(src, u).store(dst + u);
    }
    for (; u < units; u += V::width) E::load_units(src, stride, u, d).store(dst + u);
}

// rows[j]: number 0 of key j. The last vector is filled up with zero keys; the panel beyond it stays as it
// is.
template <class E, class Rows>
void pack_keys(typename E::Unit* dst, const Rows& rows, std::int64_t keys, std::int64_t d) {
    using V = typename E::V;
    constexpr int w = V::width;
    const std::int64_t dim_stride = rows.number_stride();
    const std::int64_t units = (d + E::scalars - 1) / E::scalars;
    for (std::int64_t j = 0; j < keys; j += w) {
        typename E::Unit* panel = dst + (j / E::nr) * units * E::nr + j % E::nr;
        const bool whole = dim_stride == 1 && j + w <= keys;
        for (std::int64_t u = 0; u < units; u += w) {
            V r[w];
            if (whole && (u + w) * E::scalars <= d) {
#pragma GCC unroll 16
                for (int i = 0; i < w; ++i) r[i] = E::load_whole(rows[j + i], u);
            } else {
                for (int i = 0; i < w; ++i) {
                    r[i] = j + i < keys ? E::load_units(rows[j + i], dim_stride, u, d) : V::zero();
                }
            }
            transpose(r);
            const std::int64_t n = units - u < w ? units - u : w;
            if (n == w) {
#pragma GCC unroll 16
                for (int i = 0; i < w; ++i) r[i].store(panel + (u + i) * E::nr);
            } else {
                for (std::int64_t i = 0; i < n; ++i) r[i].store(panel + (u + i) * E::nr);
            }
        }
    }
}

// Packs v. Returns false when any of it was NaN or Inf.
template <class E, bool kSanitize, class Rows>
bool pack_value_rows(typename E::Unit* dst, const Rows& rows, std::int64_t first, std::int64_t last,
                     std::int64_t keys, std::int64_t panel_units, std::int64_t dv) {
    using V = typename E::V;
    const std::int64_t dim_stride = rows.number_stride();
    V check[E::nv];  // stay 0, or become NaN
#pragma GCC unroll 8
    for (int n = 0; n < E::nv; ++n) check[n] = V::zero();
    // Columns [c, c + width) of the rows of a unit, to `to`; `load` reads them from a row that exists.
    auto pack = [&](std::int64_t j, std::int64_t c, typename E::Unit* to, V& seen, auto load) {
        V x[E::scalars];
#pragma GCC unroll 2
        for (int s = 0; s < E::scalars; ++s) {
            x[s] = V::zero();
            if (j + s >= keys) continue;
            x[s] = load(rows[j + s] + c * dim_stride);
            seen = V::fma(x[s], V::zero(), seen);
            if (kSanitize) x[s] = V::select(V::eq(x[s] - x[s], V::zero()), x[s], V::zero());
        }
        E::combine(x).store(to);
    };
    const auto whole = [](const auto* x) { return V::load(x); };
    for (std::int64_t j = first; j < last; j += E::scalars) {
        typename E::Unit* to = dst + j / E::scalars * E::nr;
        std::int64_t c = 0;
        if (dim_stride == 1) {
            for (; c + E::nr <= dv; c += E::nr, to += panel_units) {
#pragma GCC unroll 8
                for (int n = 0; n < E::nv; ++n) pack(j, c + n * V::width, to + n * V::width, check[n], whole);
            }
            for (; c + V::width <= dv; c += V::width, to += V::width) pack(j, c, to, check[0], whole);
        }
        for (; c < dv; c += V::width) {
            pack(j, c, to, check[0], [&](const auto* x) { return load_strided<V>(x, dim_stride, dv - c); });
            to += (c + V::width) % E::nr == 0 ? panel_units - E::nr + V::width : V::width;
        }
    }
#pragma GCC unroll 8
    for (int n = 1; n < E::nv; ++n) check[0] = check[0] + check[n];
    return V::reduce_add(check[0]) == 0;
}

// Packs `rows` rows of v, zeros from `keys` on, and takes NaN and Inf out of it: a masked key's weight is 0,
// and 0 * NaN must not reach the sum. bad[j] is set for keys that held any; true when there was one. The
// caller adds the non-finite products of the keys that are attended.
template <class E, class Rows>
bool pack_values(typename E::Unit* dst, std::uint8_t* bad, const Rows& from, std::int64_t keys,
                 std::int64_t rows, std::int64_t key_block, std::int64_t dv) {
    const std::int64_t panel_units = key_block / E::scalars * E::nr;
    if (pack_value_rows<E, false>(dst, from, 0, rows, keys, panel_units, dv)) return false;
    for (std::int64_t j = 0; j < rows; j += E::scalars) {
        const bool finite = pack_value_rows<E, true>(dst, from, j, j + E::scalars, keys, panel_units, dv);
        for (int s = 0; s < E::scalars; ++s) bad[j + s] = !finite;
    }
    return true;
}

}  // namespace
}  // namespace fastattn::cpu
