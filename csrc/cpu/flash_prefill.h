// Prefill: many query rows. For each block of kKeyBlock keys, k and v are packed once for all rows of the
// item; then for each tile of mr rows: scores by panels of nr keys in registers, softmax, product with v.
//
//   q (rows, Du)   k (panels, Du, nr)   p (mr, key_block)   v (panels, key_block, nr)   O (rows, Dv)
#pragma once

#include "cpu/flash_gemm.h"
#include "cpu/flash_item.h"
#include "cpu/flash_pack.h"

namespace fastattn::cpu {
namespace {

template <class E, class S>
class Prefill {
    using V = typename E::V;
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    static constexpr int w = V::width;

public:
    Prefill(const FlashCall& call, std::int64_t item, std::byte* workspace)
        : call_(call), p_(call.problem), item_(item_range(call, item)), x_(make_block<E>(p_, item_.batch)) {
        padded_ = (item_.rows + E::mr - 1) / E::mr * E::mr;
        keys_ = start_item<E>(call, item_, padded_, workspace, x_, at_);
        d_units_ = (p_.head_dim + E::scalars - 1) / E::scalars;
        k_ = row_pointer<const S>(p_.k, item_.batch, 0, item_.kv_head);
        v_ = row_pointer<const S>(p_.v, item_.batch, 0, item_.kv_head);
    }

    void run() {
        pack_queries();
        const std::int64_t block = call_.plan.key_block;
        for (std::int64_t j = keys_.begin / block * block; j < keys_.end; j += block) {
            if (call_.executor.stop_requested()) return;
            const std::int64_t n = block_keys(j);
            if (block_masked(j, n)) continue;
            pack_keys<E>(at_.k, k_ + j * p_.k.seq, p_.k.seq, p_.k.dim, n, p_.head_dim);
            const std::int64_t rounded = (n + E::nr - 1) / E::nr * E::nr;
            v_units_ = rounded / E::scalars;
            has_bad_ = pack_values<E>(at_.v, at_.bad, v_ + j * p_.v.seq, p_.v.seq, p_.v.dim, n, rounded,
                                      p_.value_dim);
            for (std::int64_t r = 0; r < padded_; r += E::mr) {
                if (call_.executor.stop_requested()) return;
                attend_tile(r, j, n);
            }
        }
        end_item<E, S>(call_, item_, x_);
        if (p_.weights.data != nullptr) write_weights();
    }

private:
    void pack_queries() {
        for (std::int64_t r = 0; r < padded_; ++r) {
            const RowInfo& row = x_.info[r];
            pack_row<E>(at_.q + r * call_.plan.q_stride,
                        row_pointer<const S>(p_.q, item_.batch, row.query, row.head), p_.q.dim, p_.head_dim);
        }
    }

    std::int64_t block_keys(std::int64_t j) const {
        const std::int64_t left = keys_.end - j;
        return left < call_.plan.key_block ? left : call_.plan.key_block;
    }

    // No row may attend any of n keys from j on, by the bool mask.
    bool rows_masked(std::int64_t r0, std::int64_t rows, std::int64_t j, std::int64_t n) const {
        if (p_.mask.data == nullptr) return false;
        const bool same = p_.mask.query == 0 && p_.mask.head == 0;
        for (std::int64_t r = r0; r < r0 + (same ? 1 : rows); ++r) {
            if (mask_any(p_.mask, item_.batch, x_.info[r], j, n)) return false;
        }
        return true;
    }
    bool block_masked(std::int64_t j, std::int64_t n) const { return rows_masked(0, item_.rows, j, n); }

    struct TileKeys {
        std::int64_t begin, end;        // columns of the block that any row of the tile may attend
        std::int64_t all_begin, all_end;  // ... that every row may attend
    };
    TileKeys tile_keys(std::int64_t r, std::int64_t j, std::int64_t n) const {
        TileKeys t{n, 0, 0, n};
        for (int m = 0; m < E::mr; ++m) {
            const std::int64_t begin = x_.info[r + m].begin - j, end = x_.info[r + m].end - j;
            if (end > begin && begin < t.begin) t.begin = begin;
            if (end > begin && end > t.end) t.end = end;
            if (begin > t.all_begin) t.all_begin = begin;
            if (end < t.all_end) t.all_end = end;
        }
        if (t.begin < 0) t.begin = 0;
        if (t.end > n) t.end = n;
        return t;
    }

