// Prefill: many query rows. For each block of keys (kKeyBlock, or half of that), k and v are packed once for all rows of the
// item; then for each tile of mr rows (the last one may have fewer): scores by panels of nr keys in registers, softmax, product with v.
//
//   q (rows, Du)   k (panels, Du, nr)   p (mr, key_block)   v (panels, key_block, nr)   O (rows, Dv)
#pragma once

#include "cpu/flash/gemm.h"
#include "cpu/flash/item.h"
#include "cpu/flash/pack.h"

namespace fastattn::cpu {
namespace {

// S: dtype of q and out, K of k, W of v.
template <class E, class S, class K, class W>
class Prefill {
    using V = typename E::V;
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    static constexpr int w = V::width;
    static constexpr int kRowStep = 2;  // the last tile of an item may have fewer rows, a multiple of this
    static_assert(E::mr % kRowStep == 0);
    static constexpr std::int64_t kInCaches = 256 * 1024;  // bytes of k and v that need no prefetching

public:
    Prefill(const FlashCall& call, const ItemRange& item, std::byte* workspace)
        : call_(call),
          p_(call.problem),
          item_(item),
          plan_(item_.entry->plan),
          x_(make_block<E>(p_, item_.batch, item_.entry->lengths)),
          k_(p_.k, item_.batch, item_.kv_head),
          v_(p_.v, item_.batch, item_.kv_head),
          drops_(p_.dropout > 0) {
        padded_ = (item_.rows + kRowStep - 1) / kRowStep * kRowStep;
        p_stride_ = weight_stride(plan_, tile_shape<E>());
        keys_ = start_item<E>(call, item_, padded_, workspace, x_, at_);
        d_units_ = (p_.head_dim + E::scalars - 1) / E::scalars;
        const std::int64_t key_bytes = p_.head_dim * static_cast<std::int64_t>(sizeof(K)) +
                                       p_.value_dim * static_cast<std::int64_t>(sizeof(W));
        large_ = p_.batch * p_.kv_heads * p_.kv_size * key_bytes > kInCaches;
    }

    void run() {
        pack_queries();
        find_tile_keys();
        const std::int64_t block = plan_.key_block;
        for (std::int64_t j = keys_.begin / block * block; j < keys_.end; j += block) {
            if (call_.executor.stop_requested()) return;
            const std::int64_t n = block_keys(j);
            if (!mask_hides(p_.mask, item_.batch, x_.info, item_.rows, j, n)) attend_block(j, n);
            if (call_.executor.stop_requested()) return;
            if (section_ends(j)) end_sections();
        }
        for (std::int64_t r = 0; r < padded_; r += E::mr) {
            if (!tile_of(r).started) clear_output(x_, r, E::mr);
        }
        if (plan_.section_keys > 0) {
            for (std::int64_t r = 0; r < padded_; ++r) {
                end_section(x_, r);
                take_totals(x_, r);
            }
        }
        end_item<E, S>(call_, item_, x_);
        if (p_.weights.data != nullptr) write_weights();
    }

private:
    void attend_block(std::int64_t j, std::int64_t n) {
        pack_block(j, n);
        if (large_) plan_prefetch(j + plan_.key_block);
        for (std::int64_t r = 0; r < padded_; r += E::mr) {
            if (call_.executor.stop_requested()) return;
            if (large_) {
                next_k_.advance(prefetch_rows_);
                next_v_.advance(prefetch_rows_);
                next_q_.advance(prefetch_rows_);
                out_.advance(prefetch_rows_);
            }
            const std::int64_t rows = padded_ - r < E::mr ? padded_ - r : E::mr;
            with_count<E::mr / kRowStep>(static_cast<int>(rows / kRowStep), [&](auto count) {
                attend_tile<decltype(count)::value * kRowStep>(r, j, n);
            });
        }
    }

