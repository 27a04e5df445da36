// Decode: O += p . v over a block of keys, read where they lie.
#pragma once

#include "cpu/flash/decode_block.h"

namespace fastattn::cpu {
namespace {

// E: engine of the scores, and of the values where it takes pairs of keys and there is more than one row to
// use them. Else these are multiplied by F, by fused multiply-add. W: dtype of v.
template <class E, class F, class W>
class DecodeValues {
    using V = typename E::V;
    using Acc = typename E::Acc;
    static constexpr int w = V::width;
    static constexpr std::int64_t block = kDecodeBlock;
    static_assert(E::nv == F::nv && block % E::nr == 0);
    // O is loaded and stored once for so many keys; the same with one row for each head.
    static constexpr std::int64_t kValueKeys = 32, kRowValueKeys = 8;

public:
    DecodeValues(const FlashBlock<E>& x, const ItemRange& item, const ItemBuffers<E>& buffers,
                 const DecodeKeys<W>& v)
        : x_(x),
          p_(buffers.p),
          tail_(buffers.v),
          rows_(item.rows),
          heads_(item.heads),
          seq_(v.seq),
          head_(v.head),
          value_dim_(x.problem.value_dim),
          v_ahead_(decode_ahead(v.seq, value_dim_ * static_cast<std::int64_t>(sizeof(W)), item.heads)),
          one_row_(item.rows == 1),
          // Not by what an item happens to hold: bits must not depend on the other heads.
          pairs_(E::scalars == 2 && item.rows > 1 && value_dim_ % (2 * w) == 0) {}

    // Whether the product takes keys two at a time.
    bool pairs() const { return pairs_; }

    // O[r] += sum_j p[r][j] v_j for all rows, a few keys of all heads at a time. With pairs_ O has its
    // columns as the engine pairs them, until restore_columns().
    void add_block(const W* v, std::int64_t n, RowPrefetch<false>& next) const {
        const std::int64_t whole = whole_columns();
        const std::int64_t row_tiles =
                               rows_ / kDecodeTileRows<V> + rows_ % kDecodeTileRows<V> / 2 + rows_ % 2,
                           tiles = row_tiles * ((whole + F::nr - 1) / F::nr),
                           steps = tiles * FetchAhead::steps;
        FetchAhead ahead{next, steps == 0 ? 0 : (kValueKeys + steps - 1) / steps};
        const std::int64_t at_once = keys_at_once();
        for (std::int64_t k = 0; k < n; k += at_once) {
            const std::int64_t depth = n - k < at_once ? n - k : at_once;
            for (std::int64_t h = 0; h < heads_; ++h) {
                const W* rows_begin = v + k * seq_ + h * head_;
                for_row_tiles<V>(h * rows_, rows_, [&](std::int64_t r, auto rows) {
                    constexpr int m = decltype(rows)::value;
                    for (std::int64_t c = 0; c < whole; c += F::nr) {
                        const int vectors = whole - c < F::nr ? static_cast<int>((whole - c) / w) : F::nv;
                        with_count<F::nv>(vectors, [&](auto count) {
                            add_tile<m, decltype(count)::value>(r, c, k, rows_begin + c, depth, ahead);
                        });
                    }
                });
            }
        }
        if (whole == value_dim_) return;
        for (std::int64_t h = 0; h < heads_; ++h) {
            pack_tail(v + h * head_ + whole, n, value_dim_ - whole);
            for_row_tiles<V>(h * rows_, rows_, [&](std::int64_t r, auto rows) {
                gemm_accumulate<F, decltype(rows)::value, 1>(x_.o + r * x_.o_stride + whole, x_.o_stride,
                                                             p_ + r * block, block, tail_, w, n);
            });
        }
    }

    // The same for keys from j on, leaving out the values that a row may not attend.
    void add_block_carefully(const W* v, std::int64_t j, std::int64_t n) const {
        for (std::int64_t h = 0; h < heads_; ++h) add_carefully(h * rows_, v + h * head_, j, n);
    }

    // After the last block, with pairs.
    void restore_columns() const {
        if constexpr (E::scalars == 2) {
            if (!pairs_) return;
            for (std::int64_t r = 0; r < rows_ * heads_; ++r) {
                Acc* const o = x_.o + r * x_.o_stride;
                for (std::int64_t c = 0; c < value_dim_; c += 2 * w) {
                    V first = V::load(o + c), second = V::load(o + c + w);
                    E::restore_columns(first, second);
                    first.store(o + c);
                    second.store(o + c + w);
                }
            }
        }
    }

private:
    // A tile of the values' product prefetches some of the next rows, step by step: too many at once would
    // wait.
    struct FetchAhead {
        static constexpr int steps = 4;
        static constexpr bool vectors = false;
        RowPrefetch<false>& next;
        const std::int64_t rows;
        FASTATTN_INLINE void operator()(int) const { next.advance(rows); }
    };