    // One row tile against one packed block.
    void attend_tile(std::int64_t r, std::int64_t j, std::int64_t n) {
        const TileKeys keys = tile_keys(r, j, n);
        if (keys.begin >= keys.end) return;
        const std::int64_t first = keys.begin / E::nr * E::nr;
        std::int64_t last = first;
        for (std::int64_t c = first; c < keys.end; c += E::nr) {
            const std::int64_t left = keys.end - c;
            const int vectors = left >= E::nr ? E::nv : static_cast<int>((left + w - 1) / w);
            const bool ranged = keys.all_begin > c || keys.all_end < c + vectors * w;
            if (p_.mask.data != nullptr && rows_masked(r, E::mr, j + c, left < E::nr ? left : E::nr)) {
                clear_weights(c, vectors);
            } else {
                with_count<E::nv>(vectors, [&](auto count) {
                    constexpr int nv = decltype(count)::value;
                    if (x_.elementwise) {
                        score_tile_elementwise<nv>(r, j, first, c);
                    } else if (ranged) {
                        score_tile<nv, true>(r, j, first, c);
                    } else {
                        score_tile<nv, false>(r, j, first, c);
                    }
                });
            }
            last = c + vectors * w;
        }
        multiply_values(r, first, last);
        if (has_bad_) add_bad_values(r, j, first, last < n ? last : n);
    }

    void clear_weights(std::int64_t column, int vectors) {
        for (int m = 0; m < E::mr; ++m) {
            for (int c = 0; c < vectors; ++c) E::store_weights(V::zero(), weights_row(m), column + c * w);
        }
    }

    Unit* weights_row(int m) const { return at_.p + m * (call_.plan.key_block / E::scalars); }

    // Weights of mr rows for the keys of one panel, columns [c, c + NV*width) of the block. Scores stay in
    // registers; `ranged`: some keys are outside of some row's range.
    template <int NV, bool ranged>
    void score_tile(std::int64_t r, std::int64_t j, std::int64_t first, std::int64_t c) {
        V acc[E::mr][NV];
        raw_scores<NV>(r, c, acc);
        V top = V::set1(-kInf<Acc>);
        bool fresh = false;
        const V scale = V::set1(x_.scale_log2e);
#pragma GCC unroll 8
        for (int m = 0; m < E::mr; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) acc[m][n] = acc[m][n] * scale;
            if constexpr (ranged) keep_range<NV>(x_.info[r + m], j + c, acc[m]);
            fresh = fresh || x_.row_max[r + m] == -kInf<Acc>;
            top = V::max(largest<NV>(acc[m]) - V::set1(x_.row_max[r + m]), top);
        }
        if (fresh || V::any(V::gt(top, V::set1(Acc(kSlack))))) [[unlikely]] {
#pragma GCC unroll 8
            for (int m = 0; m < E::mr; ++m) {
                follow_peak(x_, r + m, V::reduce_max(largest<NV>(acc[m])), weights_row(m), first, c);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < E::mr; ++m) {
            RowSums<E> sums(x_.row_sum + (r + m) * E::sums * w);
            const V shift = row_shift(x_, r + m);
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) {
                const V weight = exp2<E::accuracy>(acc[m][n] - shift);
                sums.add(weight, E::store_weights(weight, weights_row(m), c + n * w));
            }
            sums.store();
        }
    }

    template <int NV>
    static FASTATTN_INLINE V largest(const V (&x)[NV]) {
        V top = x[0];
#pragma GCC unroll 8
        for (int n = 1; n < NV; ++n) top = V::max(x[n], top);
        return top;
    }

    // -inf for the keys j0, j0+1, ... that are outside of the row's range.
    template <int NV>
    FASTATTN_INLINE void keep_range(const RowInfo& row, std::int64_t j0, V (&x)[NV]) const {
        const V begin = V::set1(Acc(row.begin - j0)), end = V::set1(Acc(row.end - j0));
        const V masked = V::set1(-kInf<Acc>);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) {
            const V key = V::iota() + V::set1(Acc(n * w));
            x[n] = V::select(V::gt(end, key), V::select(V::gt(begin, key), masked, x[n]), masked);
        }
    }