    // During the tiles of one block the keys and values of the next one, from key j on, are on their way; during
    // those of the last one what this thread will probably compute next.
    void plan_prefetch(std::int64_t j) {
        next_q_ = next_k_ = next_v_ = {};
        out_ = {};
        ItemRange item = item_;
        std::int64_t n = j < keys_.end ? block_keys(j) : 0;
        const std::int64_t tiles = (padded_ + E::mr - 1) / E::mr;
        if (n == 0) {
            // With split keys the output is written by the merge.
            if (plan_.key_splits == 1) out_ = query_rows_ahead<true>(p_.out, item_, p_.value_dim);
            prefetch_rows_ = (item_.rows + tiles - 1) / tiles;
            const std::int64_t next = call_.executor.next_item();
            if (next >= call_.schedule.items) return;
            item = item_range(call_, next);
            if (item.entry->plan.decode) return;
            KeyRange keys = entry_keys(p_, item.entry->lengths, item.row_begin / p_.group);
            if (keys.begin < item.key_begin) keys.begin = item.key_begin;
            if (keys.end > item.key_end) keys.end = item.key_end;
            const std::int64_t block = item.entry->plan.key_block;
            j = keys.begin / block * block;
            n = keys.end - j < block ? keys.end - j : block;
            next_q_ = query_rows_ahead<false>(p_.q, item, p_.head_dim);
        }
        next_k_ = keys_ahead(KeyRows<K>(p_.k, item.batch, item.kv_head), j, p_.head_dim, n);
        next_v_ = keys_ahead(KeyRows<W>(p_.v, item.batch, item.kv_head), j, p_.value_dim, n);
        prefetch_rows_ = ((n < item.rows ? item.rows : n) + tiles - 1) / tiles;
    }

    // Sections end at the same keys whatever the item's first one is.
    bool section_ends(std::int64_t j) const {
        const std::int64_t section = plan_.section_keys;
        return section > 0 && (j + plan_.key_block) % section == 0;
    }

    void end_sections() {
        for (std::int64_t r = 0; r < padded_; ++r) {
            TileKeys& tile = tile_of(r);
            if (!tile.started) continue;
            end_section(x_, r);
            if (r % E::mr == E::mr - 1 || r == padded_ - 1) tile.started = false;
        }
    }

    // The rows of q or out of an item. Of a group where the heads of a query lie side by side: else each head is a stream
    // that the hardware follows.
    template <bool for_writing>
    RowPrefetch<for_writing> query_rows_ahead(const Operand& x, const ItemRange& item,
                                              std::int64_t dim) const {
        if (p_.group > 1 && !heads_side_by_side(x)) return {};
        return rows_ahead<S, for_writing>(x, item.batch, item.row_begin / p_.group, item.kv_head * p_.group,
                                          dim, (item.rows + p_.group - 1) / p_.group, p_.group);
    }

    // Keys [j, j + n), less the panels before the first that anybody attends.
    void pack_block(std::int64_t j, std::int64_t n) {
        const std::int64_t skip = keys_.begin > j ? (keys_.begin - j) / E::nr * E::nr : 0, left = n - skip;
        pack_keys<E>(at_.k + skip * d_units_, RowsFrom{k_, j + skip}, left, p_.head_dim);
        const std::int64_t padded = (n + E::nr - 1) / E::nr * E::nr;
        v_units_ = padded / E::scalars;
        has_bad_ =
            pack_values<E>(at_.v + skip / E::scalars * E::nr, at_.bad + skip, RowsFrom{v_, j + skip}, left,
                           (left + w - 1) / w * w, padded, p_.value_dim);
    }

    void pack_queries() {
        // The weights on request are computed by whole tiles.
        const std::int64_t rows =
            p_.weights.data == nullptr ? padded_ : (padded_ + E::mr - 1) / E::mr * E::mr;
        for (std::int64_t r = 0; r < rows; ++r) {
            const RowInfo& row = x_.info[r < padded_ ? r : padded_ - 1];
            pack_row<E>(at_.q + r * plan_.q_stride,
                        row_pointer<const S>(p_.q, item_.batch, row.query, row.head), p_.q.dim, p_.head_dim);
        }
    }

