// P and dS of one block of rows against one block of keys: tiles of mr rows, panels of nr keys.
//
//   x = score * log2 e   P = 2^(x - lse * log2 e)   dP = dout . v   dS = P (dP - delta)
#pragma once

#include "cpu/backward/block.h"
#include "cpu/backward/scores.h"
#include "cpu/flash/gemm.h"

namespace fastattn::cpu {
namespace {

template <class E>
void clear_panel(const BackwardBlock<E>& block, std::int64_t r, std::int64_t c) {
    using V = typename E::V;
    const BackwardBuffers<E>& at = block.at;
    for (std::int64_t m = r; m < r + E::mr; m += E::scalars) {
        clear_vectors<V>(at.weights + m / E::scalars * block.plan.weight_stride + c, E::nr);
        clear_vectors<V>(at.ds + m / E::scalars * block.plan.weight_stride + c, E::nr);
    }
    if constexpr (E::scalars > 1) {
        for (std::int64_t m = r; m < r + E::mr; ++m)
            clear_vectors<V>(at.ds_rows + m * block.plan.ds_stride + c / E::scalars, E::nr / E::scalars);
    }
}

template <class V, int MR, int NV>
FASTATTN_INLINE void zero_tile(V (&acc)[MR][NV]) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[m][n] = V::zero();
    }
}

// A whole panel, with `fill` beyond the NV vectors.
template <class E, int NV>
FASTATTN_INLINE void store_tile(typename E::Acc* to, const typename E::V (&acc)[E::mr][NV],
                                typename E::V fill) {
#pragma GCC unroll 8
    for (int m = 0; m < E::mr; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < E::nv; ++n)
            (n < NV ? acc[m][n < NV ? n : 0] : fill).store(to + m * E::nr + n * E::V::width);
    }
}

// The weights of a row, beside the products of dout with v.
template <class E>
struct BackwardWeights {
    static constexpr int steps = E::mr;
    static constexpr bool vectors = true;
    const BackwardBlock<E>& block;
    const std::int64_t r;

    FASTATTN_INLINE void operator()(int m) {
        using V = typename E::V;
        const BackwardRow<typename E::Acc>& row = block.at.rows[r + m];
        const V shift = V::set1(row.shift), factor = V::set1(row.factor);
        const auto* x = block.at.x + m * E::nr;
        auto* p = block.at.p + m * E::nr;
#pragma GCC unroll 8
        for (int n = 0; n < E::nv; ++n)
            (exp2<E::accuracy>(V::load(x + n * V::width) - shift) * factor).store(p + n * V::width);
    }
};

// The weights of row r, row m of its tile, that dropout leaves.
template <class E>
void drop_panel(const BackwardBlock<E>& block, std::int64_t r, int m, std::int64_t c) {
    using V = typename E::V;
    typename E::Acc *p = block.at.p + m * E::nr, *kept = block.at.kept + m * E::nr;
    for (int n = 0; n < E::nv; ++n) V::load(p + n * V::width).store(kept + n * V::width);
    drop_weights(block.x, block.x.info[r], kept, block.keys.first + c, E::nr);
}

// Vector n of row m of a panel: p as the product with dout takes it, and dS.
template <bool checked, bool featured, class E>
FASTATTN_INLINE void finish_vector(const BackwardBlock<E>& block, std::int64_t r, std::int64_t c, int m,
                                   int n, typename E::V& p, typename E::V& ds, typename E::V& distance) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    constexpr int w = V::width;
    const int at = m * E::nr + n * w;
    const V zero = V::zero();
    p = V::load(block.at.p + at);
    V dp = V::load(block.at.dp + at);
    V kept = p;
    if constexpr (featured) {
        if (block.forward.dropout > 0) {
            kept = V::load(block.at.kept + at);
            dp = dp * V::select(V::eq(kept, zero), zero, V::set1(block.keep_factor));
        }
    }
    ds = p * (dp - V::set1(block.at.rows[r + m].delta));
    if constexpr (checked) {
        const auto masked = V::eq(V::load(block.at.x + at), V::set1(-kInf<Acc>));
        ds = V::select(masked, zero, ds);
        kept = V::select(masked, zero, kept);
    }
    p = kept;
    if constexpr (featured) {
        if (block.into_bias) {
            Acc* to = block.at.dbias + (r + m) * block.plan.key_block + c + n * w;
            (V::load(to) + ds).store(to);
        }
        if (block.alibi) {
            const double position = block.x.info[r + m].position;
            const V first = V::set1(Acc(position - double(block.keys.first + c + n * w))) - V::iota();
            distance = V::fma(ds, V::max(first, zero - first), distance);
        }
        if (block.x.has_slope) {  // NaN where a masked key is
            const auto none = V::eq(ds, zero);
            ds = V::select(none, zero, ds * V::load(block.at.cap + at));
        }
    }
}

