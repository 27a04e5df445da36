// Prefill, one tile of mr rows against one packed block of keys: scores by panels of nr keys in registers,
// softmax, product with v. Of the engine alone: what k, v and q were stored as is behind it.
#pragma once

#include "cpu/flash/gemm.h"
#include "cpu/flash/item.h"

namespace fastattn::cpu {
namespace {

template <class E>
class PrefillTile {
    using V = typename E::V;
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    static constexpr int w = V::width;

public:
    PrefillTile(const FlashPlan& plan, const FlashBlock<E>& x, const ItemBuffers<E>& buffers,
                std::int64_t padded)
        : p_(x.problem),
          x_(x),
          at_(buffers),
          q_stride_(plan.q_stride),
          p_stride_(weight_stride(plan, tile_shape<E>())),
          d_units_((x.problem.head_dim + E::scalars - 1) / E::scalars),
          padded_(padded),
          drops_(x.problem.dropout > 0) {}

    // The packed rows of v in the present block, in units.
    void set_value_units(std::int64_t units) { v_units_ = units; }

    // One row tile against one packed block. The weights of each panel of keys are computed beside the
    // products of the next one, those of the last beside the first products with v. Returns the columns that
    // have weights.
    template <int MR>
    TileColumns attend(std::int64_t r, std::int64_t j, std::int64_t n) {
        TileKeys& tile = at_.tiles[r / E::mr];
        const RowsRange range = tile.range;
        if (seen_by(range, j, n) == Seen::none) return {0, 0};
        // Columns of the block that any row may attend.
        const std::int64_t begin = range.begin > j ? range.begin - j : 0;
        const std::int64_t end = range.end - j < n ? range.end - j : n;
        // The panels are packed from multiples of nr on; the first one may be used from one of its vectors
        // on.
        const std::int64_t start = x_.elementwise || drops_ ? E::nr : w, first = begin / start * start;
        PanelWeights<MR> weights{*this, r, j, first};
        std::int64_t last = first;
        // Columns that have weights, but for the last ones: with lists there may be gaps.
        TileColumns parts[kKeyBlock / E::nr + 1];
        int part = 0;
        parts[0].first = first;
        bool waiting = false;  // a panel has scores but no weights yet
        for (std::int64_t c = first, next; c < end; c = next) {
            next = c + E::nr - c % E::nr;
            std::int64_t left = end < next ? end - c : next - c;
            bool all = false;
            if (tile.listed) {
                const SeenKeys seen = seen_within(x_.info + r, MR, j + c, left);
                if (seen.begin >= seen.end) continue;
                c += (seen.begin - j - c) / start * start;
                left = seen.end - j - c;
                if (c > last && parts[part].first < last) parts[part++].last = last;
                if (c > last) parts[part].first = c;
                all = seen.all && seen.begin == j + c && left % w == 0;
            }
            const int vectors = static_cast<int>((left + w - 1) / w);
            const bool ranged = tile.listed ? !all : seen_by(range, j + c, vectors * w) != Seen::all;
            last = c + vectors * w;
            if (last > end) last = (end + E::scalars - 1) / E::scalars * E::scalars;
            if (mask_hides(p_.mask, x_.batch, x_.info + r, MR, j + c, left)) {
                if (waiting) weights.all();
                waiting = false;
                clear_weights<MR>(c);
                continue;
            }
            weights.bias_row = r;
            weights.bias_key = j + next;
            with_count<E::nv>(vectors, [&](auto count) {
                score_panel<MR, decltype(count)::value>(r, j, parts[0].first, c, ranged, waiting, weights);
            });
            waiting = true;
            weights.column = c;
            weights.half = vectors <= E::nv / 2;
        }
        weights.bias_row = r + MR < padded_ ? r + MR : 0;
        weights.bias_key = j + (weights.bias_row > 0 ? first : n);
        for (int done = 0; done < part; ++done) {
            multiply_values(r, parts[done].first, parts[done].last, false, weights, !tile.started);
            tile.started = true;
        }
        if (parts[part].first < last) {
            multiply_values(r, parts[part].first, last, waiting, weights, !tile.started);
            tile.started = true;
        }
        return {first, last < n ? last : n};
    }

    Unit* weights_row(int m) const { return at_.p + m * p_stride_; }