    std::int64_t block_keys(std::int64_t j) const {
        const std::int64_t left = keys_.end - j;
        return left < plan_.key_block ? left : plan_.key_block;
    }

    TileKeys& tile_of(std::int64_t r) { return at_.tiles[r / E::mr]; }

    // The keys of each tile of rows, once for all blocks.
    void find_tile_keys() {
        for (std::int64_t r = 0; r < padded_; ++r) {
            TileKeys& tile = tile_of(r);
            if (r % E::mr == 0) tile = {no_rows(x_.entry.kv_len), false};
            add_row(tile.range, x_.info[r].begin, x_.info[r].end);
        }
    }

    // One row tile against one packed block. The weights of each panel of keys are computed beside the products
    // of the next one, those of the last beside the first products with v.
    template <int MR>
    void attend_tile(std::int64_t r, std::int64_t j, std::int64_t n) {
        TileKeys& tile = tile_of(r);
        const RowsRange range = tile.range;
        if (seen_by(range, j, n) == Seen::none) return;
        // Columns of the block that any row may attend.
        const std::int64_t begin = range.begin > j ? range.begin - j : 0;
        const std::int64_t end = range.end - j < n ? range.end - j : n;
        // The panels are packed from multiples of nr on; the first one may be used from one of its vectors on.
        const std::int64_t start = x_.elementwise || drops_ ? E::nr : w, first = begin / start * start;
        PanelWeights<MR> weights{*this, r, j, first};
        std::int64_t last = first;
        bool waiting = false;  // a panel has scores but no weights yet
        for (std::int64_t c = first, width; c < end; c += width) {
            width = E::nr - c % E::nr;
            const std::int64_t left = end - c < width ? end - c : width;
            const int vectors = static_cast<int>((left + w - 1) / w);
            const bool ranged = seen_by(range, j + c, vectors * w) != Seen::all;
            last = c + vectors * w;
            if (last > end) last = (end + E::scalars - 1) / E::scalars * E::scalars;
            if (mask_hides(p_.mask, item_.batch, x_.info + r, MR, j + c, left)) {
                if (waiting) weights.all();
                waiting = false;
                clear_weights<MR>(c);
                continue;
            }
            weights.bias_row = r;
            weights.bias_key = j + c + width;
            with_count<E::nv>(vectors, [&](auto count) {
                score_panel<MR, decltype(count)::value>(r, j, first, c, ranged, waiting, weights);
            });
            waiting = true;
            weights.column = c;
            weights.half = vectors <= E::nv / 2;
        }
        weights.bias_row = r + MR < padded_ ? r + MR : 0;
        weights.bias_key = j + (weights.bias_row > 0 ? first : n);
        multiply_values(r, first, last, waiting, weights, !tile.started);
        tile.started = true;
        if (has_bad_) add_bad_values(r, MR, j, first, last < n ? last : n);
    }

    template <int MR>
    void clear_weights(std::int64_t column) {
        for (int m = 0; m < MR; ++m) {
            for (int c = 0; c < E::nv; c += 2) {
                E::store_weights(V::zero(), V::zero(), weights_row(m), column + c * w);
            }
        }
    }

    Unit* weights_row(int m) const { return at_.p + m * p_stride_; }

    // The scores x of one panel become weights, and the sums follow; a row at a time.
    template <int MR>
    struct PanelWeights {
        static constexpr int steps = MR;
        static constexpr bool vectors = true;
        Prefill& self;
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