    // The same with softcap, alibi, bias, mask or dropout: row by row, through memory.
    template <int NV>
    void score_tile_elementwise(std::int64_t r, std::int64_t j, std::int64_t first, std::int64_t c) {
        V acc[E::mr][NV];
        raw_scores<NV>(r, c, acc);
#pragma GCC unroll 8
        for (int m = 0; m < E::mr; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) acc[m][n].store(at_.scores + m * E::nr + n * w);
        }
        for (int m = 0; m < E::mr; ++m) {
            Acc* s = at_.scores + m * E::nr;
            transform_row(x_, x_.info[r + m], s, j + c, NV);
            finish_row(x_, r + m, s, weights_row(m), first, c, j + c, NV);
        }
    }

    template <int NV>
    FASTATTN_INLINE void raw_scores(std::int64_t r, std::int64_t c, V (&acc)[E::mr][NV]) {
#pragma GCC unroll 8
        for (int m = 0; m < E::mr; ++m) {
#pragma GCC unroll 8
            for (int n = 0; n < NV; ++n) acc[m][n] = V::zero();
        }
        gemm_tile<E, E::mr, NV>(acc, at_.q + r * call_.plan.q_stride, call_.plan.q_stride,
                                at_.k + c * d_units_, E::nr, d_units_);
    }

    // O += p . v over columns [first, last) of the block.
    void multiply_values(std::int64_t r, std::int64_t first, std::int64_t last) {
        const std::int64_t p_stride = call_.plan.key_block / E::scalars;
        const std::int64_t begin = first / E::scalars, depth = (last - first) / E::scalars;
        for (std::int64_t c = 0; c < p_.value_dim; c += E::nr) {
            const std::int64_t left = p_.value_dim - c;
            const int vectors = left >= E::nr ? E::nv : static_cast<int>((left + w - 1) / w);
            const Unit* panel = at_.v + c * v_units_ + begin * E::nr;
            with_count<E::nv>(vectors, [&](auto count) {
                gemm_accumulate<E, E::mr, decltype(count)::value>(
                    x_.o + r * x_.o_stride + c, x_.o_stride, at_.p + begin, p_stride, panel, E::nr, depth);
            });
        }
    }

    // The NaN and Inf that pack_values took out, for the rows that attend them.
    void add_bad_values(std::int64_t r, std::int64_t j, std::int64_t first, std::int64_t last) {
        for (std::int64_t c = first; c < last; ++c) {
            if (!at_.bad[c]) continue;
            for (int m = 0; m < E::mr; ++m) {
                if (!attends(x_, x_.info[r + m], j + c)) continue;
                const Acc weight = E::weight(weights_row(m), c);
                const S* v = v_ + (j + c) * p_.v.seq;
                for (std::int64_t d = 0; d < p_.value_dim; ++d) {
                    const Acc value = to_scalar(v[d * p_.v.dim]);
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
        const std::int64_t block = call_.plan.key_block;
        for (std::int64_t j = keys_.begin / block * block; j < keys_.end; j += block) {
            const std::int64_t n = block_keys(j);
            pack_keys<E>(at_.k, k_ + j * p_.k.seq, p_.k.seq, p_.k.dim, n, p_.head_dim);
            for (std::int64_t r = 0; r < padded_; r += E::mr) {
                if (call_.executor.stop_requested()) return;
                for (std::int64_t c = 0; c < n; c += E::nr) weights_tile(r, j, c, n);
            }
        }
    }

    void weights_tile(std::int64_t r, std::int64_t j, std::int64_t c, std::int64_t n) {
        V acc[E::mr][E::nv];
        raw_scores<E::nv>(r, c, acc);
        for (int m = 0; m < E::mr && r + m < item_.rows; ++m) {
            Acc* s = at_.scores;
            for (int v = 0; v < E::nv; ++v) acc[m][v].store(s + v * w);
            transform_row(x_, x_.info[r + m], s, j + c, E::nv);
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
    FlashBlock<E> x_;
    ItemBuffers<E> at_{};
    KeyRange keys_{};
    std::int64_t padded_ = 0, d_units_ = 0, v_units_ = 0;
    bool has_bad_ = false;
    const S* k_ = nullptr;
    const S* v_ = nullptr;
};

template <class E, class S>
void prefill_item(const FlashCall& call, std::int64_t item, std::byte* workspace) {
    Prefill<E, S>(call, item, workspace).run();
}

}  // namespace
}  // namespace fastattn::cpu
