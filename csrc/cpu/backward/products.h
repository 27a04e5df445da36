// The products that P and dS of a block enter:
//
//   dv += P^T dout   dk += dS^T q     tiles of mr keys
//   dq += dS k                        tiles of mr rows
#pragma once

#include "cpu/backward/block.h"
#include "cpu/flash/gemm.h"

namespace fastattn::cpu {
namespace {

// out (MR, dim) += a (MR, depth) . b (panels of dim; panel_rows, nr), over the first `depth` of the rows
template <class E, int MR>
FASTATTN_INLINE void add_product(typename E::Acc* out, std::int64_t out_row, std::int64_t dim,
                                 const typename E::Unit* a, std::int64_t a_row, std::int64_t a_step,
                                 const typename E::Unit* b, std::int64_t panel_rows, std::int64_t depth) {
    constexpr int w = E::V::width;
    for (std::int64_t c = 0; c < dim; c += E::nr) {
        const std::int64_t left = dim - c;
        const int vectors = left >= E::nr ? E::nv : static_cast<int>((left + w - 1) / w);
        with_count<E::nv>(vectors, [&](auto count) {
            gemm_accumulate<E, MR, decltype(count)::value>(out + c, out_row, a, a_row, b + c * panel_rows,
                                                           E::nr, depth, a_step);
        });
    }
}

// dv += P^T dout, dk += dS^T q, over the rows that have weights at the keys of a tile.
template <class E>
void add_key_products(const BackwardBlock<E>& block) {
    const AttentionProblem& p = block.forward;
    const BackwardPlan& plan = block.plan;
    const BackwardBuffers<E>& at = block.at;
    const std::int64_t tiles = block.rows.padded / E::mr;
    for (std::int64_t c = 0; c < block.keys.size; c += E::mr) {
        if (block.executor.stop_requested()) return;
        std::int64_t begin = 0, end = tiles;
        const auto has_weights = [&](std::int64_t t) {
            return at.tiles[t].first < c + E::mr && at.tiles[t].last > c;
        };
        while (begin < end && !has_weights(begin)) ++begin;
        while (end > begin && !has_weights(end - 1)) --end;
        if (begin == end) continue;
        const std::int64_t first = begin * E::mr / E::scalars, depth = (end - begin) * E::mr / E::scalars;
        const std::int64_t weight = first * plan.weight_stride + c;
        add_product<E, E::mr>(at.dv + c * plan.v_stride, plan.v_stride, p.value_dim, at.weights + weight, 1,
                              plan.weight_stride, at.dout_panels + first * E::nr, plan.row_block / E::scalars,
                              depth);
        add_product<E, E::mr>(at.dk + c * plan.d_stride, plan.d_stride, p.head_dim, at.ds + weight, 1,
                              plan.weight_stride, at.q_panels + first * E::nr, plan.row_block / E::scalars,
                              depth);
    }
}

// dq += dS k; dq: of the block of rows
template <class E>
void add_query_products(const BackwardBlock<E>& block, typename E::Acc* dq) {
    const BackwardPlan& plan = block.plan;
    const std::int64_t dim = block.forward.head_dim;
    for (std::int64_t r = 0; r < block.rows.padded; r += E::mr) {
        const TileColumns tile = block.at.tiles[r / E::mr];
        if (tile.last <= tile.first) continue;
        if (block.executor.stop_requested()) return;
        const std::int64_t first = tile.first / E::scalars, depth = (tile.last - tile.first) / E::scalars;
        const auto* a = block.at.ds_rows + r * plan.ds_stride + first;
        const auto* b = block.at.k_rows + first * E::nr;
        if (r + E::mr <= block.rows.live) {
            add_product<E, E::mr>(dq + r * plan.d_stride, plan.d_stride, dim, a, plan.ds_stride, 1, b,
                                  plan.key_block / E::scalars, depth);
            continue;
        }
        // The rows beyond the last one have no place in dq.
        with_count<E::mr>(static_cast<int>(block.rows.live - r), [&](auto count) {
            add_product<E, decltype(count)::value>(dq + r * plan.d_stride, plan.d_stride, dim, a,
                                                   plan.ds_stride, 1, b, plan.key_block / E::scalars, depth);
        });
    }
}

template <class Acc, class S>
void add_bad_row(Acc* to, Acc weight, const S* row, std::int64_t stride, std::int64_t dim) {
    for (std::int64_t d = 0; d < dim; ++d) {
        const Acc value = to_scalar(row[d * stride]);
        if (!(value - value == 0)) to[d] += weight * value;
    }
}

// The NaN and Inf of k, q and dout, which are zeros in the panels, for the pairs that are attended.
template <class E, class S, class K>
void add_bad_products(const BackwardBlock<E>& block, typename E::Acc* dq) {
    using Acc = typename E::Acc;
    const AttentionProblem& p = block.forward;
    const BackwardPlan& plan = block.plan;
    const BackwardBuffers<E>& at = block.at;
    const KeyBlock& keys = block.keys;
    const RowBlock& rows = block.rows;
    const Operand& d = block.problem.dout;
    const KeyRows<K> k(p.k, block.x.batch, keys.head);
    const S* q = row_pointer<const S>(p.q, block.x.batch, rows.first, rows.head);
    const S* dout = row_pointer<const S>(d, block.x.batch, rows.first, rows.head);
    for (std::int64_t r = 0; r < rows.live; ++r) {
        const TileColumns tile = at.tiles[r / E::mr];
        const bool bad_q = rows.bad_query && at.bad_q[r], bad_dout = rows.bad_gradient && at.bad_dout[r];
        for (std::int64_t c = tile.first; c < tile.last && c < keys.size; ++c) {
            const bool bad_k = keys.bad_key && at.bad_k[c];
            if (!(bad_k || bad_q || bad_dout) || !attends(block.x, block.x.info[r], keys.first + c)) continue;
            const std::int64_t unit = r / E::scalars * plan.weight_stride + c;
            const Acc weight = E::scalar_of(at.weights + unit, r % E::scalars);
            const Acc ds = E::scalar_of(at.ds + unit, r % E::scalars);
            if (bad_k)
                add_bad_row(dq + r * plan.d_stride, ds, k[keys.first + c], k.number_stride(), p.head_dim);
            if (bad_q) add_bad_row(at.dk + c * plan.d_stride, ds, q + r * p.q.seq, p.q.dim, p.head_dim);
            if (bad_dout)
                add_bad_row(at.dv + c * plan.v_stride, weight, dout + r * d.seq, d.dim, p.value_dim);
        }
    }
}

}  // namespace
}  // namespace fastattn::cpu