    // Scores x of MR rows for the keys of one panel, columns [c, c + NV*width) of the block; `ranged`: some keys
    // are outside of some row's range. m is raised where they ask for it.
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
        gemm_tile_with<E, MR, NV>(acc, at_.q + r * plan_.q_stride, plan_.q_stride,
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
            if constexpr (ranged) keep_range(x_.info[r + m], j + c, acc[m]);
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

    // A panel that is not full is filled up to `filled` vectors: with -inf for keys that no row may attend, or with any
    // number where the key ranges are applied afterwards.
    template <int filled, int MR, int NV>
    FASTATTN_INLINE void store_scores(const V (&acc)[MR][NV], V fill) {
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < filled; ++n) {
                (n < NV ? acc[m][n < NV ? n : 0] : fill).store(at_.scores + m * E::nr + n * w);
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

    // O += p . v over columns [first, last) of the block, or = where `fresh`; with `waiting` the weights of the last
    // panel are computed on the way.
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

    // The NaN and Inf that pack_values took out, for the rows that attend them.
    void add_bad_values(std::int64_t r, int rows, std::int64_t j, std::int64_t first, std::int64_t last) {
        for (std::int64_t c = first; c < last; ++c) {
            if (!at_.bad[c]) continue;
            for (int m = 0; m < rows; ++m) {
                if (!attends(x_, x_.info[r + m], j + c)) continue;
                const Acc weight = E::weight(weights_row(m), c);
                const W* v = v_[j + c];
                for (std::int64_t d = 0; d < p_.value_dim; ++d) {
                    const Acc value = to_scalar(v[d * v_.number_stride()]);
                    if (!(value - value == 0)) x_.o[(r + m) * x_.o_stride + d] += weight * value;
                }
            }
        }
    }

    // Second pass on request: the scores again, now with the final sums.
    void write_weights() {
        for (std::int64_t r = 0; r < item_.rows; ++r) {
            if (call_.executor.stop_requested()) return;
            for (std::int64_t j = 0; j < p_.kv_size; ++j) set_weight(r, j, Acc(0));
        }
        const std::int64_t block = plan_.key_block;
        for (std::int64_t j = keys_.begin / block * block; j < keys_.end; j += block) {
            const std::int64_t n = block_keys(j);
            pack_keys<E>(at_.k, RowsFrom{k_, j}, n, p_.head_dim);
            for (std::int64_t r = 0; r < padded_; r += E::mr) {
                if (call_.executor.stop_requested()) return;
                for (std::int64_t c = 0; c < n; c += E::nr) weights_tile(r, j, c, n);
            }
        }
    }

    void weights_tile(std::int64_t r, std::int64_t j, std::int64_t c, std::int64_t n) {
        V acc[E::mr][E::nv] = {};
        gemm_tile<E, E::mr, E::nv>(acc, at_.q + r * plan_.q_stride, plan_.q_stride,
                                   at_.k + c * d_units_, E::nr, 0, d_units_);
        store_scores<E::nv>(acc, V::zero());
        for (int m = 0; m < E::mr && r + m < item_.rows; ++m) {
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
        static_cast<Acc*>(p_.weights.data)[score_offset(p_.weights, item_.batch, row.head, row.query, j)] =
            value;
    }

    const FlashCall& call_;
    const AttentionProblem& p_;
    ItemRange item_;
    const FlashPlan& plan_;
    FlashBlock<E> x_;
    const KeyRows<K> k_;
    const KeyRows<W> v_;
    ItemBuffers<E> at_{};
    KeyRange keys_{};
    std::int64_t padded_ = 0, d_units_ = 0, v_units_ = 0, p_stride_ = 0;
    bool has_bad_ = false, large_ = false;
    const bool drops_;
    RowPrefetch<false> next_q_, next_k_, next_v_;
    RowPrefetch<true> out_;
    std::int64_t prefetch_rows_ = 0;
};

template <class E, class S, class K, class W>
void prefill_item(const FlashCall& call, const ItemRange& item, std::byte* workspace) {
    Prefill<E, S, K, W>(call, item, workspace).run();
}

}  // namespace
}  // namespace fastattn::cpu
