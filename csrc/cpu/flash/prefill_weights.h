// Prefill's second pass, on request: the weights, from the scores anew and the final sums.
#pragma once

#include "cpu/flash/pack.h"
#include "cpu/flash/prefill_tile.h"

namespace fastattn::cpu {
namespace {

// K: dtype of k.
template <class E, class K>
class PrefillWeights {
    using V = typename E::V;
    using Acc = typename E::Acc;
    static constexpr int w = V::width;

public:
    PrefillWeights(const FlashPlan& plan, const FlashBlock<E>& x, const ItemBuffers<E>& buffers,
                   const PrefillTile<E>& tile, const KeyRows<K>& k, std::int64_t rows, Executor& executor)
        : plan_(plan),
          x_(x),
          at_(buffers),
          tile_(tile),
          k_(k),
          rows_(rows),
          d_units_((x.problem.head_dim + E::scalars - 1) / E::scalars),
          executor_(executor) {}

    // keys: what any of the rows may attend.
    void write(KeyRange keys) {
        for (std::int64_t r = 0; r < rows_; ++r) {
            if (executor_.stop_requested()) return;
            for (std::int64_t j = 0; j < x_.problem.kv_size; ++j) set_weight(r, j, Acc(0));
        }
        const std::int64_t block = plan_.key_block;
        for (std::int64_t j = keys.begin / block * block; j < keys.end; j += block) {
            const std::int64_t n = keys.end - j < block ? keys.end - j : block;
            pack_keys<E>(at_.k, RowsFrom{k_, j}, n, x_.problem.head_dim);
            for (std::int64_t r = 0; r < rows_; r += E::mr) {
                if (executor_.stop_requested()) return;
                for (std::int64_t c = 0; c < n; c += E::nr) weights_tile(r, j, c, n);
            }
        }
    }

private:
    void weights_tile(std::int64_t r, std::int64_t j, std::int64_t c, std::int64_t n) {
        V acc[E::mr][E::nv] = {};
        gemm_tile<E, E::mr, E::nv>(acc, at_.q + r * plan_.q_stride, plan_.q_stride, at_.k + c * d_units_,
                                   E::nr, 0, d_units_);
        tile_.template store_scores<E::nv>(acc, V::zero());
        for (int m = 0; m < E::mr && r + m < rows_; ++m) {
            Acc* s = at_.scores + m * E::nr;
            transform_row<E, E::nv>(x_, x_.info[r + m], s, j + c, E::nv);
            const V shift = row_shift(x_, r + m);
            for (int v = 0; v < E::nv; ++v) exp2(V::load(s + v * w) - shift).store(s + v * w);
            // A denominator of 0 or NaN makes every attended weight NaN; masked ones stay 0. With a score of
            // +inf the others are 0.
            const Acc factor = x_.row_sum[(r + m) * E::sums * w];
            const bool spoilt = factor != factor && x_.row_max[r + m] != kInf<Acc>;
            for (std::int64_t k = c; k < n && k < c + E::nr; ++k) {
                if (s[k - c] != 0 || (spoilt && attends(x_, x_.info[r + m], j + k))) {
                    set_weight(r + m, j + k, s[k - c] * factor);
                }
            }
        }
    }

    void set_weight(std::int64_t r, std::int64_t j, Acc value) {
        const RowInfo& row = x_.info[r];
        static_cast<Acc*>(
            x_.problem.weights.data)[score_offset(x_.problem.weights, x_.batch, row.head, row.query, j)] =
            value;
    }

    const FlashPlan& plan_;
    const FlashBlock<E>& x_;
    const ItemBuffers<E>& at_;
    const PrefillTile<E>& tile_;
    const KeyRows<K>& k_;
    const std::int64_t rows_, d_units_;
    Executor& executor_;
};

}  // namespace
}  // namespace fastattn::cpu