    std::int64_t whole_columns() const { return value_dim_ / w * w; }
    // Their products are one sum, that is then added to O.
    std::int64_t keys_at_once() const { return one_row_ ? kRowValueKeys : kValueKeys; }

    // O[r .. r+MR)[c .. c + NV*width) += p . v over `depth` keys from k on; v: the first of them, column c.
    template <int MR, int NV>
    FASTATTN_INLINE void add_tile(std::int64_t r, std::int64_t c, std::int64_t k, const W* v,
                                  std::int64_t depth, FetchAhead& ahead) const {
        Acc* const o = x_.o + r * x_.o_stride + c;
        if constexpr (E::scalars == 2 && NV % 2 == 0) {
            if (pairs_) {
                const std::int64_t pairs = (depth + 1) / 2;
                gemm_accumulate_with<E, MR, NV>(o, x_.o_stride, p_ + r * block + k / 2, block,
                                                PairedRows<W>{v, depth}, seq_, pairs, pairs, ahead, 1, false);
                return;
            }
        }
        const Acc* p = p_ + r * block + k;
        if constexpr (MR == 1) {
            if (one_row_) {
                gemm_accumulate<F, 1, NV>(o, x_.o_stride, p, block, RowsAhead<W>{v, v_ahead_}, seq_, depth);
                return;
            }
        }
        gemm_accumulate_with<F, MR, NV>(o, x_.o_stride, p, block, v, seq_, depth, depth, ahead, 1, false);
    }

    // The columns of v beyond whole vectors, zero-filled: (n, width).
    void pack_tail(const W* v, std::int64_t n, std::int64_t columns) const {
        for (std::int64_t k = 0; k < n; ++k) load_n<V>(v + k * seq_, columns).store(tail_ + k * w);
    }

    void add_carefully(std::int64_t first, const W* values, std::int64_t j, std::int64_t n) const {
        if constexpr (E::scalars == 2) {
            if (pairs_) return add_pairs_carefully(first, values, j, n);
        }
        // The sums of add_values to the last bit, less the values that a row may not attend.
        const std::int64_t whole = whole_columns();
        for (std::int64_t c = 0; c < value_dim_; c += w) {
            const std::int64_t at_once = c < whole ? keys_at_once() : n;
            for (std::int64_t begin = 0; begin < n; begin += at_once) {
                const std::int64_t end = n - begin < at_once ? n : begin + at_once;
                for (std::int64_t r = first; r < first + rows_; ++r) {
                    V sum = V::zero();
                    for (std::int64_t k = begin; k < end; ++k) {
                        const Acc weight = p_[r * block + k];
                        if (weight == 0 && !attends(x_, x_.info[r], j + k)) continue;
                        const V x = load_n<V>(values + k * seq_ + c, value_dim_ - c);
                        sum = V::fma(V::set1(weight), x, sum);
                    }
                    Acc* const o = x_.o + r * x_.o_stride + c;
                    (V::load(o) + sum).store(o);
                }
            }
        }
    }

    // The sums of add_values to the last bit, with zeros for NaN and Inf; then these, for the rows that
    // attend them.
    void add_pairs_carefully(std::int64_t first, const W* values, std::int64_t j, std::int64_t n) const {
        constexpr std::int64_t columns = 2 * w;
        W* const strip = reinterpret_cast<W*>(tail_);
        for (std::int64_t c = 0; c < value_dim_; c += columns) {
            for (std::int64_t i = 0; i < n * columns; ++i) {
                const W x = values[i / columns * seq_ + c + i % columns];
                strip[i] = is_finite(x) ? x : W{};
            }
            for_row_tiles<V>(first, rows_, [&](std::int64_t r, auto rows) {
                for (std::int64_t k = 0; k < n; k += kValueKeys) {
                    const std::int64_t depth = n - k < kValueKeys ? n - k : kValueKeys;
                    gemm_accumulate<E, decltype(rows)::value, 2>(
                        x_.o + r * x_.o_stride + c, x_.o_stride, p_ + r * block + k / 2, block,
                        PairedRows<W>{strip + k * columns, depth}, columns, (depth + 1) / 2);
                }
            });
            for (std::int64_t i = 0; i < n * columns; ++i) {
                const std::int64_t k = i / columns;
                const W x = values[k * seq_ + c + i % columns];
                if (is_finite(x)) continue;
                for (std::int64_t r = first; r < first + rows_; ++r) {
                    if (!attends(x_, x_.info[r], j + k)) continue;
                    x_.o[r * x_.o_stride + c + E::paired_column(i % columns)] +=
                        E::weight(p_ + r * block, k) * to_scalar(x);
                }
            }
        }
    }

    static bool is_finite(W x) { return to_scalar(x) - to_scalar(x) == 0; }

    const FlashBlock<E> x_;  // a copy, as what it points to is written
    typename E::Unit *const p_, *const tail_;
    const std::int64_t rows_, heads_, seq_, head_, value_dim_, v_ahead_;
    const bool one_row_, pairs_;
};

}  // namespace
}  // namespace fastattn::cpu