    // A panel that is not full is filled up to `filled` vectors: with -inf for keys that no row may attend,
    // or with any number where the key ranges are applied afterwards.
    template <int filled, int MR, int NV>
    FASTATTN_INLINE void store_scores(const V (&acc)[MR][NV], V fill) const {
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < filled; ++n) {
                (n < NV ? acc[m][n < NV ? n : 0] : fill).store(at_.scores + m * E::nr + n * w);
            }
        }
    }

private:
    template <int MR>
    void clear_weights(std::int64_t column) {
        for (int m = 0; m < MR; ++m) {
            for (int c = 0; c < E::nv; c += 2) {
                E::store_weights(V::zero(), V::zero(), weights_row(m), column + c * w);
            }
        }
    }

    // The scores x of one panel become weights, and the sums follow; a row at a time.
    template <int MR>
    struct PanelWeights {
        static constexpr int steps = MR;
        static constexpr bool vectors = true;
        PrefillTile& self;
        const std::int64_t r, j;
        std::int64_t column;
        std::int64_t bias_row = 0, bias_key = 0;  // where the next panel's bias begins
        bool half = false;  // of the panel: the second one has no scores

        FASTATTN_INLINE void operator()(int m) {
            if (self.x_.bias && bias_row + m < self.padded_) self.fetch_bias(bias_row + m, bias_key);
            if (half) {
                of_row<E::nv / 2>(m);
            } else {
                of_row<E::nv>(m);
            }
        }

        template <int NV>
        FASTATTN_INLINE void of_row(int m) {
            Acc* const s = self.at_.scores + m * E::nr;
            Unit* const p = self.weights_row(m) + column / E::scalars;
            const V shift = row_shift(self.x_, r + m);
            V weights[E::nv];
#pragma GCC unroll 8
            for (int n = 0; n < E::nv; n += 2) {
                const auto weight = [&](int i) {
                    return i < NV ? exp2<E::accuracy>(V::load(s + i * w) - shift) : V::zero();
                };
                weights[n] = weight(n);
                weights[n + 1] = weight(n + 1);
                if (n < NV) E::store_weights(weights[n], weights[n + 1], p, n * w);
            }
            E::add_weights(weights, self.x_.row_sum + (r + m) * E::sums * w);
            if (self.drops_) [[unlikely]] {
#pragma GCC unroll 8
                for (int n = 0; n < E::nv; ++n) weights[n].store(s + n * w);
                self.drop(m, r, j, column);
            }
        }
        void all() {
            for (int m = 0; m < steps; ++m) (*this)(m);
        }
    };

    // After the sums: the denominator knows nothing of dropout.
    void drop(int m, std::int64_t r, std::int64_t j, std::int64_t column) {
        Acc* const s = at_.scores + m * E::nr;
        drop_weights(x_, x_.info[r + m], s, j + column, E::nr);
        for (int n = 0; n < E::nv; n += 2) {
            E::store_weights(V::load(s + n * w), V::load(s + (n + 1) * w), weights_row(m), column + n * w);
        }
    }