// P and dS of a panel, from x, P and dP in memory, to where the products take them. checked: pairs that a row
// may not attend are left out, whatever their v holds; featured: softcap, dropout, ALiBi, dbias.
template <bool checked, bool featured, class E>
void finish_panel(const BackwardBlock<E>& block, std::int64_t r, std::int64_t c) {
    using V = typename E::V;
    using Unit = typename E::Unit;
    constexpr int w = V::width;
    const BackwardPlan& plan = block.plan;
    for (int m = 0; m < E::mr; m += E::scalars) {
        if (featured && block.forward.dropout > 0) {
            for (int s = 0; s < E::scalars; ++s) drop_panel(block, r + m + s, m + s, c);
        }
        V distance[E::scalars];
        for (int s = 0; s < E::scalars; ++s) distance[s] = V::zero();  // sum of dS |p - j|
#pragma GCC unroll 2
        for (int n = 0; n < E::nv; n += E::scalars == 1 ? 1 : 2) {
            // For pairs along the keys two vectors of each row are needed at once.
            constexpr int side = E::scalars == 1 ? 1 : 2;
            V p[side][E::scalars], ds[side][E::scalars];
#pragma GCC unroll 2
            for (int v = 0; v < side; ++v) {
#pragma GCC unroll 2
                for (int s = 0; s < E::scalars; ++s)
                    finish_vector<checked, featured>(block, r, c, m + s, n + v, p[v][s], ds[v][s],
                                                     distance[s]);
            }
            if (featured && block.into_bias) continue;
            Unit* const to = block.at.weights + (r + m) / E::scalars * plan.weight_stride + c;
            Unit* const ds_to = block.at.ds + (r + m) / E::scalars * plan.weight_stride + c;
#pragma GCC unroll 2
            for (int v = 0; v < side; ++v) {
                E::combine_rounded(p[v]).store(to + (n + v) * w);
                E::combine_rounded(ds[v]).store(ds_to + (n + v) * w);
            }
            if constexpr (E::scalars > 1) {
                for (int s = 0; s < E::scalars; ++s)
                    E::store_weights(ds[0][s], ds[1][s], block.at.ds_rows + (r + m + s) * plan.ds_stride,
                                     c + n * w);
            }
        }
        if (featured && block.alibi && !block.into_bias) {
            const RowBlock& rows = block.rows;
            for (int s = 0; s < E::scalars && r + m + s < rows.live; ++s)
                block.slopes[row_number(block.forward, block.x.batch, block.x.entry, rows.head,
                                        rows.first + r + m + s) *
                                 block.schedule.most_chunks +
                             block.chunk] -= double(V::reduce_add(distance[s]));
        }
    }
}

// One tile of rows, NV vectors of keys from column c of the block; `ranged`: some keys are outside of some
// row's range.
template <int NV, class E>
void find_panel(const BackwardBlock<E>& block, std::int64_t r, std::int64_t c, bool ranged) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    constexpr int w = V::width;
    const FlashBlock<E>& x = block.x;
    const BackwardBuffers<E>& at = block.at;
    const BackwardPlan& plan = block.plan;
    {
        V acc[E::mr][NV];
        zero_tile(acc);
        gemm_tile<E, E::mr, NV>(acc, at.q_rows + r * plan.q_units, plan.q_units,
                                at.k_panels + c * block.d_units, E::nr, 0, block.d_units);
        if (x.elementwise || ranged) {
            store_tile<E, NV>(at.x, acc, V::zero());
            for (int m = 0; m < E::mr; ++m)
                find_scores(x, x.info[r + m], block.keys.first + c, block.careful, at.x + m * E::nr,
                            at.cap + m * E::nr);
            // What lies beyond NV vectors belongs to keys that no row may attend.
            for (int m = 0; m < E::mr; ++m)
                for (int n = NV; n < E::nv; ++n) V::set1(-kInf<Acc>).store(at.x + m * E::nr + n * w);
        } else {
            const V scale = V::set1(x.scale_log2e);
#pragma GCC unroll 8
            for (int m = 0; m < E::mr; ++m) {
#pragma GCC unroll 8
                for (int n = 0; n < NV; ++n) acc[m][n] = acc[m][n] * scale;
            }
            if (block.careful) [[unlikely]] {
                for (int m = 0; m < E::mr; ++m)
                    for (int n = 0; n < NV; ++n) acc[m][n] = V::max(V::set1(lowest_score<Acc>), acc[m][n]);
            }
            store_tile<E, NV>(at.x, acc, V::set1(-kInf<Acc>));
        }
    }
    {
        BackwardWeights<E> weights{block, r};
        run_before<E>(weights);
        V acc[E::mr][NV];
        zero_tile(acc);
        gemm_tile_with<E, E::mr, NV>(acc, at.dout_rows + r * plan.v_units, plan.v_units,
                                     at.v_panels + c * block.v_units, E::nr, block.v_units, false, weights);
        store_tile<E, NV>(at.dp, acc, V::zero());
    }
    const bool checked = ranged || x.elementwise || block.careful || NV < E::nv;
    if (x.has_slope || block.alibi || block.forward.dropout > 0 || block.into_bias) {
        finish_panel<true, true>(block, r, c);
    } else if (checked) {
        finish_panel<true, false>(block, r, c);
    } else {
        finish_panel<false, false>(block, r, c);
    }
}

// The tile of rows from row r of the block on.
template <class E>
void find_tile(const BackwardBlock<E>& block, std::int64_t r) {
    constexpr int w = E::V::width;
    const std::int64_t keys = block.keys.size;
    const std::int64_t first_key = block.keys.first;
    RowsRange range = no_rows(first_key + keys);
    for (int m = 0; m < E::mr; ++m) add_row(range, block.x.info[r + m].begin, block.x.info[r + m].end);
    const std::int64_t begin = range.begin > first_key ? range.begin - first_key : 0;
    const std::int64_t end = range.end - first_key < keys ? range.end - first_key : keys;
    const std::int64_t rows_left = block.rows.live - r, rows = rows_left < E::mr ? rows_left : E::mr;
    TileColumns& tile = block.at.tiles[r / E::mr];
    tile = {0, 0};
    const std::int64_t first = begin / E::nr * E::nr;
    const bool listed = block.x.entry.lists.index != nullptr;
    for (std::int64_t c = 0; c < keys; c += E::nr) {
        const std::int64_t left = end - c;
        const bool outside = begin >= end || c < first || left <= 0;
        const std::int64_t n = left < E::nr ? left : E::nr;
        const Seen seen = !listed   ? Seen::all
                          : outside ? Seen::none
                                    : seen_by_rows(block.x.info + r, rows, first_key + c, n);
        if (outside || seen == Seen::none ||
            mask_hides(block.forward.mask, block.x.batch, block.x.info + r, rows, first_key + c, n)) {
            if (!block.into_bias) clear_panel(block, r, c);
            continue;
        }
        const int vectors = left >= E::nr ? E::nv : static_cast<int>((left + w - 1) / w);
        if (tile.last == 0) tile.first = c;
        tile.last = c + vectors * w;
        const bool ranged = seen != Seen::all || seen_by(range, first_key + c, vectors * w) != Seen::all;
        with_count<E::nv>(vectors,
                          [&](auto count) { find_panel<decltype(count)::value>(block, r, c, ranged); });
    }
}

// P and dS of all rows and keys of the block; with into_bias only their dbias.
// False when asked to stop: the tiles' columns are incomplete then.
template <class E>
bool find_ds(BackwardBlock<E>& block) {
    for (std::int64_t r = 0; r < block.rows.padded; r += E::mr) {
        if (block.executor.stop_requested()) return false;
        block.ahead.advance();
        find_tile(block, r);
    }
    return true;
}

}  // namespace
}  // namespace fastattn::cpu