    // Scores x of MR rows for the keys of one panel, columns [c, c + NV*width) of the block; `ranged`: some
    // keys are outside of some row's range. m is raised where they ask for it.
    template <int MR, int NV>
    void score_panel(std::int64_t r, std::int64_t j, std::int64_t first, std::int64_t c, bool ranged,
                     bool waiting, PanelWeights<MR>& weights) {
        if (waiting) run_before<E>(weights);
        V acc[MR][NV];
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) acc[m][n] = V::zero();
        }
        gemm_tile_with<E, MR, NV>(acc, at_.q + r * q_stride_, q_stride_,
                                  at_.k + (c - c % E::nr) * d_units_ + c % E::nr, E::nr, d_units_, !waiting,
                                  weights);
        if (x_.elementwise) {
            store_scores<E::nv>(acc, V::zero());
            for (int m = 0; m < MR; ++m) transform_scores(m, r, j, first, c);
        } else if (ranged) {
            scale_scores<true>(r, j, first, c, acc);
        } else {
            scale_scores<false>(r, j, first, c, acc);
        }
    }

    // Row r of the bias of the panel from key j on.
    FASTATTN_INLINE void fetch_bias(std::int64_t r, std::int64_t j) const {
        if (p_.bias.key != 1 || j >= p_.kv_size) return;
        const auto size = static_cast<std::int64_t>(item_size(p_.bias.dtype));
        const std::int64_t keys = p_.kv_size - j < E::nr ? p_.kv_size - j : E::nr;
        const char* const at = static_cast<const char*>(p_.bias.data) + (x_.info[r].bias + j) * size;
        RowPrefetch<false>(at, keys * size, 0, 1).advance(1);
    }

    // Row m of the products q.k in memory becomes scores, with all arguments.
    void transform_scores(int m, std::int64_t r, std::int64_t j, std::int64_t first, std::int64_t c) {
        const V top = transform_row<E, E::nv>(x_, x_.info[r + m], at_.scores + m * E::nr, j + c, E::nv);
        if (V::any(V::gt(top - V::set1(x_.row_max[r + m]), V::set1(Acc(kSlack))))) [[unlikely]] {
            follow_peak(x_, r + m, V::reduce_max(top), weights_row(m), first, c);
        }
    }

    // A row that has seen nothing, m = -inf, has x - m = inf.
    template <bool ranged, int MR, int NV>
    FASTATTN_INLINE void scale_scores(std::int64_t r, std::int64_t j, std::int64_t first, std::int64_t c,
                                      V (&acc)[MR][NV]) {
        V top = V::set1(-kInf<Acc>);
        const V scale = V::set1(x_.scale_log2e);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) acc[m][n] = acc[m][n] * scale;
            if constexpr (ranged) keep_seen(x_.info[r + m], j + c, acc[m]);
            top = V::max(largest<NV>(acc[m]) - V::set1(x_.row_max[r + m]), top);
        }
        store_scores<(NV > E::nv / 2 ? E::nv : E::nv / 2)>(acc, V::set1(-kInf<Acc>));
        if (V::any(V::gt(top, V::set1(Acc(kSlack))))) [[unlikely]] {
            for (int m = 0; m < MR; ++m) {
                V row = V::load(at_.scores + m * E::nr);
                for (int n = 1; n < NV; ++n) row = V::max(V::load(at_.scores + m * E::nr + n * w), row);
                follow_peak(x_, r + m, V::reduce_max(row), weights_row(m), first, c);
            }
        }
    }

    template <int NV>
    static FASTATTN_INLINE V largest(const V (&x)[NV]) {
        V top = x[0];
#pragma GCC unroll 8
        for (int n = 1; n < NV; ++n) top = V::max(x[n], top);
        return top;
    }

    // O += p . v over columns [first, last) of the block, or = where `fresh`; with `waiting` the weights of
    // the last panel are computed on the way.
    template <int MR>
    void multiply_values(std::int64_t r, std::int64_t first, std::int64_t last, bool waiting,
                         PanelWeights<MR>& weights, bool fresh) {
        const std::int64_t begin = first / E::scalars, depth = (last - first) / E::scalars;
        std::int64_t before = waiting ? (weights.column - first) / E::scalars : 0;
        if (waiting && (before == 0 || p_.value_dim < E::nr)) {
            weights.all();
            before = 0;
        }
        for (std::int64_t c = 0; c < p_.value_dim; c += E::nr) {
            const std::int64_t left = p_.value_dim - c;
            const int vectors = left >= E::nr ? E::nv : static_cast<int>((left + w - 1) / w);
            const Unit* panel = at_.v + c * v_units_ + begin * E::nr;
            Acc* const o = x_.o + r * x_.o_stride + c;
            if (c == 0 && before > 0) {
                gemm_accumulate_with<E, MR, E::nv>(o, x_.o_stride, at_.p + begin, p_stride_, panel, E::nr,
                                                   depth, before, weights, 1, fresh);
                continue;
            }
            with_count<E::nv>(vectors, [&](auto count) {
                gemm_accumulate<E, MR, decltype(count)::value>(o, x_.o_stride, at_.p + begin, p_stride_,
                                                               panel, E::nr, depth, 1, fresh);
            });
        }
    }

    const AttentionProblem& p_;
    const FlashBlock<E> x_;  // a copy, as what it points to is written: its pointers then stay in registers
    const ItemBuffers<E> at_;
    const std::int64_t q_stride_, p_stride_, d_units_, padded_;
    std::int64_t v_units_ = 0;
    const bool drops_;
};

}  // namespace
}  // namespace fastattn::cpu
